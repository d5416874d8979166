"""Decoding and training beside another checkout of this repository, in one interleaved run.

    git worktree add ../other 5144a66
    python benchmarks/against_build.py ../other [--target DIRECTORY --head DIRECTORY]

One process for each checkout loads the same target and the same bare EAGLE-3 head with its own code, and answers line
by line; the order turns with every prompt and step. Both draft as the paper does, with few nodes and an empty matrix.
Without a target, one of 50 million random weights is made, and a head like it, whose drafts are hardly ever accepted.
Of decoding the time per new token counts, without the prefill; of training a whole step of `train_step.py`. Beside the
time on the clock stands the processor's, which other programs on the machine disturb less, here with the prefill. A
ratio above 1 says that this checkout is faster: medians of pairs, with 95 % intervals by bootstrap over them. Two
processes of the same checkout (pass this one) tell the noise.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).parents[1]
METHODS = ("autoregressive", "eagle3", "graft")
POLICY = (4, 16, 6, 7)
"""The paper's policy with so many children of a node, nodes of a tree, draft steps and ranks of the matrix."""
PROMPT = 48
STEP = "train_step"
STEP_SIZES = {"tokens": 512, "width": 256, "vocab": 8192, "draft_vocab": 4096, "steps": 4, "documents": 4}
BOOTSTRAP = 2000
Pair = tuple[dict[str, Any], dict[str, Any]]
"""What this checkout answered, and the other."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("other", type=Path, nargs="?")
    parser.add_argument("--target", type=Path)
    parser.add_argument("--head", type=Path, help="a trained head of the target, of which what is graft's is left out")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(*arguments.work)
        return
    if not arguments.other:
        parser.error("which checkout?")
    with tempfile.TemporaryDirectory() as place:
        target, head = pair(Path(place), arguments.target, arguments.head)
        builds = {"this": Build(ROOT, target, head), "other": Build(arguments.other.resolve(), target, head)}
        load = os.getloadavg()
        pairs = compare(builds, arguments.prompts, arguments.tokens, arguments.repeats)
        loads = ", ".join(f"{one:.1f}" for one in (load[0], os.getloadavg()[0]))
        print(f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}, load {loads}\n")
        print(to_table(pairs))


class Build:
    """A checkout at work in a process of its own."""

    def __init__(self, root: Path, target: Path, head: Path) -> None:
        environment = os.environ | {"PYTHONPATH": f"{root}:{root / 'inference'}"}
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--work", str(target), str(head)],
            cwd=root, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def ask(self, command: dict[str, Any]) -> dict[str, Any]:
        """Its answer, which is not the only thing that it may print."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        sys.exit(f"the build in {self.process.args} did not answer")


def pair(place: Path, target: Path | None, head: Path | None) -> tuple[Path, Path]:
    """Directories of a target and a bare head that every build can load."""
    from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

    from graft_inference.heads.eagle3.checkpoint import save_head
    from graft_inference.heads.eagle3.model import DraftHead, DraftHeadConfig, default_aux_layer_ids

    torch.manual_seed(0)
    bare = place / "head"
    if target is None:
        config: Any = LlamaConfig(
            vocab_size=16384, hidden_size=512, intermediate_size=1408, num_hidden_layers=12, num_attention_heads=8,
            bos_token_id=None, eos_token_id=None, pad_token_id=None, tie_word_embeddings=True,
        )  # fmt: skip
        target = place / "target"
        AutoModelForCausalLM.from_config(config).save_pretrained(target)
    if head is not None:
        bare.mkdir()
        for name in ("config.json", "model.safetensors"):
            (bare / name).symlink_to((head / name).resolve())
        return target.resolve(), bare
    config = AutoConfig.from_pretrained(target)
    sizes = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size")
    random = DraftHead(
        DraftHeadConfig(
            **{name: getattr(config, name) for name in sizes},
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            draft_vocab_size=config.vocab_size // 4,
            aux_layer_ids=default_aux_layer_ids(config.num_hidden_layers),
            max_position_embeddings=config.max_position_embeddings,
        )
    )
    save_head(random, bare)
    return target.resolve(), bare


def compare(builds: dict[str, Build], prompts: int, tokens: int, repeats: int) -> dict[str, list[Pair]]:
    """The answers of each task; the first turn warms up."""
    pairs: dict[str, list[Pair]] = {name: [] for name in (*METHODS, STEP)}
    for repeat in range(repeats + 1):
        for prompt in range(prompts if repeat else 1):
            for task in pairs:
                order = list(builds) if (repeat + prompt) % 2 else list(builds)[::-1]
                found = {name: builds[name].ask({"task": task, "prompt": prompt, "tokens": tokens}) for name in order}
                if repeat:
                    pairs[task].append((found["this"], found["other"]))
    return pairs


def to_table(pairs: dict[str, list[Pair]]) -> str:
    lines = [
        "| | this, ms | other, ms | speed over other (95 %) | by processor time | pairs | rounds | same tokens |",
        "|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for name, answers in pairs.items():
        cells = [f"{1e3 * np.median([pair[side]['seconds'] for pair in answers]):.2f}" for side in (0, 1)]
        for clock in ("seconds", "processor"):
            middle, low, high = median_ratio(np.array([theirs[clock] / ours[clock] for ours, theirs in answers]))
            cells.append(f"{middle:.3f}x ({low:.3f}-{high:.3f})")
        rounds = (sum(pair[side]["rounds"] for pair in answers) for side in (0, 1))
        same = all(ours["tokens"] == theirs["tokens"] for ours, theirs in answers)
        cells += [str(len(answers)), " / ".join(map(str, rounds)), "yes" if same else "**no**"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def median_ratio(ratio_N: np.ndarray) -> tuple[float, float, float]:
    """The median and the ends of its 95 % interval."""
    drawn = np.random.default_rng(0).integers(len(ratio_N), size=(BOOTSTRAP, len(ratio_N)))
    low, high = np.percentile(np.median(ratio_N[drawn], axis=1), [2.5, 97.5])
    return float(np.median(ratio_N)), float(low), float(high)


def work(target: str, head: str) -> None:
    """Answers each line on stdin, with the code of the checkout that PYTHONPATH names."""
    import graft_inference
    from graft_inference import GraftEngine, paper_policy

    if not Path(graft_inference.__file__).is_relative_to(Path.cwd()):
        sys.exit(f"{graft_inference.__file__} is not of the checkout in {Path.cwd()}")
    # Which layers are packed is chosen by timing them, and chance would have the builds choose differently.
    engine = GraftEngine.from_pretrained(head, target, "cpu", "float32", packed=False)
    policy = paper_policy(*POLICY)
    plans = {"eagle3": policy.eagle3, "graft": policy.graft}
    step = train_step()
    for line in sys.stdin:
        command = json.loads(line)
        started, processor = time.perf_counter(), time.process_time()
        if command["task"] == STEP:
            step()
            found = {"seconds": time.perf_counter() - started, "rounds": 1, "tokens": []}
        else:
            generator = torch.Generator().manual_seed(command["prompt"])
            prompt_S = torch.randint(engine.target.config.vocab_size, (PROMPT,), generator=generator)
            method = command["task"]
            out = engine.generate(prompt_S, command["tokens"], method=method, plan=plans.get(method))
            emitted = out.sequences[0, PROMPT:].tolist()
            per_token = out.stats.decode_seconds / max(len(emitted) - 1, 1)
            found = {"seconds": per_token, "rounds": out.stats.rounds, "tokens": emitted}
        found["processor"] = time.process_time() - processor
        print(json.dumps(found), flush=True)


def train_step() -> Callable[[], None]:
    """One optimizer step of a head, as the checkout's own `train_step.py` makes it."""
    spec = importlib.util.spec_from_file_location("train_step", "benchmarks/train_step.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.make_step("fast", module.Shapes(argparse.Namespace(**STEP_SIZES), torch.device("cpu")))


if __name__ == "__main__":
    main()
