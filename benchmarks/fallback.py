"""What the fallback costs where speculation pays, and what it saves where it does not.

    python benchmarks/fallback.py --run runs/quickstart

Times, interleaved on the same prompts: a trained pair, fallback and not; the same target with a head of random
weights, a matrix of random successors that never learns and the paper's plan, fallback and not; and autoregressive
decoding. Speeds are medians; ratios are of the same prompt and repeat, medians with the interquartile range.
"""

import argparse
from collections import Counter
from pathlib import Path
from statistics import median, quantiles

import torch
from round import random_successors
from tqdm import tqdm

from graft_inference import GenerationStats, GraftEngine, paper_policy
from graft_inference.heads.eagle3.model import DraftHead
from graft_inference.retrieval.successor_matrix import SuccessorMatrix
from graft_inference.target.packed_linear import pack_linears
from graft_train.data.samples import read_samples
from graft_train.device import describe_device

RATIOS = (
    ("trained, fallback", "trained"),
    ("random head, fallback", "autoregressive"),
    ("random head", "autoregressive"),
    ("trained, fallback", "autoregressive"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--run", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--num-draft-tokens", type=int, default=32, help="of the random head's tree")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    trained = GraftEngine.from_pretrained(arguments.run / "bundle", arguments.run / "target", "cpu", arguments.dtype)
    random = random_engine(trained, arguments.num_draft_tokens)
    samples = read_samples(arguments.run / "data" / "samples.jsonl", "evaluation")[: arguments.prompts]
    prompts = [torch.tensor(sample.prompt_ids) for sample in samples]
    contestants = {
        "trained": (trained, "graft", False),
        "trained, fallback": (trained, "graft", True),
        "random head": (random, "graft", False),
        "random head, fallback": (random, "graft", True),
        "autoregressive": (trained, "autoregressive", False),
    }
    found: dict[str, list[GenerationStats]] = {name: [] for name in contestants}
    first: dict[str, GenerationStats] = {}
    for repeat in tqdm(range(arguments.repeats + 1)):
        for prompt in prompts if repeat else prompts[:1]:
            for name in contestants if repeat % 2 else reversed(contestants):
                engine, method, engine.fallback = contestants[name]
                stats = engine.generate(prompt, arguments.max_new_tokens, method=method).stats
                if repeat:
                    found[name].append(stats)
                else:
                    first[name] = stats
    device = describe_device(trained.target.device)
    print(f"{device['name']}, {device['threads']} threads, torch {device['torch']}; {arguments.dtype}; {len(prompts)}")
    for name, runs in found.items():
        rounds = sum((run.fallback for run in runs), Counter[str]())
        shares = ", ".join(f"{reason} {count / rounds.total():.1%}" for reason, count in rounds.most_common())
        print(f"{name}: {median(run.tokens_per_second for run in runs):.1f} tokens/s  {shares}")
    for ours, theirs in RATIOS:
        ratios = [
            one.tokens_per_second / other.tokens_per_second
            for one, other in zip(found[ours], found[theirs], strict=True)
        ]
        low, _, high = quantiles(ratios, n=4)
        at_first = first[ours].tokens_per_second / first[theirs].tokens_per_second
        print(f"{ours} / {theirs}: {median(ratios):.3f} ({low:.3f}-{high:.3f}); first generation {at_first:.3f}")


def random_engine(trained: GraftEngine, num_draft_tokens: int) -> GraftEngine:
    """The same target with a head and a matrix that know nothing."""
    torch.manual_seed(0)
    head = DraftHead(trained.head.config).to(trained.target.device, trained.target.model.dtype)
    head.eval().requires_grad_(False)
    pack_linears(head)
    vocabulary, k = trained.successors.ids_VK.shape
    matrix = SuccessorMatrix(random_successors(vocabulary, k)).to(trained.target.device)
    return GraftEngine(
        trained.target, paper_policy(4, num_draft_tokens, 6, k - 1), head, matrix, retrieval_scope="frozen"
    )


if __name__ == "__main__":
    main()
