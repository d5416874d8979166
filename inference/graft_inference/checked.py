"""Dataclasses that come from JSON: every field there, no other, each of its type."""

from dataclasses import fields
from itertools import repeat
from typing import Any, get_args, get_origin

from .errors import GraftError

LARGEST_FLOAT = 1e30
"""Numbers beyond it are damage; sums of smaller ones stay finite in float32."""


def exactly(cls: type, values: dict[str, Any]) -> Any:
    """A dataclass from JSON that has every field of it and no other; lists become tuples.

    Raises:
        TypeError: a field is missing or unknown, or `values` is no object.
    """

    def frozen(value: Any) -> Any:
        return tuple(map(frozen, value)) if isinstance(value, list | tuple) else value

    if missing := [one.name for one in fields(cls) if one.name not in values]:
        raise TypeError(f"{cls.__name__} lacks {', '.join(missing)}")
    return cls(**{name: frozen(value) for name, value in values.items()})


def check_types(part: Any) -> None:
    """Raises GraftError for the first field of a dataclass that is not of its type."""
    for one in fields(part):
        value = getattr(part, one.name)
        if not is_a(value, one.type):
            raise GraftError(f"{one.name}={value!r} of a {type(part).__name__} must be {_words(one.type)}")


def _words(kind: Any) -> str:
    return {int: "a whole number", float: "a finite number", bool: "true or false"}.get(kind, f"of the type {kind}")


def is_a(value: Any, kind: Any) -> bool:
    """Whether a value is of a type as dataclasses are annotated; a float is any finite number."""
    options = get_args(kind)
    if get_origin(kind) is tuple:
        if not isinstance(value, tuple) or (options[-1] is not Ellipsis and len(value) != len(options)):
            return False
        kinds = repeat(options[0]) if options[-1] is Ellipsis else options
        return all(map(is_a, value, kinds))
    if options:
        return any(is_a(value, option) for option in options)
    if kind is float:
        return isinstance(value, int | float) and type(value) is not bool and abs(value) <= LARGEST_FLOAT
    return type(value) is kind if kind in (int, bool) else isinstance(value, kind)
