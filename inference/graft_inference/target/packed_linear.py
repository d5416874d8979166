"""Linear layers prepacked for oneDNN, which on many CPUs beat the stock product at small batch sizes.

Layers that read the same states, such as the projections to queries, keys and values, become one product: one call
less for each of them, which counts where a call takes microseconds and its weights hardly more.
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

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


@torch.inference_mode()
def _sharing(target: Target) -> list[list[nn.Linear]]:
    """Linear layers of one kind that read the same tensor, one right after the other, in a pass of the target."""
    calls: list[tuple[nn.Linear, Tensor]] = []
    layers = _packable(target.model)
    if not layers:
        return []
    hooks = [layer.register_forward_pre_hook(lambda layer, args: calls.append((layer, args[0]))) for layer in layers]
    target.prefill(torch.zeros(2, dtype=torch.long, device=target.device), target.new_cache(2))
    for hook in hooks:
        hook.remove()
    counts = Counter(layer for layer, _ in calls)
    groups: list[list[nn.Linear]] = []
    for (before, last), (layer, states) in pairwise([(nn.Linear(1, 1), torch.empty(0)), *calls]):
        kind, kind_before = ((one.weight.dtype, one.bias is None, counts[one]) for one in (layer, before))
        if states is last and kind == kind_before and counts[layer] == 1:
            groups[-1].append(layer)
        else:
            groups.append([layer])
    return [layers for layers in groups if len(layers) > 1]


class _Together:
    """One product for several layers, each of which takes its part when it is called with the same tensor."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
        self._product = _product(
            torch.cat([layer.weight.detach() for layer in layers]), torch.cat(biases) if biases else None
        )
        self._sizes = [layer.out_features for layer in layers]
        self._input: Tensor | None = None
        self._parts: dict[int, Tensor] = {}

    def part(self, index: int, input_BSH: Tensor) -> Tensor:
        if input_BSH is not self._input or index not in self._parts:
            self._input = input_BSH
            self._parts = dict(enumerate(self._product(input_BSH).split(self._sizes, dim=-1)))
        part = self._parts.pop(index)
        if not self._parts:
            self._input = None  # keeps no memory from pass to pass
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
