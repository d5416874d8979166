"""A block head on disk: `config.json` and `model.safetensors`; `dialects.py` says in which dialects."""

import warnings
from pathlib import Path

import torch

from ...errors import GraftError
from ...files import read_json, read_safetensors
from ..checkpoint import CONFIG_FILE, MASK_EMBEDDING, REMEDY, WEIGHTS_FILE, Verifier, read_config, save_files
from .config import BlockHeadConfig
from .dialects import block_config_from_dict, block_config_to_dict
from .keys import TIED
from .model import BlockHead

CONFIDENCE = "confidence_head."
PARTS = {
    "mask_hidden": "a learned state in place of the mask token's embedding",
    "candidate_selector.": "the candidate selector of DFlash 2",
    "refiner_head.": "the refiner of XPress",
    "prefix_gru.": "the recurrent pass of Domino",
}
"""Beginnings of tensors that make another network of a head whose configuration may not say so."""


def save_block_head(
    head: BlockHead, directory: Path, dtype: torch.dtype | None = None, verifier: Verifier | None = None
) -> None:
    """Writes the head into `directory`, each file aside and then renamed; other files there stay.

    Args:
        dtype: of the weights; None: the head's. Engines want the target's.
        verifier: the target, where its name is known.
    """
    dtype = dtype or head.fc.weight.dtype
    tensors = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in head.state_dict().items()
    }
    save_files(directory, tensors, block_config_to_dict(head.config, dtype, verifier))


def load_block_config(directory: Path, target_layers: int | None = None) -> BlockHeadConfig:
    """The shape of a DFlash or DSpark head; arguments and errors as `load_block_head`."""
    return read_config(directory, lambda values: block_config_from_dict(values, target_layers), "a block head")


def load_block_head(directory: Path, target_layers: int | None = None) -> BlockHead:
    """Reads a DFlash or DSpark head of either dialect strictly, in the dtype it was saved in, on the CPU.

    A confidence head is left out, which is said: P(accepted) is calibrated here.

    Args:
        target_layers: layers of its target, which speculators' dialect does not say.

    Raises:
        GraftError: a file is missing, truncated or corrupt, the two files do not describe one head, or it is computed
            otherwise.
    """
    config = load_block_config(directory, target_layers)
    if (Path(directory) / MASK_EMBEDDING).exists():
        raise GraftError(f"{directory}: {MASK_EMBEDDING}, an embedding of the mask's own, is not computed here")
    path = Path(directory) / WEIGHTS_FILE
    tensors = read_safetensors(path, REMEDY)
    tied = read_json(Path(directory) / CONFIG_FILE, REMEDY).get(TIED)
    if tied and "embed_tokens.weight" in tensors and "lm_head.weight" not in tensors:
        raise GraftError(
            f"{directory}: {TIED}={tied}, but of its own the head has embeddings alone: add lm_head.weight"
        )
    try:
        return BlockHead.of_tensors(config, _read_tensors(tensors))
    except GraftError as error:
        raise GraftError(f"{path}: {error}; {REMEDY}") from error


def _read_tensors(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Without those that a checkpoint may have and that are not read.

    Raises:
        GraftError: a tensor that would make another network or that no engine loads.
    """
    for name in tensors:
        if part := next((part for start, part in PARTS.items() if name.startswith(start)), None):
            raise GraftError(f"{name}: {part} is not computed here")
    if any(name.startswith(CONFIDENCE) for name in tensors):
        warnings.warn("the head's confidence head is not used: P(accepted) is calibrated from traces", stacklevel=4)
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(CONFIDENCE)}
