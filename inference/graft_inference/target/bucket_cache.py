"""The key/value cache as a captured pass sees it: a bucket of fixed size, its length on the device."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from .attention import Visibility
from .kv_cache import TreeCache, allocate

SMALLEST = 512


def bucket(rows: int) -> int:
    """The least of 512, 768, 1024, 1536, 2048, ... that holds so many rows."""
    size = SMALLEST
    while size < rows:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


@dataclass
class Place:
    """Where the next pass writes its rows, int64; a cache and its layers share it, not knowing each other.

    A cycle of references would keep the buffers until Python looks for such, which a full device does not make it do.
    """

    rows_N: Tensor


class BucketLayer(CacheLayerMixin):
    """One layer's first rows, [1, heads, bucket, head_dim]."""

    is_sliding = False
    keys: Tensor
    values: Tensor

    def __init__(self, place: Place, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.place = place
        self.keys, self.values = keys, values
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise AssertionError("a bucket stands on buffers that are there")

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.keys.index_copy_(2, self.place.rows_N, key_states)
        self.values.index_copy_(2, self.place.rows_N, value_states)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.keys.shape[2], 0

    def get_seq_length(self) -> int:
        return 0  # positions are given, and no mask is asked for

    def get_max_length(self) -> int:
        return self.keys.shape[2]


class BucketCache(Cache):
    """The first `size` rows of a cache."""

    def __init__(self, cache: TreeCache, size: int) -> None:
        self.place = place = Place(torch.zeros(0, dtype=torch.long))
        layers = [BucketLayer(place, layer.keys[:, :, :size], layer.values[:, :, :size]) for layer in cache.tree_layers]
        super().__init__(layers=list(layers))


class BucketVisibility(Visibility):
    """`Visibility` over all rows of a bucket.

    Args:
        rows_N: rows of the bucket where the pass's keys stand.
        length_1: committed rows, [1] int64.
    """

    def __init__(self, positions_N: Tensor, length_1: Tensor, rows_N: Tensor, own_NN: Tensor, size: int) -> None:
        super().__init__(positions_N, size, own_NN)
        self.own_NN: Tensor = own_NN
        self.length_1 = length_1
        self.rows_N = rows_N
        self.size = size

    def first_key(self, window: int | None) -> int:
        return 0

    def _build(self, window: int | None) -> Tensor:
        row_K = torch.arange(self.size, device=self.rows_N.device)
        mask_NK = (row_K < self.length_1).repeat(len(self.rows_N), 1).index_copy_(1, self.rows_N, self.own_NN)
        if window is not None and window < self.size:
            position_K = row_K.index_copy(0, self.rows_N, self.positions_N)
            mask_NK &= position_K > self.positions_N[:, None] - window
        return mask_NK


def allocated(cache: TreeCache, capacity: int) -> list[Tensor]:
    """Empty buffers laid out as a cache's own, of another capacity."""
    return [allocate((*buffer.shape[:2], capacity, buffer.shape[3]), buffer) for buffer in cache.buffers]


def move(cache: TreeCache, buffers: list[Tensor]) -> None:
    """Copies the committed rows into buffers of the same layout; there the cache lives from now on."""
    pairs = zip(cache.buffers, buffers, strict=True)
    homes = {old.untyped_storage().data_ptr(): (old, new) for old, new in pairs}
    for old, new in homes.values():
        new[:, :, : cache.length] = old[:, :, : cache.length]
    for layer in cache.tree_layers:
        for name in ("keys", "values"):
            part: Tensor = getattr(layer, name)
            old, new = homes[part.untyped_storage().data_ptr()]
            index = (part.storage_offset() - old.storage_offset()) // old.stride(0)
            setattr(layer, name, new[index : index + 1])
    cache.buffers = buffers
