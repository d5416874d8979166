"""A preallocated key/value cache that can keep one branch of a tree."""

import math
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from .errors import GraftError


class TreeCacheLayer(CacheLayerMixin):
    """One layer's keys and values, [1, heads, capacity, head_dim], filled up to `length` committed rows.

    They lie where the layer's keys come from, so layers may stand on different devices.
    """

    is_sliding = False
    keys: Tensor
    values: Tensor

    def __init__(self, capacity: int, layers: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.layers = layers
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        heads = key_states.shape[1]
        self.keys = allocate((1, heads, self.capacity, key_states.shape[3]), key_states, 2 * self.layers)
        self.values = allocate((1, heads, self.capacity, value_states.shape[3]), value_states, 2 * self.layers)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Writes rows behind the committed ones, without committing them, and returns all valid rows."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.length + key_states.shape[2]
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return self.capacity


class TreeCache(Cache):
    """All layers' caches. Rows are written by a forward pass and committed afterwards.

    Args:
        num_layers: layers of the model.
        capacity: rows: committed tokens plus one tree.
    """

    def __init__(self, num_layers: int, capacity: int) -> None:
        self.tree_layers = [TreeCacheLayer(capacity, num_layers) for _ in range(num_layers)]
        super().__init__(layers=list(self.tree_layers))

    @property
    def length(self) -> int:
        """Committed rows."""
        return self.tree_layers[0].length

    def commit(self, count: int) -> None:
        """Commits the first `count` rows written last (a prompt, or the root alone)."""
        for layer in self.tree_layers:
            layer.length += count

    def commit_branch(self, path_A: Tensor) -> None:
        """Commits one branch of the tree written last: tree rows `path_A` in order of depth, [A] int64."""
        rows_A = self.length + path_A
        target_A = torch.arange(self.length, self.length + len(path_A), device=path_A.device)
        for layer in self.tree_layers:
            here = layer.keys.device
            rows_A, target_A = rows_A.to(here), target_A.to(here)
            layer.keys.index_copy_(2, target_A, layer.keys.index_select(2, rows_A))
            layer.values.index_copy_(2, target_A, layer.values.index_select(2, rows_A))
        self.commit(len(path_A))

    def rewind(self, length: int = 0) -> None:
        """Forgets what was committed after the first `length` rows; buffers are kept."""
        for layer in self.tree_layers:
            layer.length = length

    def grow(self, capacity: int) -> None:
        """Makes room for `capacity` rows, keeping the committed ones."""
        for layer in self.tree_layers:
            if capacity > layer.capacity:
                keys, values, layer.capacity = layer.keys, layer.values, capacity
                layer.lazy_initialization(keys, values)
                layer.keys[:, :, : layer.length] = keys[:, :, : layer.length]
                layer.values[:, :, : layer.length] = values[:, :, : layer.length]


def allocate(shape: tuple[int, ...], like: Tensor, count: int) -> Tensor:
    """Zeros of a shape, dtype and device as `like`: one of `count` such buffers of a request's caches.

    Raises:
        GraftError: out of memory; says what all of them take.
    """
    try:
        return like.new_zeros(shape)
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        total = count * math.prod(shape) * like.element_size()
        raise GraftError(
            f"no memory on {like.device} for the key/value cache of {shape[2]} tokens: {total:,} bytes. Lower "
            "max_new_tokens, shorten the prompt, load the target in bfloat16, or give it more devices (device_map)"
        ) from error
