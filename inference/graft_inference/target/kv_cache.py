"""A preallocated KV cache that can keep one branch of a tree."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from ..errors import GraftError

SMALLEST = 512


def bucket(rows: int) -> int:
    """The smallest of 512, 768, 1024, 1536, 2048, ... that is at least `rows`."""
    size = SMALLEST
    while size < rows:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


@dataclass
class Span:
    """Which rows of the KV cache the next pass writes (from `start` on), and which it attends to (those below `size`).

    For an eager pass `start` is a number, and `size` is None: it attends to all rows up to its own. For a pass that is
    captured and replayed, `start` is on the device, [1] int64, and `size` is a bucket. Then a mask hides the rows that
    are not valid.
    """

    start: int | Tensor = 0
    size: int | None = None

    @property
    def is_fixed(self) -> bool:
        return self.size is not None

    def end(self, count: int) -> int:
        """Number of rows that a pass over `count` tokens attends to, or masks."""
        return self.size if self.size is not None else int(self.start) + count

    def rows(self, count: int, device: torch.device) -> Tensor:
        """Indices of the `count` rows that the pass writes, int64."""
        if isinstance(self.start, int):
            return torch.arange(self.start, self.start + count, device=device)
        return self.start + torch.arange(count, device=device)

    def read(self, table: Tensor, count: int) -> Tensor:
        """Reads `count` rows of a table, [rows, X], from `start` on."""
        if isinstance(self.start, int):
            return table[self.start : self.start + count]
        return table.index_select(0, self.rows(count, table.device))

    def write(self, buffer: Tensor, values: Tensor) -> Tensor:
        """Writes rows, [..., count, D], into the buffer; returns all rows that the pass attends to."""
        count = values.shape[-2]
        if isinstance(self.start, Tensor):
            buffer.index_copy_(2, self.rows(count, buffer.device), values)
        else:
            buffer[:, :, self.start : self.start + count] = values
        return buffer[:, :, : self.end(count)]


class TreeCacheLayer(CacheLayerMixin):
    """One layer's keys and values, [1, heads, capacity, head_dim].

    They are allocated at the first commit, with the shapes and devices that the first pass brought.

    Args:
        shared: a list that holds the cache's span, and not the cache itself: a reference cycle would keep the buffers
            alive until the garbage collector runs.
    """

    is_sliding = False
    keys: Tensor
    values: Tensor

    def __init__(self, capacity: int, shared: list[Span]) -> None:
        super().__init__()
        self.capacity = capacity
        self._shared = shared

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = key_states, value_states

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Writes keys and values after the committed ones, uncommitted; returns all that the pass attends to."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            return key_states, value_states
        span = self._shared[0]
        return span.write(self.keys, key_states), span.write(self.values, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._shared[0].end(query_length), 0

    def get_seq_length(self) -> int:
        start = self._shared[0].start
        return start if isinstance(start, int) else 0  # positions are given, and no mask is asked for

    def get_max_length(self) -> int:
        return self.capacity


class TreeCache(Cache):
    """The KV caches of all layers. A forward pass writes rows, which are committed afterwards.

    Layers on one device share a buffer, [layers * 2, heads, capacity, head_dim], so that a branch of the tree is moved
    by one copy.

    Args:
        num_layers: layers of the model.
        capacity: rows for committed tokens and one tree.

    Attributes:
        length: number of committed rows.
    """

    def __init__(self, num_layers: int, capacity: int) -> None:
        self._shared = [Span()]
        self.tree_layers = [TreeCacheLayer(capacity, self._shared) for _ in range(num_layers)]
        self.buffers: list[Tensor] = []
        self.length = 0
        super().__init__(layers=list(self.tree_layers))

    @property
    def span(self) -> Span:
        """Where the next pass writes."""
        return self._shared[0]

    @span.setter
    def span(self, span: Span) -> None:
        self._shared[0] = span

    def commit(self, count: int) -> None:
        """Commits the first `count` rows written last (a prompt, or the root alone).

        Raises:
            GraftError: no memory for the buffers, which the first commit allocates.
        """
        if not self.buffers:
            self._allocate(self.tree_layers[0].keys.shape[2])
        self.rewind(self.length + count)

    def keep_branch(self, path_A: Tensor) -> None:
        """Moves one branch of the last tree to the rows right after the committed ones. `commit` commits it.

        Args:
            path_A: indices of the branch's nodes in the tree, from the root down, int64. In a CUDA graph its last
                entries may be padding.
        """
        if not self.buffers:
            self._allocate(self.tree_layers[0].keys.shape[2])
        if len(path_A) == 1:
            return  # the root stands where it belongs
        for buffer in self.buffers:
            self.span.write(buffer, buffer.index_select(2, (self.span.start + path_A).to(buffer.device)))

    def rewind(self, length: int = 0) -> None:
        """Keeps only the first `length` committed rows; buffers stay allocated."""
        self.length = length
        self.span = Span(length)

    def grow(self, capacity: int) -> None:
        """Makes room for `capacity` rows, keeping the committed ones."""
        if capacity > self.tree_layers[0].capacity:
            for layer in self.tree_layers:
                layer.capacity = capacity
            self._allocate(self.length)

    def twin(self, capacity: int) -> "TreeCache":
        """An empty cache of the same layout and another capacity, whose buffers are there already.

        Raises:
            GraftError: no memory for them.
        """
        other = TreeCache(len(self.tree_layers), capacity)
        other.buffers = [allocate((*one.shape[:2], capacity, one.shape[3]), one) for one in self.buffers]
        other._share(self, other.buffers)
        return other

    def move_into(self, other: "TreeCache") -> None:
        """Copies the committed rows into a twin's buffers, where they live from now on."""
        for old, new in zip(self.buffers, other.buffers, strict=True):
            new[:, :, : self.length] = old[:, :, : self.length]
        self._share(self, other.buffers)
        self.buffers = other.buffers

    def _share(self, layout: "TreeCache", buffers: list[Tensor]) -> None:
        """Layers' keys and values become parts of these buffers, as those of `layout` are of its own."""
        homes = {old.untyped_storage().data_ptr(): (old, new) for old, new in zip(layout.buffers, buffers, strict=True)}
        for layer, like in zip(self.tree_layers, layout.tree_layers, strict=True):
            for name in ("keys", "values"):
                part: Tensor = getattr(like, name)
                old, new = homes[part.untyped_storage().data_ptr()]
                index = (part.storage_offset() - old.storage_offset()) // old.stride(0)
                setattr(layer, name, new[index : index + 1])
            layer.is_initialized = True

    def _allocate(self, rows: int) -> None:
        """Puts the layers' keys and values, of which `rows` rows count, into buffers of full capacity."""
        alike: dict[tuple, list[tuple[TreeCacheLayer, str]]] = {}
        for layer in self.tree_layers:
            for name in ("keys", "values"):
                part: Tensor = getattr(layer, name)
                alike.setdefault((part.device, part.dtype, part.shape[1], part.shape[3]), []).append((layer, name))
        self.buffers = []
        for (_, _, heads, width), parts in alike.items():
            like = getattr(*parts[0])
            buffer = allocate((len(parts), heads, self.tree_layers[0].capacity, width), like)
            self.buffers.append(buffer)
            for index, (layer, name) in enumerate(parts):
                buffer[index, :, :rows] = getattr(layer, name)[0, :, :rows]
                setattr(layer, name, buffer[index : index + 1])
                layer.is_initialized = True


class PackedCaches(Cache):
    """The KV caches of several prompts, for one pass over their concatenated tokens.

    Args:
        rows: number of tokens of each prompt in the pass.
    """

    def __init__(self, caches: Sequence[TreeCache], rows: list[int]) -> None:
        super().__init__(layers=list(caches[0].layers))
        self.caches = caches
        self.rows = rows

    def update(  # type: ignore[override]
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Writes each prompt's keys and values to its own cache; returns the valid keys and values of each.

        Attention functions get the lists as they are, so nothing is copied into one tensor.
        """
        parts = zip(self.caches, key_states.split(self.rows, dim=2), value_states.split(self.rows, dim=2), strict=True)
        keys, values = zip(*(cache.update(key, value, layer_idx) for cache, key, value in parts), strict=True)
        return list(keys), list(values)


def allocate(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Zeros for keys and values, [..., tokens, head_dim], of a dtype and device as `like`.

    Raises:
        GraftError: out of memory; says what they take.
    """
    try:
        return like.new_zeros(shape)
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        total = math.prod(shape) * like.element_size()
        raise GraftError(
            f"no memory on {like.device} for the key/value cache of {shape[-2]} tokens: {total:,} bytes. Lower "
            "max_new_tokens, shorten the prompt, load the target in bfloat16, or give it more devices (device_map)"
        ) from error
