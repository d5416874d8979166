"""The head in a checkpoint of a training: of one process, of several, or of DeepSpeed ZeRO."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graft_inference.errors import GraftError
from graft_inference.files import read_json, read_safetensors
from graft_inference.heads.block.config import BlockHeadConfig
from graft_inference.heads.block.model import BlockHead
from graft_inference.heads.block.view import SlidingWindow
from graft_inference.heads.checkpoint import WEIGHTS_FILE
from graft_inference.heads.eagle3.model import DraftHead, DraftHeadConfig
from graft_inference.heads.families import Head
from graft_train.files import IDENTITY

HEAD = "head."
"""What the names of a head's tensors begin with: it is a part of what is trained."""
OF_ZERO = "pytorch_model"
"""Where accelerate has DeepSpeed write."""


def is_training_checkpoint(path: Path) -> bool:
    return (path / IDENTITY).is_file()


def trained_head(path: Path) -> Head:
    """The head as it was at that step, on the CPU.

    Args:
        path: a directory such as `head.partial/checkpoints/step-00000500`. One of ZeRO holds pickles, as DeepSpeed
            writes them: load only your own.

    Raises:
        GraftError: a file is missing or damaged, or DeepSpeed, which reads its own checkpoints, is not installed.
    """
    shape = read_json(path / IDENTITY, "take another checkpoint")
    try:
        config = _config(shape["head"])
    except (KeyError, TypeError) as error:
        raise GraftError(f"{path / IDENTITY} describes no head ({error!r}): take another checkpoint") from error
    tensors = _of_zero(path) if (path / OF_ZERO).is_dir() else read_safetensors(path / WEIGHTS_FILE)
    own = {name.removeprefix(HEAD): tensor for name, tensor in tensors.items() if name.startswith(HEAD)}
    if isinstance(config, BlockHeadConfig):
        return BlockHead.of_tensors(config, own)
    return DraftHead.of_tensors(config, own)


def _config(values: dict[str, Any]) -> DraftHeadConfig | BlockHeadConfig:
    """The inverse of the configurations' `to_dict`, after JSON."""
    values = values | {"aux_layer_ids": tuple(values["aux_layer_ids"])}
    if "block_size" not in values:
        return DraftHeadConfig(**values)
    sliding = values["sliding"]
    if sliding is not None:
        sliding = SlidingWindow(**sliding | {"layers": tuple(sliding["layers"])})
    return BlockHeadConfig(**values | {"sliding": sliding})


def _of_zero(path: Path) -> dict[str, Tensor]:
    """All tensors in fp32, put together from the shares of the processes."""
    try:
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
    except ImportError as error:
        raise GraftError(f"{path} was written by DeepSpeed, which reads it: pip install deepspeed") from error
    try:
        found: dict[str, Tensor] = get_fp32_state_dict_from_zero_checkpoint(str(path), OF_ZERO)
    except Exception as error:  # damaged pickles fail in whatever way their bytes say
        raise GraftError(f"{path} is incomplete or damaged ({error}): take another checkpoint") from error
    return {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in found.items()
    }
