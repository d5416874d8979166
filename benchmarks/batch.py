"""How much faster a batch of prompts is decoded together than one prompt after the other.

    python benchmarks/batch.py [--run runs/quickstart] [--batches 1 2 4 8]

Prompts of the evaluation split, cut into batches; both ways take turns, batch by batch. Speed is new tokens over
decode time, the prefill not counted; the ratio is over pairs of the same batch, with its quartiles. Output is checked
to be the same.
"""

import argparse
from pathlib import Path
from statistics import median, quantiles

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from graft_inference import METHODS, GraftEngine
from graft_train.data.samples import read_samples
from graft_train.device import describe_device


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--run", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--batches", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["graft", "eagle3", "autoregressive"])
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args()
    engine = GraftEngine.from_pretrained(
        arguments.run / "bundle", arguments.run / "target", arguments.device, arguments.dtype
    )
    samples = read_samples(arguments.run / "data" / "samples.jsonl", "evaluation")[: arguments.prompts]
    prompts = [torch.tensor(sample.prompt_ids) for sample in samples]
    device = describe_device(engine.target.device)
    table = Table(title=f"{device['name']}, {device['threads']} threads, {arguments.new_tokens} new tokens a prompt")
    for name in ("method", "batch", "one by one, tokens/s", "together, tokens/s", "ratio (quartiles)", "same output"):
        table.add_column(name, justify="left" if name == "method" else "right")
    for method in arguments.methods:
        for size in arguments.batches:
            pairs = [
                both(engine, prompts[start : start + size], method, arguments.new_tokens, turn=start // size + repeat)
                for repeat in range(arguments.repeats + 1)
                for start in range(0, len(prompts) - size + 1, size)
            ][len(prompts) // size :]  # the first round of each warms up
            apart, together = (median(pair[way] for pair in pairs) for way in (0, 1))
            low, middle, high = quantiles([pair[1] / pair[0] for pair in pairs], n=4)
            same = f"{100 * sum(pair[2] for pair in pairs) / len(pairs):.0f} %"
            ratio = f"{middle:.2f}x ({low:.2f}-{high:.2f})"
            table.add_row(method, str(size), f"{apart:.1f}", f"{together:.1f}", ratio, same)
    Console(width=140).print(table)


def both(
    engine: GraftEngine, prompts: list[Tensor], method: str, new_tokens: int, turn: int
) -> tuple[float, float, bool]:
    """Tokens per second one by one and together, in turning order, and whether every token is the same."""
    speeds, found = {}, {}
    for way in ("apart", "together") if turn % 2 else ("together", "apart"):
        groups = [prompts] if way == "together" else [[prompt] for prompt in prompts]
        outs = [engine.generate(group, new_tokens, method=method, pad_token_id=0) for group in groups]
        tokens = sum(out.stats.emitted - out.stats.prompts for out in outs)
        speeds[way] = tokens / sum(out.stats.decode_seconds for out in outs)
        counts = [stats.emitted for out in outs for stats in out.each]
        width = max(map(len, prompts)) if way == "together" else None
        rows = [row for out in outs for row in out.sequences]
        starts = [width or len(prompt) for prompt in prompts]
        found[way] = [r[s : s + n].tolist() for r, s, n in zip(rows, starts, counts, strict=True)]
    return speeds["apart"], speeds["together"], found["apart"] == found["together"]


if __name__ == "__main__":
    main()
