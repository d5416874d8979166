"""Strict JSON: what Python's own reader lets through and no prompt can hold is a bad record."""

import json
from typing import Any

from graft_inference.files import DECODER
from graft_train.data.bad_records import BadRecord

# Far beyond any record; what walks through one takes a few frames of Python's stack a level.
DEEPEST = 100


def parse(text: str | bytes, what: str) -> Any:
    """A JSON value.

    Args:
        what: names the text in errors.

    Raises:
        BadRecord: no JSON, not UTF-8, a number that is none (NaN, Infinity, 1e999), two values under one key, or
            what `checked` refuses.
    """
    try:
        value = DECODER.decode(text if isinstance(text, str) else text.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise BadRecord(f"{what} is not UTF-8; convert the file") from error
    except (ValueError, RecursionError) as error:
        raise BadRecord(f"{what} is not JSON: {error}") from error
    return checked(value, what)


def plain(value: Any, what: str) -> Any:
    """The same value.

    Raises:
        BadRecord: it holds what JSON has no form for, such as the dates of a table.
    """
    try:
        json.dumps(value)
    except TypeError as error:
        raise BadRecord(f"{what} is not JSON: {error}") from error
    return value


def checked(value: Any, what: str) -> Any:
    """The same value.

    Raises:
        BadRecord: half a surrogate pair in one of its strings or keys, or lists and objects nested too deeply.
    """
    _check(value, what, DEEPEST)
    return value


def _check(value: Any, what: str, depth: int) -> None:
    if isinstance(value, str):
        _check_text(value, what)
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_text(key, what)
            _check(item, what, _deeper(depth, what))
    elif isinstance(value, list):
        for item in value:
            _check(item, what, _deeper(depth, what))


def _check_text(text: str, what: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start]
        raise BadRecord(f"{what} holds half a surrogate pair, {half!a}: a character was cut in two") from error


def _deeper(depth: int, what: str) -> int:
    if not depth:
        raise BadRecord(f"{what} nests lists and objects more than {DEEPEST} deep")
    return depth - 1
