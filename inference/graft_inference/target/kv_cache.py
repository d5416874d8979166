"""A preallocated key/value cache that can keep one branch of a tree."""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from ..errors import GraftError


class TreeCacheLayer(CacheLayerMixin):
    """One layer's keys and values, [1, heads, capacity, head_dim], filled up to `length` committed rows.

    Until the first commit they are what the first pass brought: its shapes and devices say what to allocate.
    """

    is_sliding = False
    keys: Tensor
    values: Tensor

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = key_states, value_states

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Writes rows behind the committed ones, without committing them, and returns all valid rows."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            return key_states, value_states
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

    Layers that stand on one device share a buffer, [layers * 2, heads, capacity, head_dim], so that a branch of
    the tree moves in one copy.

    Args:
        num_layers: layers of the model.
        capacity: rows: committed tokens plus one tree.
    """

    def __init__(self, num_layers: int, capacity: int) -> None:
        self.tree_layers = [TreeCacheLayer(capacity) for _ in range(num_layers)]
        self.buffers: list[Tensor] = []
        super().__init__(layers=list(self.tree_layers))

    @property
    def length(self) -> int:
        """Committed rows."""
        return self.tree_layers[0].length

    def commit(self, count: int) -> None:
        """Commits the first `count` rows written last (a prompt, or the root alone).

        Raises:
            GraftError: no memory for the buffers, which the first commit allocates.
        """
        if not self.buffers:
            self._allocate(self.tree_layers[0].keys.shape[2])
        for layer in self.tree_layers:
            layer.length += count

    def commit_branch(self, path_A: Tensor) -> None:
        """Commits one branch of the tree written last: its root and tree rows `path_A[1:]` by depth, [A] int64."""
        if not self.buffers:
            self._allocate(self.tree_layers[0].keys.shape[2])
        count = len(path_A)
        if count > 1:  # the root stands where it belongs
            rows_A = self.length + path_A
            for buffer in self.buffers:
                branch = buffer.index_select(2, rows_A.to(buffer.device))
                buffer[:, :, self.length : self.length + count] = branch
        self.commit(count)

    def rewind(self, length: int = 0) -> None:
        """Forgets what was committed after the first `length` rows; buffers are kept."""
        for layer in self.tree_layers:
            layer.length = length

    def grow(self, capacity: int) -> None:
        """Makes room for `capacity` rows, keeping the committed ones."""
        if capacity > self.tree_layers[0].capacity:
            for layer in self.tree_layers:
                layer.capacity = capacity
            self._allocate(self.length)

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
    """The caches of several prompts, under one pass whose rows are theirs, one prompt behind the other.

    Args:
        rows: of each prompt in the pass.
    """

    def __init__(self, caches: Sequence[TreeCache], rows: list[int]) -> None:
        super().__init__(layers=list(caches[0].layers))
        self.caches = caches
        self.rows = rows

    def update(  # type: ignore[override]
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Writes each prompt's rows to its own cache, and returns each one's valid keys and values.

        Attention functions get what it returns as it is, so nothing is copied into one tensor.
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
