"""Files that others may have made, read strictly, and written so that nobody meets half of one."""

import json
import math
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .errors import GraftError

REMEDY = "export or download it again"


def read_json(path: Path, remedy: str = REMEDY) -> dict[str, Any]:
    """A JSON object whose numbers are all finite.

    Raises:
        GraftError: names the file: it is missing, no JSON, or no object.
    """
    try:
        values = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise GraftError(f"{path} is missing: the directory is incomplete; {remedy}") from error
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
        keys = [key for key, _ in items]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} is there twice")
    return made


DECODER = json.JSONDecoder(parse_float=_number, parse_constant=_number, object_pairs_hook=_object)
"""Python's own takes NaN and Infinity, makes infinity of 1e999, and keeps the last of two values under one key."""


def read_safetensors(path: Path, remedy: str = REMEDY) -> dict[str, Tensor]:
    """Raises GraftError, which names the file: it is missing, truncated or corrupt."""
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise GraftError(f"{path} is missing: the directory is incomplete; {remedy}") from error
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
