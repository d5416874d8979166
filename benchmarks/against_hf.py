"""transformers' own ways to generate beside ours, on the same prompts of a run.

    python benchmarks/against_hf.py --run runs/quickstart      (or benchmarks/round.py --against hf)

Interleaved per prompt; the order turns with every repeat. transformers' contestants: `generate` with its dynamic cache,
with a static cache and compiled, prompt lookup, and assisted decoding with the first layers of the target as the
assistant (`assistant_early_exit`). tokens/s is of decoding: for `generate`, whose prefill cannot be told apart from
outside, the time of a call for one token is taken off. Lossless: the tokens of the dynamic cache's `generate`.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, CompileConfig, GenerationConfig

from graft_inference import GraftEngine
from graft_train.data.samples import read_samples
from graft_train.device import describe_device

OURS = ("autoregressive", "eagle3", "graft")
LOOKUP = 10
"""`prompt_lookup_num_tokens`: the value of transformers' documentation."""


@dataclass
class Contestant:
    """One way to continue a prompt: `run(prompt, tokens)` gives the new tokens and the seconds of decoding them.

    Attributes:
        speeds: tokens/s, one a prompt and repeat.
        same: whether each output was the reference's.
        failed: why it was left out, if it was.
    """

    run: Callable[[Tensor, int], tuple[list[int], float]]
    speeds: list[float] = field(default_factory=list)
    same: list[bool] = field(default_factory=list)
    failed: str = ""


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--run", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--exit-layer", type=int, help="layers of the assistant; default: a quarter of the target's")
    parser.add_argument("--no-compile", action="store_true", help="leave the compiled static cache out")
    arguments = parser.parse_args(given)
    torch.set_num_threads(arguments.threads)
    samples = read_samples(arguments.run / "data" / "samples.jsonl", "evaluation")[: arguments.prompts]
    # The longest first: a static cache keeps its size from there on, and what was compiled for it holds.
    samples.sort(key=lambda sample: -len(sample.prompt_ids))
    prompts = [torch.tensor([sample.prompt_ids], device=arguments.device) for sample in samples]
    engine = GraftEngine.from_pretrained(
        arguments.run / "bundle", arguments.run / "target", arguments.device, arguments.dtype
    )
    ends = sorted(engine.eos_token_ids)
    engine.target.model.generation_config = GenerationConfig()
    contestants = transformers_ways(arguments.run / "target", arguments, ends)
    contestants |= {method: Contestant(our_way(engine, method)) for method in OURS}
    race(contestants, prompts, arguments.max_new_tokens, arguments.repeats)
    device = describe_device(engine.target.device)
    title = (
        f"{device['name']}, {device['threads']} threads, torch {device['torch']}, transformers "
        f"{device['transformers']}; {arguments.dtype}, {len(prompts)} prompts, {arguments.max_new_tokens} new tokens, "
        f"{arguments.repeats} repeats"
    )
    Console(width=140).print(to_table(contestants, title))


def transformers_ways(path: Path, arguments: argparse.Namespace, ends: list[int]) -> dict[str, Contestant]:
    """Ways of an untouched model, each with a copy of its own: compilation leaves traces."""

    def load() -> Any:
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, arguments.dtype))
        model.generation_config = GenerationConfig(eos_token_id=ends or None, pad_token_id=0)
        return model.to(arguments.device).eval()

    compiling = CompileConfig()
    compiling._compile_all_devices = True  # or compilation would be left out on a CPU without a word
    model = load()
    layers = arguments.exit_layer or max(1, model.config.get_text_config().num_hidden_layers // 4)
    ways = {
        "generate": Contestant(their_way(model)),
        "generate, static, compiled": Contestant(
            their_way(load(), cache_implementation="static", compile_config=compiling)
        ),
        f"prompt lookup ({LOOKUP})": Contestant(their_way(model, prompt_lookup_num_tokens=LOOKUP)),
        f"assisted by {layers} layers": Contestant(their_way(model, assistant_early_exit=layers)),
    }
    if arguments.no_compile:
        ways["generate, static, compiled"].failed = "left out by --no-compile"
    return ways


def their_way(model: Any, **options: Any) -> Callable[[Tensor, int], tuple[list[int], float]]:
    def timed(prompt_1S: Tensor, tokens: int) -> tuple[list[int], float]:
        start = now(model.device)
        out = model.generate(
            prompt_1S, attention_mask=torch.ones_like(prompt_1S), max_new_tokens=tokens, do_sample=False, **options
        )
        return out[0, prompt_1S.shape[1] :].tolist(), now(model.device) - start

    def run(prompt_1S: Tensor, tokens: int) -> tuple[list[int], float]:
        found, seconds = timed(prompt_1S, tokens)
        _, first = timed(prompt_1S, 1)
        return found, seconds - first

    return run


def our_way(engine: GraftEngine, method: str) -> Callable[[Tensor, int], tuple[list[int], float]]:
    def run(prompt_1S: Tensor, tokens: int) -> tuple[list[int], float]:
        out = engine.generate(prompt_1S, tokens, method=method)
        return out.sequences[0, prompt_1S.shape[1] :].tolist(), out.stats.decode_seconds

    return run


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def race(contestants: dict[str, Contestant], prompts: list[Tensor], tokens: int, repeats: int) -> None:
    """Times all of them; the first round of everything, which compiles and warms up, does not count."""
    names = list(contestants)
    expected: list[list[int]] = []
    for repeat in tqdm(range(repeats + 1), unit="repeat"):
        for index, prompt in enumerate(prompts):
            turn = (index + repeat) % len(names) if repeat else 0
            for name in names[turn:] + names[:turn]:
                contestant = contestants[name]
                if contestant.failed:
                    continue
                try:
                    found, seconds = contestant.run(prompt, tokens)
                except Exception as error:  # a way that this device or version does not have
                    contestant.failed = " ".join(f"{type(error).__name__}: {error}".split())[:100]
                    continue
                if name == names[0] and not repeat:
                    expected.append(found)
                contestant.same.append(found == expected[index])
                if repeat and len(found) > 1:
                    contestant.speeds.append((len(found) - 1) / seconds)


def to_table(contestants: dict[str, Contestant], title: str) -> Table:
    table = Table(title=title)
    for column in ("", "tokens/s", "quartiles", "over generate", "over our autoregressive", "lossless"):
        table.add_column(column, justify="right" if column else "left")
    base, own = (contestants[name].speeds for name in ("generate", "autoregressive"))
    for name, found in contestants.items():
        if found.failed or not found.speeds:
            table.add_row(name, "-", "", "", "", found.failed or "every prompt ended at once")
            continue
        low, _, high = quantiles(found.speeds, n=4)
        # Of the same prompt and repeat: what slowed the machine down slowed down both.
        ratios = [
            f"{median(ours / theirs for ours, theirs in zip(found.speeds, other, strict=True)):.2f}x"
            for other in (base, own)
        ]
        lossless = "yes" if all(found.same) else f"{sum(found.same) / len(found.same):.0%} of the outputs"
        table.add_row(name, f"{median(found.speeds):.1f}", f"{low:.1f}-{high:.1f}", *ratios, lossless)
    return table


if __name__ == "__main__":
    main()
