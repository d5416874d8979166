"""Answers, states and corpus from one run of the target, against three passes over the same tokens.

    python benchmarks/answers.py [--run runs/quickstart] [--prompts 48] [--new-tokens 64] [--turns 3]

Three passes, as before there was one: transformers' `generate` in static batches, the states that `distill` keeps in
memory, and the target's top k for `build_corpus`. One pass: `regenerate.states=true`, then states and pairs read from
what it kept. Both ways take turns over the same prompts, greedily, each with a target of its own that is loaded before.
Peak memory is that of a process for each way, the loading included.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from transformers import AutoTokenizer, GenerationConfig

from graft_train.build_corpus.captured import find_captured
from graft_train.build_corpus.pairs import counted, predicted_pairs
from graft_train.config import Config
from graft_train.config.corpus import CorpusConfig
from graft_train.config.head import HeadTrainConfig
from graft_train.config.regenerate import RegenerateConfig
from graft_train.config.target import TargetConfig
from graft_train.data.prompts import Prompt
from graft_train.data.samples import Sample, append_samples, read_samples
from graft_train.data.states import PackedTarget
from graft_train.data.target import load_target, target_path
from graft_train.device import describe_device
from graft_train.distill.batches import TokenSample, to_tensors
from graft_train.distill.state_source import memory_states, states_directory
from graft_train.regenerate import end_ids
from graft_train.regenerate.capture import StateShards, captured_settings
from graft_train.regenerate.in_process import answers, plain_engine
from graft_train.regenerate.static_batches import PAD, answer

Seconds = dict[str, float]
WAYS = ("three passes", "one pass")
STAGES = ("answers", "states", "corpus")


class ThreePasses:
    """What the stages did one after the other."""

    def __init__(self, config: Config, ends: set[int]) -> None:
        self.config, self.model = config, load_target(config.target)
        self.model.generation_config = GenerationConfig(eos_token_id=sorted(ends), pad_token_id=PAD)
        self.layers = tuple(captured_settings(config.head, config.target)["aux_layer_ids"])

    def run(self, prompts: list[Prompt], seconds: Seconds) -> list[Sample]:
        settings, asked = self.config, self.config.regenerate
        ordered = sorted(prompts, key=lambda prompt: len(prompt.ids))
        batches = [ordered[start : start + asked.batch] for start in range(0, len(ordered), asked.batch)]
        samples = [
            sample
            for batch in batches
            for sample in timed(
                seconds, "answers", lambda batch=batch: answer(self.model, batch, 0, settings.regenerate, settings.seed)
            )
        ]
        target = PackedTarget(self.model, self.layers)
        rows = tensors(samples, settings)
        timed(seconds, "states", lambda: memory_states(target, rows, settings.head.batch_tokens))
        target.release()
        learned = counted(samples, settings.corpus.prompts)
        k, batch_tokens = settings.corpus.successors, settings.corpus.batch_tokens
        timed(seconds, "corpus", lambda: list(predicted_pairs(self.model, learned, k, batch_tokens)))
        return samples


class OnePass:
    """What they do with `regenerate.states=true`."""

    def __init__(self, config: Config, ends: set[int]) -> None:
        self.config, self.model = config, load_target(config.target)
        self.layers = tuple(captured_settings(config.head, config.target)["aux_layer_ids"])
        self.engine = plain_engine(self.model, self.layers, ends)

    def run(self, prompts: list[Prompt], seconds: Seconds) -> list[Sample]:
        with tempfile.TemporaryDirectory() as run:
            self.config.run_dir = run
            samples = timed(seconds, "answers", lambda: self._answer(prompts, Path(run) / "data" / "samples.jsonl"))
            timed(seconds, "states", self._read_states)
            timed(seconds, "corpus", lambda: self._pairs(samples))
        return samples

    def _answer(self, prompts: list[Prompt], path: Path) -> list[Sample]:
        path.parent.mkdir()
        shards = StateShards(path.parent / "states", self.model, self.config.head)
        samples = []
        for sample, states_SE in answers(self.engine, list(enumerate(prompts)), self.config.regenerate, 0):
            assert states_SE is not None
            shards.add(sample, states_SE)
            samples.append(sample)
        shards.flush()
        with path.open("ab") as file:
            append_samples(file, samples)
        shards.finish(self.config.target, path, self.layers)
        return samples

    def _read_states(self) -> None:
        """All of them once, as an epoch of training does."""
        for path in sorted(states_directory(self.config.run_dir).glob("*.safetensors")):
            load_file(path)

    def _pairs(self, samples: list[Sample]) -> None:
        captured = find_captured(self.config, self.model)
        assert captured is not None
        list(captured.pairs(counted(samples, self.config.corpus.prompts), self.config.corpus.successors))


def tensors(samples: list[Sample], config: Config) -> list[TokenSample]:
    return to_tensors(samples, config.head.max_length, 1 << 30)


def timed(seconds: Seconds, name: str, work: Callable[[], Any]) -> Any:
    start, of_processor = time.perf_counter(), time.process_time()
    found = work()
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start
    seconds["cpu"] = seconds.get("cpu", 0.0) + time.process_time() - of_processor
    return found


def configured(arguments: argparse.Namespace) -> Config:
    return Config(
        target=TargetConfig(name_or_path=str(arguments.run / "target"), dtype=arguments.dtype, device="cpu"),
        regenerate=RegenerateConfig(
            states=True, batch=arguments.batch, max_new_tokens=arguments.new_tokens, temperatures=[0.0]
        ),
        head=HeadTrainConfig(states="disk", max_length=512, batch_tokens=2048),
        corpus=CorpusConfig(successors=8, batch_tokens=4096),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--run", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--prompts", type=int, default=48, help="of a turn")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--only", choices=WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    config = configured(arguments)
    ends = end_ids(target_path(config.target), AutoTokenizer.from_pretrained(target_path(config.target)))
    samples = read_samples(arguments.run / "data" / "samples.jsonl", "train")
    prompts = [Prompt(sample.id, sample.prompt_ids) for sample in samples]
    turns = [prompts[start : start + arguments.prompts] for start in range(0, len(prompts), arguments.prompts)]
    makers = {"three passes": ThreePasses, "one pass": OnePass}
    if arguments.only:
        makers[arguments.only](config, ends).run(turns[0], {})
        # Not getrusage's, which begins at the peak of the process that started this one.
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        print(f"peak {int(status['VmHWM'].split()[0]) / 1024}")
        return
    ways = {name: make(configured(arguments), ends) for name, make in makers.items()}
    measured: dict[str, list[Seconds]] = {name: [] for name in WAYS}
    same = tokens = 0
    for turn, chosen in enumerate(turns[: arguments.turns]):
        found = {}
        for name in WAYS if turn % 2 else reversed(WAYS):
            seconds: Seconds = {}
            found[name] = {sample.id: sample for sample in ways[name].run(chosen, seconds)}
            measured[name].append(seconds)
        same += sum(found[WAYS[0]][key].answer_ids == found[WAYS[1]][key].answer_ids for key in found[WAYS[0]])
        tokens += sum(len(sample.answer_ids) for sample in found[WAYS[1]].values())
    report(arguments, measured, f"{same} of {arguments.turns * arguments.prompts} answers the same, {tokens} tokens")


def report(arguments: argparse.Namespace, measured: dict[str, list[Seconds]], caption: str) -> None:
    device = describe_device(torch.device("cpu"))
    title = f"{device['name']}, {device['threads']} threads, torch {device['torch']}, {arguments.dtype}"
    table = Table(title=title, caption=caption, box=SIMPLE_HEAD)
    for column in ("way", "answers s", "states s", "corpus s", "samples/s", "least to most", "CPU s", "peak MiB"):
        table.add_column(column, justify="left" if column == "way" else "right")
    speeds = {
        name: [arguments.prompts / sum(one[part] for part in STAGES) for one in turns]
        for name, turns in measured.items()
    }
    for name, turns in measured.items():
        parts = [f"{median(one[part] for one in turns):.1f}" for part in (*STAGES, "cpu")]
        cpu = parts.pop()
        spread = f"{min(speeds[name]):.2f} to {max(speeds[name]):.2f}"
        table.add_row(name, *parts, f"{median(speeds[name]):.2f}", spread, cpu, f"{peak_mib(name):.0f}")
    Console(width=130).print(table)
    ratios = [one / three for three, one in zip(*speeds.values(), strict=True)]
    work = [three["cpu"] / one["cpu"] for three, one in zip(*measured.values(), strict=True)]
    for name, found in (("samples per second", ratios), ("samples per CPU second", work)):
        print(f"{name}, one pass / three: {median(found):.2f}x, {min(found):.2f}x to {max(found):.2f}x by turn")


def peak_mib(way: str) -> float:
    command = [sys.executable, *sys.argv, "--only", way]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return float(said.splitlines()[-1].removeprefix("peak "))


if __name__ == "__main__":
    main()
