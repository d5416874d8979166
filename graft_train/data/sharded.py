"""A target shared out over the processes that train with it, so that it may be larger than one device.

- `zero3`: DeepSpeed keeps an equal part of every parameter on each process and puts a layer together while it
  runs. Each process reads rows of its own, but all must run the target equally often.
- `tp`: tensor parallelism by transformers' plan for the family. All processes read the same row together.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

from graft_inference.target.model import is_parallel


def is_shared(model: PreTrainedModel) -> bool:
    """Whether all processes must run the model equally often."""
    return is_parallel(model) or any(map(_is_partitioned, model.parameters()))


def load_zero3(path: Any, dtype: torch.dtype, **settings: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The causal LM in `path`, every parameter shared out while it is read from there; and what was missing.

    It may be called like any other; afterwards nothing else is loaded in shares.
    """
    zero = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    precision = {"bf16": {"enabled": dtype == torch.bfloat16}, "fp16": {"enabled": dtype == torch.float16}}
    loader: Any = AutoModelForCausalLM  # what it returns depends on output_loading_info
    # transformers keeps a weak reference, which holds as long as this one.
    shares = HfDeepSpeedConfig(zero | precision)
    try:
        model, found = loader.from_pretrained(path, dtype=dtype, **settings)
    finally:
        unset_hf_deepspeed_config()
        del shares
    _restore_buffers(model, dtype)
    layers = list(model.get_decoder().layers)
    inside = {id(module) for layer in layers for module in layer.modules()}
    for module in model.modules():
        if module in layers:
            _gather_while_running(module, list(module.parameters()))
        elif id(module) not in inside and module._parameters:
            _gather_while_running(module, list(module.parameters(recurse=False)))
    return model, found


def _restore_buffers(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """DeepSpeed creates all tensors in the parameters' type, and RoPE in bf16 would lose its positions."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        fresh = AutoModelForCausalLM.from_config(model.config, dtype=dtype)
    stored = model.state_dict().keys()
    for name, buffer in fresh.named_buffers():
        if name not in stored:
            owner, _, own = name.rpartition(".")
            module = model.get_submodule(owner)
            setattr(module, own, buffer.to(getattr(module, own).device))


def _gather_while_running(module: nn.Module, parameters: list[nn.Parameter]) -> None:
    running = ExitStack()

    def before(*unused: Any) -> None:
        running.enter_context(whole(parameters))

    def after(*unused: Any) -> None:
        running.close()

    module.register_forward_pre_hook(before)
    module.register_forward_hook(after, always_call=True)


@contextmanager
def whole(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """All of these parameters at hand, to read, where processes hold shares of them; all enter together."""
    missing = [parameter for parameter in parameters if _is_partitioned(parameter) and not parameter.numel()]
    if not missing:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(missing):
        yield


def count_parameters(model: nn.Module) -> int:
    """Of the whole model, however it is shared out."""
    return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in model.parameters())


def held_bytes(model: nn.Module) -> int:
    """What of its parameters is on this process."""
    return sum(_held(parameter).nbytes for parameter in model.parameters())


def _held(parameter: Any) -> torch.Tensor:
    if _is_partitioned(parameter):
        return parameter.ds_tensor
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def _is_partitioned(parameter: Any) -> bool:
    return hasattr(parameter, "ds_id")
