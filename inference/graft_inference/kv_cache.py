"""A preallocated key/value cache that can keep one branch of a tree."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class TreeCacheLayer(CacheLayerMixin):
    """One layer's keys and values, [1, heads, capacity, head_dim], filled up to `length` committed rows."""

    is_sliding = False
    keys: Tensor
    values: Tensor

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        heads, head_dim = key_states.shape[1], key_states.shape[3]
        self.keys = key_states.new_zeros((1, heads, self.capacity, head_dim))
        self.values = value_states.new_zeros((1, heads, self.capacity, value_states.shape[3]))
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
        self.tree_layers = [TreeCacheLayer(capacity) for _ in range(num_layers)]
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
            layer.keys.index_copy_(2, target_A, layer.keys.index_select(2, rows_A))
            layer.values.index_copy_(2, target_A, layer.values.index_select(2, rows_A))
        self.commit(len(path_A))

    def rewind(self) -> None:
        """Forgets everything; buffers are kept."""
        for layer in self.tree_layers:
            layer.length = 0
