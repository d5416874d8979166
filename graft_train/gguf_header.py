"""What a GGUF file says before its numbers, read strictly and within the file's size.

transformers reads the same header with the package gguf, which allocates and counts by whatever numbers stand there.
So a file is read here first. The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from graft_inference.errors import GraftError

MAGIC, VERSIONS = b"GGUF", (2, 3)
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
ALIGNMENT = 32
MOST_DIMENSIONS = 4
MOST_KEYS, MOST_TENSORS, MOST_ITEMS, LONGEST_STRING = 1 << 16, 1 << 18, 1 << 21, 1 << 24
"""Keys, tensors, items of all lists and bytes of a string: far beyond any model's, and a bound on the memory that they
take outside, where each item is an object of its own."""


@dataclass(frozen=True)
class Header:
    """Attributes:
    said: values by key.
    shapes: of the tensors by name, the fastest dimension first.
    """

    said: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]

    @property
    def weights(self) -> int:
        """Numbers of all tensors."""
        return sum(map(math.prod, self.shapes.values()))


def read_header(file: Path, kinds: Mapping[int, tuple[int, int]]) -> Header:
    """Reads the header, and holds what it says of the tensors against the file's size.

    Args:
        kinds: by the number of a tensor's type, how many weights a block of it has, and how many bytes.

    Raises:
        GraftError: names the file and what is wrong with it.
    """
    try:
        with file.open("rb") as opened:
            return _Reader(opened, os.fstat(opened.fileno()).st_size).header(kinds)
    except (ValueError, struct.error) as error:
        raise GraftError(f"{file} is no GGUF file, or damaged: {error}; download it again") from error
    except OSError as error:
        raise GraftError(f"{file} cannot be read: {error}") from error


class _Reader:
    """Takes the parts of a header in their order; raises ValueError for what cannot be one."""

    def __init__(self, opened: BinaryIO, size: int) -> None:
        self.opened, self.size, self.items = opened, size, 0

    def header(self, kinds: Mapping[int, tuple[int, int]]) -> Header:
        if self.take(4) != MAGIC:
            raise ValueError("it does not begin with GGUF")
        version, tensors, keys = self.number("I"), self.number("Q"), self.number("Q")
        if version not in VERSIONS:
            raise ValueError(f"version {version} is unknown, or it was made for another byte order")
        if tensors > MOST_TENSORS or keys > MOST_KEYS:
            raise ValueError(f"{tensors} tensors and {keys} keys are too many")
        said: dict[str, Any] = {}
        for _ in range(keys):
            name = self.string()
            if name in said:
                raise ValueError(f"the key {name} is there twice")
            said[name] = self.value(self.number("I"))
        return Header(said, self.tensors(tensors, said, kinds))

    def tensors(
        self, count: int, said: dict[str, Any], kinds: Mapping[int, tuple[int, int]]
    ) -> dict[str, tuple[int, ...]]:
        """The shapes. Each tensor lies behind the one before, as llama.cpp wants it, and the last one ends in time."""
        alignment = said.get("general.alignment", ALIGNMENT)
        if type(alignment) is not int or not 1 <= alignment <= 1 << 20 or alignment & (alignment - 1):
            raise ValueError(f"general.alignment={alignment} is no power of two")
        shapes: dict[str, tuple[int, ...]] = {}
        last = end = 0
        for _ in range(count):
            name, dimensions = self.string(), self.number("I")
            if name in shapes or not 1 <= dimensions <= MOST_DIMENSIONS:
                raise ValueError(f"the tensor {name} is there twice, or has {dimensions} dimensions")
            shape = tuple(self.number("Q") for _ in range(dimensions))
            kind, offset = self.number("I"), self.number("Q")
            if kind not in kinds or min(shape) < 1 or shape[0] % kinds[kind][0]:
                raise ValueError(f"the tensor {name} has the type {kind} and the shape {list(shape)}")
            if offset != end:
                raise ValueError(f"the tensor {name} begins at {offset}, and what is before it ends at {end}")
            block, size = kinds[kind]
            shapes[name] = shape
            last = end + math.prod(shape) // block * size
            end = -(-last // alignment) * alignment
            if last > self.size:
                raise ValueError(f"the tensor {name} of shape {list(shape)} is larger than the file")
        begin = -(-self.opened.tell() // alignment) * alignment
        if shapes and begin + last > self.size:
            raise ValueError(f"it is truncated: {begin + last} bytes are expected, {self.size} are there")
        return shapes

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            value = self.number(NUMBERS[kind]) if kind in NUMBERS else None
            if value is None or not math.isfinite(value):
                raise ValueError(f"a value of the type {kind} is {value}")
            return value
        kind, count = self.number("I"), self.number("Q")
        self.items += count
        if self.items > MOST_ITEMS or (kind != STRING and kind not in NUMBERS):
            raise ValueError(f"a list of {count} values of the type {kind}: too many, or of no type that is known")
        if kind == STRING:
            return [self.string() for _ in range(count)]
        packed = f"<{count}{NUMBERS[kind]}"
        return list(struct.unpack(packed, self.take(struct.calcsize(packed))))

    def string(self) -> str:
        length = self.number("Q")
        if length > LONGEST_STRING:
            raise ValueError(f"a text of {length} bytes is too long")
        return self.take(length).decode("utf-8")

    def number(self, form: str) -> Any:
        return struct.unpack(f"<{form}", self.take(struct.calcsize(f"<{form}")))[0]

    def take(self, count: int) -> bytes:
        if count > self.size - self.opened.tell():
            raise ValueError(f"it is truncated: {count} bytes are missing at {self.opened.tell()}")
        return self.opened.read(count)
