"""Files that others may have made, read strictly, and written so that nobody meets half of one."""

import json
import math
import os
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .errors import GraftError

REMEDY = "export or download it again"
LARGEST_JSON = 64 << 20
"""Bytes. Those of a bundle are smaller by far, and Python takes many times a file's size to hold what is in it."""


def own_file(path: Path, remedy: str = REMEDY) -> Path:
    """The same path, of a file that can be read to its end and belongs to its directory.

    A link is followed within the directory and, as the Hub's cache has them, from `snapshots/COMMIT` to `blobs`.

    Raises:
        GraftError: names the file: it is missing, no regular file (a device or a pipe may never end), or a link to a
            place elsewhere, whose content is none of the directory's.
    """
    try:
        real, home = path.resolve(strict=True), path.parent.resolve()
    except FileNotFoundError as error:
        raise GraftError(f"{path} is missing: the directory is incomplete; {remedy}") from error
    except (OSError, RuntimeError) as error:  # a link that leads to itself
        raise GraftError(f"{path} cannot be read ({error}); {remedy}") from error
    if not real.is_file():
        raise GraftError(f"{path} is no regular file; {remedy}")
    homes = [home, home.parents[1] / "blobs"] if len(home.parents) > 1 and home.parent.name == "snapshots" else [home]
    if not any(one in real.parents for one in homes):
        raise GraftError(f"{path} leads out of its directory, to {real}: put a copy of the file in its place")
    return path


def read_json(path: Path, remedy: str = REMEDY, largest: int = LARGEST_JSON) -> dict[str, Any]:
    """A JSON object whose numbers are all finite.

    Args:
        largest: bytes that it may have.

    Raises:
        GraftError: names the file: it is missing, no JSON, no object, too large to be ours, or what `own_file` raises.
    """
    size = own_file(path, remedy).stat().st_size
    if size > largest:
        raise GraftError(f"{path} has {size >> 20} MiB, and what belongs there is far smaller; {remedy}")
    try:
        values = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise GraftError(f"{path} is not valid JSON ({error}); {remedy}") from error
    if not isinstance(values, dict):
        raise GraftError(f"{path} must hold a JSON object; {remedy}")
    return values


def parse_json(text: str) -> Any:
    """JSON as the standard has it.

    Raises:
        ValueError: another text, two values under one key, or one nested too deeply to be read.
    """
    try:
        return DECODER.decode(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _number(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"{digits} is no number of JSON")
    return number


def _object(items: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(items)
    if len(made) < len(items):
        (twice, _), *_ = Counter(key for key, _ in items).most_common(1)
        raise ValueError(f"the key {twice!r} is there twice")
    return made


DECODER = json.JSONDecoder(parse_float=_number, parse_constant=_number, object_pairs_hook=_object)
"""Python's own takes NaN and Infinity, makes infinity of 1e999, and keeps the last of two values under one key."""


def read_safetensors(path: Path, remedy: str = REMEDY) -> dict[str, Tensor]:
    """Raises GraftError, which names the file: it is missing, truncated or corrupt, or what `own_file` raises."""
    try:
        return load_file(own_file(path, remedy))
    except (OSError, SafetensorError, ValueError) as error:
        raise GraftError(f"{path} is truncated or corrupt ({error}); {remedy}") from error


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Has a file written aside, and renames it once it has reached the disk; where that fails nothing is left of it."""
    aside = path.with_name(f".{path.name}.partial")
    try:
        write(aside)
        with aside.open("rb+") as file:
            os.fsync(file.fileno())
        aside.replace(path)
    except BaseException:
        with suppress(OSError):
            aside.unlink()
        raise
