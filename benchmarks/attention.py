"""Verification attention in a bucket: one mask over all of it, or a prefix without a mask merged with the rest.

    python benchmarks/attention.py --device cuda --dtype bfloat16

In a captured round the length varies inside a bucket, but the keys below the last bucket's edge, less what a round may
write, are valid at every length that it serves: they need no mask. Their part and the masked rest are merged by
log-sum-exp. Prints medians, interleaved (processor time on a CPU), and the greatest difference between the two.
"""

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from graft_inference.decode.cuda_graph import CudaGraphs
from graft_train.device import describe_device

SLACK = 128
"""Rows that a round may write behind the committed ones."""
REPLAYS = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--heads", type=int, default=8, help="key/value heads")
    parser.add_argument("--groups", type=int, default=4, help="query heads that share one")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=31)
    arguments = parser.parse_args()
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    machine = describe_device(device)
    table = Table(title=f"one layer's attention: {machine['name']}, torch {machine['torch']}, {arguments.dtype}, ms")
    for name in ("bucket", "rows", "masked", "merged", "merged / masked", "greatest difference"):
        table.add_column(name, justify="right")
    for edge, size in ((1024, 1536), (4096, 6144), (16384, 24576)):
        for rows in (16, 64):
            parts = inputs(arguments.heads, arguments.groups * rows, arguments.head_dim, edge, size, device, dtype)
            ways: list[Callable[..., Tensor]] = [masked, merged]
            difference = (masked(*parts) - merged(*parts)).abs().max()
            runners = [runner(way, parts, device) for way in ways]
            times: list[list[float]] = [[], []]
            for _ in range(arguments.repeats):
                for run, taken in zip(runners, times, strict=True):
                    taken.append(run())
            one, two = (1e3 * median(taken) for taken in times)
            table.add_row(f"{size}", f"{rows}", f"{one:.3f}", f"{two:.3f}", f"{two / one:.2f}", f"{difference:.1e}")
    Console(width=120).print(table)


def inputs(
    heads: int, queries: int, width: int, edge: int, size: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """Queries, keys and values of a bucket that is half full between its edges, what is visible, and the free keys."""
    generator = torch.Generator(device).manual_seed(0)
    query, key, value = (
        torch.randn((1, heads, rows, width), generator=generator, device=device, dtype=dtype)
        for rows in (queries, size, size)
    )
    length = (edge + size) // 2 - SLACK
    visible_K = torch.arange(size, device=device) < length
    tree_QN = torch.rand((queries, SLACK), generator=generator, device=device) < 0.2
    visible_QK = visible_K.repeat(queries, 1)
    visible_QK[:, length : length + SLACK] = tree_QN
    return query, key, value, visible_QK, edge - SLACK


def masked(query: Tensor, key: Tensor, value: Tensor, visible_QK: Tensor, free: int) -> Tensor:
    """The reference, and what the engine does."""
    return F.scaled_dot_product_attention(query, key, value, visible_QK)


def merged(query: Tensor, key: Tensor, value: Tensor, visible_QK: Tensor, free: int) -> Tensor:
    """The first `free` keys are visible to all rows."""
    bias_QK = torch.zeros_like(visible_QK[:, free:], dtype=query.dtype).masked_fill_(~visible_QK[:, free:], -torch.inf)
    one, one_lse = attention(query, key[:, :, :free], value[:, :, :free], None)
    two, two_lse = attention(query, key[:, :, free:], value[:, :, free:], bias_QK)
    return two + (one - two) * torch.sigmoid(one_lse - two_lse)[..., None].to(two.dtype)


def attention(query: Tensor, key: Tensor, value: Tensor, bias_QK: Tensor | None) -> tuple[Tensor, Tensor]:
    """Attended values and log-sum-exp, by the device's own kernels."""
    if query.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, attn_mask=bias_QK)
    if bias_QK is None:
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[:2]
    bias = bias_QK.expand(*query.shape[:2], -1, -1)
    out, lse = torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, bias, True)[:2]
    return out, lse[:, :, : query.shape[2]]


def runner(way: Callable[..., Tensor], parts: tuple, device: torch.device) -> Callable[[], float]:
    """Runs it and tells the seconds: on a CPU of the processor, on a GPU those of a graph, as in a captured round."""
    if device.type != "cuda":
        return lambda: seconds_of_cpu(lambda: way(*parts))
    captured = CudaGraphs(device).capture(lambda: [way(*parts)], [])
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def timed() -> float:
        start.record()
        for _ in range(REPLAYS):
            captured.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / REPLAYS

    return timed


def seconds_of_cpu(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


if __name__ == "__main__":
    with torch.inference_mode():
        main()
