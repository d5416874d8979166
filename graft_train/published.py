"""Heads that others have published: found, read in any dialect, and held against the run's target."""

from pathlib import Path
from typing import Any

from graft_inference.bundle import resolve
from graft_inference.errors import GraftError
from graft_inference.heads.families import Head, check_head, load_any_head


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
    path = published_path(place)
    try:
        head = load_any_head(path, target.num_hidden_layers)
        check_head(head.config, target)
    except GraftError as error:
        raise GraftError(f"head.init_from={place}: {error}") from error
    return head
