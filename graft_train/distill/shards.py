"""Stored states: shards as safetensors files, memory-mapped, read row by row and held against what wrote them."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from graft_inference.errors import GraftError

Place = tuple[int, int, int]
"""A sample's shard, start and end."""
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int32: "I32"}
"""As safetensors names them."""
IDS = ("choice", "top_ids")


def widths_of(hidden: int, aux_layers: int, top: int | None) -> dict[str, list[int]]:
    """Of the parts of a shard, the shape of each row; arguments as `disk_states`."""
    predicted = {"final": [hidden]} if top is None else {"top_ids": [top], "top_logits": [top]}
    return {"aux": [aux_layers * hidden], "choice": []} | predicted


def shard_path(directory: Path, number: int) -> Path:
    return directory / f"shard-{number:05d}.safetensors"


class Shards:
    """Rows of the shards of a directory.

    Args:
        places: of all samples that lie there.
        dtype: of what is no token id.
        widths: as `widths_of` gives them.
    """

    def __init__(self, directory: Path, places: list[Place], dtype: torch.dtype, widths: dict[str, list[int]]) -> None:
        self.directory, self.dtype, self.widths = directory, dtype, widths
        self._rows: dict[int, int] = {}
        for shard, _, end in places:
            self._rows[shard] = max(end, self._rows.get(shard, 0))
        self._files: dict[int, Any] = {}

    def read(self, place: Place, vocab_size: int, names: tuple[str, ...] = ()) -> dict[str, Tensor]:
        """The parts of one sample, by name; all of them, or those that are asked for.

        Raises:
            GraftError: names the file: missing, damaged, of other shapes, or with what no target makes of a sample.
        """
        shard, start, end = place
        path = shard_path(self.directory, shard)
        try:
            if shard not in self._files:
                self._files[shard] = self._opened(path, self._rows[shard])
            file = self._files[shard]
            parts = {name: file.get_slice(name)[start:end] for name in names or self.widths}
        except (OSError, SafetensorError, ValueError) as error:
            raise GraftError(
                f"{path} is missing or damaged ({error}); delete {self.directory} to make it anew"
            ) from error
        for name, part in parts.items():
            bad = (part < 0) | (part >= vocab_size) if name in IDS else ~part.isfinite()
            if bool(bad.any()):
                raise GraftError(
                    f"{path}: {name} holds what is no {'token' if name in IDS else 'number'}, it is damaged; delete "
                    f"{self.directory} to make it anew"
                )
        return parts

    def _opened(self, path: Path, rows: int) -> Any:
        """Raises ValueError unless it has the parts, each of its shape and dtype."""
        file = safe_open(path, framework="pt").__enter__()
        found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        told = {name: (part.get_dtype(), part.get_shape()) for name, part in found.items()}
        wanted = {
            name: (DTYPES[torch.int32 if name in IDS else self.dtype], [rows, *width])
            for name, width in self.widths.items()
        }
        if told != wanted:
            raise ValueError(f"it has {told}, not {wanted}")
        return file
