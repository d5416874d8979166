"""Heads from elsewhere: published in any dialect, or in a training's checkpoint; held against the run's target."""

from pathlib import Path
from typing import Any

import torch

from graft_inference.bundle import resolve
from graft_inference.errors import GraftError
from graft_inference.heads.families import Head, check_head, drop_copies, load_any_head, possible_copies
from graft_train.data.states import PackedTarget
from graft_train.trained import is_training_checkpoint, trained_head


def published_path(place: str) -> Path:
    """Where the files of `head.init_from` lie.

    Args:
        place: a directory, or a Hub id, which is downloaded.

    Raises:
        GraftError: neither.
    """
    try:
        return resolve(Path(place).expanduser())
    except GraftError as error:
        raise GraftError(f"head.init_from: {error}") from error


def published_head(place: str, target: Any) -> Head:
    """A head of any family and dialect, in the dtype it was saved in, on the CPU.

    Args:
        place: as in `published_path`.
        target: the (text) configuration of the target that it is for.

    Raises:
        GraftError: no head there that can be read, or one of another target.
    """
    return head_of(place, published_path(place), target)


def head_of(place: str, path: Path, target: Any) -> Head:
    """The same where `published_path` has found it already."""
    try:
        head = trained_head(path) if is_training_checkpoint(path) else load_any_head(path, target.num_hidden_layers)
        check_head(head.config, target)
    except GraftError as error:
        raise GraftError(f"head.init_from={place}: {error}") from error
    return head


def share_with(head: Head, target: PackedTarget) -> None:
    """Drops a head's copies of the target's embeddings and lm_head, which training reads in any case.

    Raises:
        GraftError: they are not the target's.
    """
    if not possible_copies(head):
        return
    ids_V = torch.arange(head.config.vocab_size, device=target.model.device)
    drop_copies(head, target.embed(ids_V).to("cpu"), target.lm_head_VH.to("cpu"))
    if own := possible_copies(head):
        raise GraftError(
            f"the head of head.init_from has {' and '.join(own)} of its own, and training reads the target's: go on "
            "from a head that shares them"
        )
