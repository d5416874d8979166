"""A head's files as engines load them: in the bundle, and where it is pushed while training goes on."""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from graft_inference.files import read_json, read_safetensors
from graft_inference.heads.checkpoint import CONFIG_FILE, OF_SPECULATORS, WEIGHTS_FILE, Verifier, save_files
from graft_inference.heads.families import Head, save_any_head
from graft_train.config.target import TargetConfig
from graft_train.data.target import target_path, whole_config


def head_writer(target: TargetConfig) -> Callable[[Head, Path], None]:
    """What writes a head of this run into a directory: in its target's dtype, and with its target's name.

    SGLang computes a head in the head's own dtype, which must be the target's. A target whose checkpoint does not say
    its dtype leaves the head's.
    """
    path = target_path(target)
    whole = whole_config(path)
    dtype = whole.dtype or whole.get_text_config().dtype
    name = target.name_or_path or str(path)
    place = Path(name).expanduser()
    verifier = Verifier(str(place.resolve()) if place.exists() else name, tuple(whole.architectures or ()))

    def write(head: Head, directory: Path) -> None:
        save_any_head(head if dtype is None else head.to(dtype), directory, verifier)

    return write


def write_apart(bundle: Path, directory: Path) -> None:
    """Writes an EAGLE-3 head alone, for OpenVINO's converter, which makes ids of a d2t and t2d that are not there.

    The head is the same: a d2t of zeros and a t2d of ones say that it drafts the whole vocabulary.
    """
    config, tensors = read_json(bundle / CONFIG_FILE), read_safetensors(bundle / WEIGHTS_FILE)
    if "d2t" not in tensors:
        tensors["d2t"] = torch.zeros(config["draft_vocab_size"], dtype=torch.int64)
        tensors["t2d"] = torch.ones(config["vocab_size"], dtype=torch.bool)
    flat = {name: value for name, value in config.items() if name not in OF_SPECULATORS}
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".") as aside:
        save_files(Path(aside) / "head", tensors, flat)
        shutil.rmtree(directory, ignore_errors=True)
        (Path(aside) / "head").rename(directory)
