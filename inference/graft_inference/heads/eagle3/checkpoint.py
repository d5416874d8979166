"""The draft head on disk: `config.json` and `model.safetensors`; `dialects.py` says in which dialects."""

import re
from pathlib import Path
from typing import Any

import torch

from ...errors import GraftError
from ...files import own_file, read_safetensors
from ..checkpoint import REMEDY, WEIGHTS_FILE, Verifier, read_config, save_files
from .dialects import head_config_from_dict, head_config_to_dict, newer_than_sglang, refuse_parallel
from .model import DraftHead, DraftHeadConfig

PICKLED_FILE = "pytorch_model.bin"


def save_head(head: DraftHead, directory: Path, verifier: Verifier | None = None) -> None:
    """Writes the head into `directory`, each file aside and then renamed; other files there stay.

    Args:
        verifier: the target, where its name is known.
    """
    config, tensors = head_config_to_dict(head.config, head.lm_head.weight.dtype, verifier), head.state_dict()
    if newer_than_sglang(head.config):  # every engine that reads such a head knows the layer by this name
        tensors = {re.sub(r"^midlayer\.", "layers.0.", name): tensor for name, tensor in tensors.items()}
    save_files(directory, tensors, config)


def load_head(directory: Path, target_layers: int | None = None) -> DraftHead:
    """Reads a head of either dialect strictly, in the dtype it was saved in, on the CPU.

    Args:
        target_layers: layers of its target, from which follows what a head reads that does not say so.

    Raises:
        GraftError: a file is missing, truncated or corrupt, or the two files do not describe one head.
    """
    directory = Path(directory)
    config = load_head_config(directory, target_layers)
    path, tensors = _read_tensors(directory)
    try:
        refuse_parallel(tensors)
        return DraftHead.of_tensors(config, _our_names(tensors))
    except GraftError as error:
        raise GraftError(f"{path}: {error}; {REMEDY}") from error


def load_head_config(directory: Path, target_layers: int | None = None) -> DraftHeadConfig:
    """The shape of the head in a directory; arguments and errors as `load_head`."""
    return read_config(directory, lambda values: head_config_from_dict(values, target_layers), "a draft head")


def _our_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors under the names of `DraftHead`."""
    return {re.sub(r"^layers\.0\.", "midlayer.", name): tensor for name, tensor in tensors.items()}


def _read_tensors(directory: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """Where the tensors lie, and the tensors."""
    path, pickled = directory / WEIGHTS_FILE, directory / PICKLED_FILE
    if not path.is_file() and pickled.is_file():
        return pickled, _read_pickled(pickled)
    return path, read_safetensors(path, REMEDY)


def _read_pickled(path: Path) -> dict[str, torch.Tensor]:
    """The official heads of EAGLE are such files. Nothing but tensors is read from one: no code runs.

    It is mapped into memory, so that what the pickle says of a tensor's size leads to no byte outside the file.
    """
    try:
        values = torch.load(own_file(path, REMEDY), map_location="cpu", weights_only=True, mmap=True)
    except GraftError:
        raise
    except Exception as error:  # a damaged pickle fails in whatever way its bytes say
        raise GraftError(f"{path} is truncated, corrupt, or holds more than tensors ({error}); {REMEDY}") from error
    if not isinstance(values, dict) or not all(map(_is_plain, values.keys(), values.values())):
        raise GraftError(f"{path} must hold tensors by name, each whole and dense; {REMEDY}")
    return {name: value.clone() for name, value in values.items()}


def _is_plain(name: Any, value: Any) -> bool:
    """Whether a tensor has a number of its own in the file for each of its elements."""
    if not isinstance(name, str) or not isinstance(value, torch.Tensor) or value.layout != torch.strided:
        return False
    return not value.is_quantized and value.is_contiguous() and value.nbytes <= value.untyped_storage().nbytes()
