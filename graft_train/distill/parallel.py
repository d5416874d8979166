"""One process or several, with or without DeepSpeed: what accelerate leaves to us."""

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, InitProcessGroupKwargs, ProjectConfiguration
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from graft_inference.errors import GraftError
from graft_train.accelerator import is_set, new_accelerator
from graft_train.config.head import HeadTrainConfig


def make_accelerator(settings: HeadTrainConfig, device: torch.device, out: Path) -> Accelerator:
    """Follows the environment that the launcher set up.

    Args:
        out: where trackers write what they keep here.

    Raises:
        GraftError: settings that this launch cannot follow.
    """
    _check_trackers(settings.trackers)
    # An earlier stage of this process may have run in another precision, which accelerate keeps for good.
    AcceleratorState._reset_state()
    cpu, deepspeed = device.type == "cpu", is_set("ACCELERATE_USE_DEEPSPEED")
    handlers: list[Any] = [DistributedDataParallelKwargs(broadcast_buffers=False)]
    if cpu and deepspeed:
        # Left alone, DeepSpeed would look for an accelerator's backend and every rank would be rank 0 of 1.
        handlers.append(InitProcessGroupKwargs(backend="gloo"))
    accelerator = new_accelerator(
        # With cpu=True the DeepSpeed plugin would be ignored without a word.
        cpu=cpu and not deepspeed,
        mixed_precision=settings.mixed_precision,
        kwargs_handlers=handlers,
        log_with=settings.trackers or None,
        project_config=ProjectConfiguration(project_dir=str(out)),
    )
    if deepspeed:
        # At stage 3 transformers would load in shares whatever comes next, asked to or not.
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
    if settings.batches_per_step % accelerator.num_processes:
        raise GraftError(
            f"head.batches_per_step={settings.batches_per_step}: so many micro-batches cannot be shared by "
            f"{accelerator.num_processes} processes: set a multiple of them, such as {accelerator.num_processes}"
        )
    if settings.shard_target == "zero3" and zero_stage(accelerator) != 3:
        raise GraftError(
            "head.shard_target=zero3 needs a launch under DeepSpeed ZeRO-3: accelerate launch --config_file "
            "recipes/launch/zero3.yaml recipes/distill.py ..., or head.shard_target=tp"
        )
    if settings.shard_target == "tp" and (accelerator.num_processes == 1 or deepspeed):
        raise GraftError(
            "head.shard_target=tp needs several processes without DeepSpeed: accelerate launch --config_file "
            "recipes/launch/ddp.yaml, or torchrun; with one process target.device_map=auto spreads the target"
        )
    return accelerator


def _check_trackers(names: list[str]) -> None:
    """Raises GraftError for a tracker that accelerate does not know or find: it would leave it out without a word."""
    if not names:
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    installed = [str(tracker) for tracker in get_available_trackers()]
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            known = ", ".join(sorted(LOGGER_TYPE_TO_CLASS))
            raise GraftError(f"head.trackers names {name}, which accelerate does not know: choose of {known}")
        if name not in installed:
            package = name.replace("_", "-")
            raise GraftError(
                f"head.trackers names {name}, which is not installed: pip install {package}, or leave it out"
            )


def zero_stage(accelerator: Accelerator) -> int:
    """DeepSpeed's, 0 without it."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return 0
    return accelerator.state.deepspeed_plugin.zero_stage
