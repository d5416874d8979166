"""One process or several, with or without DeepSpeed: what accelerate leaves to us."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, InitProcessGroupKwargs
from torch import nn
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from graft_inference import GraftError
from graft_train.distill.config import HeadTrainConfig


def make_accelerator(settings: HeadTrainConfig, device: torch.device) -> Accelerator:
    """Follows the environment that the launcher set up.

    Raises:
        GraftError: settings that DeepSpeed cannot follow.
    """
    # An earlier stage of this process may have run in another precision, which accelerate keeps for good.
    AcceleratorState._reset_state()
    cpu, deepspeed = device.type == "cpu", os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    handlers: list[Any] = [DistributedDataParallelKwargs(broadcast_buffers=False)]
    if cpu and deepspeed:
        # Left alone, DeepSpeed would look for an accelerator's backend and every rank would be rank 0 of 1.
        handlers.append(InitProcessGroupKwargs(backend="gloo"))
    accelerator = Accelerator(
        # With cpu=True the DeepSpeed plugin would be ignored without a word.
        cpu=cpu and not deepspeed,
        mixed_precision=settings.mixed_precision,
        kwargs_handlers=handlers,
    )
    if deepspeed:
        # At stage 3 transformers would load the target in shares that only an engine of its own puts together.
        unset_hf_deepspeed_config()
        if settings.optimizer != "adamw":
            raise GraftError(f"head.optimizer={settings.optimizer} does not run under DeepSpeed; set adamw")
        accelerator.state.deepspeed_plugin.deepspeed_config |= {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,  # the loop marks the last batch of a step itself
            "gradient_clipping": settings.clip,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
    return accelerator


def zero_stage(accelerator: Accelerator) -> int:
    """DeepSpeed's, 0 without it."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return 0
    return accelerator.state.deepspeed_plugin.zero_stage


@contextmanager
def whole(accelerator: Accelerator, module: nn.Module) -> Iterator[None]:
    """All parameters at hand on every process, to read. ZeRO-3 keeps only a share of each elsewhere."""
    if zero_stage(accelerator) < 3:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(module.parameters())):
        yield
