"""Linear layers prepacked for oneDNN, which on many CPUs beat the stock product at small batch sizes.

Layers that read the same states, such as the projections to queries, keys and values, become one product: one call
less for each of them, which counts where a call takes microseconds and its weights hardly more.
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .model import Target

Product = Callable[[Tensor], Tensor]

_ROWS = (1, 8)
_REPEATS = 15


def pack_target(target: Target) -> list[str]:
    """`pack_linears` for a target on one device; which of its layers read the same states is seen in a pass of it."""
    if not _available():
        return []
    return pack_linears(target.model, _sharing(target))


def pack_linears(module: nn.Module, sharing: Sequence[Sequence[nn.Linear]] = ()) -> list[str]:
    """Replaces a module's linear layers by prepacked ones where these are faster on this CPU.

    Whether they are depends on the processor and the shapes. So each set of shapes is timed once, with one token and
    with eight. Weights stay where they are. Does nothing on other devices, or where the build of torch lacks the
    operator.

    Args:
        sharing: layers that read the same tensor, one right after the other in every pass.

    Returns:
        Names of the packed layers.
    """
    if not _available():
        return []
    together = {layer for layers in sharing for layer in layers}
    groups = [*sharing, *([layer] for layer in _packable(module) if layer not in together)]
    faster: dict[tuple, bool] = {}
    packed: set[nn.Module] = set()
    for layers in groups:
        shapes = tuple((*layer.weight.shape, layer.weight.dtype) for layer in layers)
        products = _packed_products(layers)
        if shapes not in faster:
            stock = _seconds([layer.forward for layer in layers], layers[0])
            faster[shapes] = _seconds(products, layers[0]) < 0.9 * stock
        if faster[shapes]:
            packed.update(layers)
            for layer, product in zip(layers, products, strict=True):
                layer.forward = product  # type: ignore[method-assign, assignment]
    return [name for name, layer in module.named_modules() if layer in packed]


def packs(dtype: torch.dtype) -> bool:
    """Whether oneDNN packs weights of this type on this CPU: bfloat16 takes AVX-512 or AVX-NE-CONVERT."""
    if dtype != torch.bfloat16:
        return dtype == torch.float32
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _available() -> bool:
    # Private operators: any build may lack them.
    return torch.backends.mkldnn.is_available() and all(
        hasattr(torch.ops.mkldnn, name) for name in ("_reorder_linear_weight", "_linear_pointwise")
    )


def _packable(module: nn.Module) -> list[nn.Linear]:
    linears = [layer for layer in module.modules() if isinstance(layer, nn.Linear) and type(layer) is nn.Linear]
    return [layer for layer in linears if layer.weight.device.type == "cpu" and packs(layer.weight.dtype)]


@dataclass(frozen=True)
class _Read:
    """A layer was called with this tensor, whose values were these: it may be changed in place afterwards."""

    layer: nn.Linear
    states: Tensor
    values: Tensor


def _sharing(target: Target) -> list[list[nn.Linear]]:
    """Linear layers of one kind that read the same values of a tensor, one right after the other, in a pass.

    A layer that is called more often in the pass shares nothing.
    """
    reads = _reads(target)
    calls = Counter(read.layer for read in reads)
    groups: list[list[nn.Linear]] = []
    before: _Read | None = None
    for read in reads:
        once = before is not None and calls[before.layer] == calls[read.layer] == 1
        if before is not None and once and _same_input(before, read) and _kind(before.layer) == _kind(read.layer):
            groups[-1].append(read.layer)
        else:
            groups.append([read.layer])
        before = read
    return [layers for layers in groups if len(layers) > 1]


@torch.inference_mode()
def _reads(target: Target) -> list[_Read]:
    """What linear layers read in a pass of the target over two tokens, in the order of their calls."""
    reads: list[_Read] = []

    def note(layer: Any, args: Any) -> None:
        reads.append(_Read(layer, args[0], args[0].clone()))

    hooks = [layer.register_forward_pre_hook(note) for layer in _packable(target.model)]
    try:
        if hooks:
            target.prefill(torch.zeros(2, dtype=torch.long, device=target.device), target.new_cache(2))
    finally:
        for hook in hooks:
            hook.remove()
    return reads


def _same_input(one: _Read, other: _Read) -> bool:
    return one.states is other.states and torch.equal(one.values, other.values)


def _kind(layer: nn.Linear) -> tuple[torch.dtype, bool]:
    return layer.weight.dtype, layer.bias is None


class _Together:
    """One product for several layers, each of which takes its part when it is called with the same tensor.

    Nobody may change the tensor between these calls. The parts are kept with the tensor that they are of: it is the
    same object, so another pass, or another thread, is never handed them. A layer that finds no part of its own
    computes all of them anew.
    """

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
        self._product = _product(
            torch.cat([layer.weight.detach() for layer in layers]), torch.cat(biases) if biases else None
        )
        self._sizes = [layer.out_features for layer in layers]
        self._left: tuple[Tensor, dict[int, Tensor]] | None = None

    def part(self, index: int, input_BSH: Tensor) -> Tensor:
        left = self._left
        if left is None or left[0] is not input_BSH or index not in left[1]:
            parts = dict(enumerate(self._product(input_BSH).split(self._sizes, dim=-1)))
        else:
            parts = left[1]
        part = parts.pop(index)
        self._left = (input_BSH, parts) if parts else None  # keeps no memory from pass to pass
        return part


def _packed_products(layers: Sequence[nn.Linear]) -> list[Product]:
    if len(layers) == 1:
        return [_product(layers[0].weight.detach(), None if layers[0].bias is None else layers[0].bias.detach())]
    together = _Together(layers)
    return [partial(together.part, index) for index in range(len(layers))]


def _product(weight_OH: Tensor, bias_O: Tensor | None) -> Product:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight_OH)

    def product(input_BSH: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(input_BSH, packed, bias_O, "none", [], "")

    return product


@torch.inference_mode()
def _seconds(products: Sequence[Product], like: nn.Linear) -> float:
    """Sum over row counts of the least time of the products of one tensor."""
    total = 0.0
    for rows in _ROWS:
        input_BSH = torch.zeros(1, rows, like.in_features, dtype=like.weight.dtype)
        times = []
        for _ in range(_REPEATS):
            start = time.perf_counter()
            for product in products:
                product(input_BSH)
            times.append(time.perf_counter() - start)
        total += min(times)
    return total
