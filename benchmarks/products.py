"""How much of a target's pass is products of matrices, and how fast memory would let them be.

    python benchmarks/products.py --target runs/quickstart/target

Takes turns: a pass of the target as it is served; its linear layers alone, one after the other; and one sum over a
tensor larger than the caches, which says how fast memory is read. Medians, with the middle half.
"""

import argparse
import time
from collections.abc import Callable
from statistics import quantiles

import torch
from torch import Tensor, nn

from graft_inference.bundle import load_target_model
from graft_inference.target.attention import Visibility
from graft_inference.target.model import Target
from graft_inference.target.packed_linear import pack_target
from graft_train.device import describe_device

PROMPT = 128
LARGE = 400 * 2**20
"""Bytes of the tensor that is summed."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--target", required=True)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 16], help="of a pass")
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model, _ = load_target_model(arguments.target, "cpu", arguments.dtype)
    target, layers = Target(model), [layer for layer in model.modules() if type(layer) is nn.Linear]
    pack_target(target)
    print("#", describe_device(torch.device("cpu")), arguments.dtype)
    weights = sum(layer.weight.numel() * layer.weight.element_size() for layer in layers)
    large = torch.ones(LARGE // 4)
    print("| rows | pass, ms | products, ms | memory alone, ms | pass / products |\n|---:|---:|---:|---:|---:|")
    with torch.inference_mode():
        cache = target.new_cache(PROMPT + max(arguments.rows))
        target.prefill(torch.zeros(PROMPT, dtype=torch.long), cache)
        for rows in arguments.rows:
            tokens_N, own_NN = torch.zeros(rows, dtype=torch.long), torch.ones((rows, rows), dtype=torch.bool).tril()
            visible = Visibility(PROMPT + torch.arange(rows), cache.span, own_NN)
            inputs = {
                layer.in_features: torch.randn(1, rows, layer.in_features).to(layer.weight.dtype) for layer in layers
            }
            turns: list[Callable[[], object]] = [
                lambda tokens_N=tokens_N, visible=visible: target.forward(tokens_N, cache, visible),
                lambda inputs=inputs: products(layers, inputs),
                large.sum,
            ]
            whole, alone, summed = timed(turns, arguments.repeats)
            floor = [seconds * weights / LARGE for seconds in summed]
            ratio = [one / other for one, other in zip(whole, alone, strict=True)]
            print(f"| {rows} | {in_words(whole)} | {in_words(alone)} | {in_words(floor)} | {in_words(ratio, 1)} |")


def products(layers: list[nn.Linear], inputs: dict[int, Tensor]) -> None:
    for layer in layers:
        layer(inputs[layer.in_features])


def timed(turns: list[Callable[[], object]], repeats: int) -> list[list[float]]:
    """Seconds of each, all of them in every repeat; the first repeat warms up."""
    found: list[list[float]] = [[] for _ in turns]
    for _ in range(repeats + 1):
        for run, seconds in zip(turns, found, strict=True):
            started = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - started)
    return [seconds[1:] for seconds in found]


def in_words(values: list[float], scale: float = 1e3) -> str:
    low, middle, high = (scale * value for value in quantiles(values, n=4))
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


if __name__ == "__main__":
    main()
