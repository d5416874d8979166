"""Linear layers prepacked for oneDNN, which on many CPUs beat the stock product at small batch sizes."""

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

_ROWS = (1, 8)
_REPEATS = 15


def pack_linears(module: nn.Module) -> list[str]:
    """Replaces a module's linear layers by prepacked ones where these are faster on this CPU.

    Whether they are depends on the processor and the shape. So each shape is timed once, with one token and with eight.
    Weights stay where they are. Does nothing on other devices, or where the build of torch lacks the operator.

    Returns:
        Names of the packed layers.
    """
    if not _available():
        return []
    faster: dict[tuple, bool] = {}
    packed = []
    for name, layer in module.named_modules():
        if type(layer) is not nn.Linear or layer.weight.device.type != "cpu" or not packs(layer.weight.dtype):
            continue
        shape = (*layer.weight.shape, layer.weight.dtype)
        product = _packed_product(layer)
        if shape not in faster:
            faster[shape] = _seconds(product, layer) < 0.9 * _seconds(layer.forward, layer)
        if faster[shape]:
            layer.forward = product  # type: ignore[method-assign, assignment]
            packed.append(name)
    return packed


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


def _packed_product(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach())
    bias = None if layer.bias is None else layer.bias.detach()

    def product(input_BSH: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(input_BSH, weight, bias, "none", [], "")

    return product


@torch.inference_mode()
def _seconds(product: Callable[[Tensor], Tensor], layer: nn.Linear) -> float:
    """Sum over row counts of the least time of one product."""
    total = 0.0
    for rows in _ROWS:
        input_BSH = torch.zeros(1, rows, layer.in_features, dtype=layer.weight.dtype)
        times = []
        for _ in range(_REPEATS):
            start = time.perf_counter()
            product(input_BSH)
            times.append(time.perf_counter() - start)
        total += min(times)
    return total
