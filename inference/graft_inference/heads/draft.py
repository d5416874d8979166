"""What drafters of all families share: a draft as layers of candidates, and what a head keeps of a request."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Generic, Self, TypeVar

import torch
from torch import Tensor

from ..noise import Noise
from ..target.kv_cache import Span, allocate
from ..tree import DraftTree, Source, child_paths, root_tree

DEFERRED = 64
"""Positions that a head leaves unread at most: they hold memory, and the next draft waits for them."""


@dataclass
class Layer:
    """The candidates of one depth: topk children of every node that was expanded, best first.

    Attributes:
        tokens_C, logp_C, paths_C: token ids, cumulative log-probabilities and path keys of the children, grouped by
            parent, [A * topk].
        parents_A: index of each parent in the tree, [A]: of the root, or of the nodes that were expanded.
    """

    tokens_C: Tensor
    logp_C: Tensor
    paths_C: Tensor
    parents_A: Tensor

    @classmethod
    def below_root(cls, logp_1k: Tensor, tokens_1k: Tensor, **more: Any) -> Self:
        """The first layer: the root is row 0, of path 0."""
        zero_1 = torch.zeros_like(tokens_1k[0, :1])
        return cls(tokens_1k[0], logp_1k[0], child_paths(zero_1, tokens_1k[0]), zero_1, **more)

    def below(self, best: Any, first_row: int, logp_kk: Tensor, tokens_kk: Tensor, **more: Any) -> Self:
        """The layer below the best k of these children.

        Args:
            best: `logp_C.topk(k)`: values and indices of the children that are expanded.
            first_row: index in the tree of this layer's first child.
        """
        return type(self)(
            tokens_kk.flatten(),
            (best.values[:, None] + logp_kk).flatten(),
            child_paths(self.paths_C[best.indices, None], tokens_kk).flatten(),
            best.indices + first_row,
            **more,
        )


L = TypeVar("L", bound=Layer)


@dataclass
class Draft(Generic[L]):
    """A tree that grows by one depth a step.

    Attributes:
        root_1: the root's token, [1] int64.
        layers: the candidates of depth 1, 2, ...
        noise: of the draws, where plan and sampling share it with the head; else None.
    """

    root_1: Tensor
    layers: list[L]
    noise: Noise | None = None

    @property
    def steps(self) -> int:
        """Draft steps run."""
        return len(self.layers)

    @property
    def first_row(self) -> int:
        """Row of the deepest layer's first child."""
        return 1 + sum(len(layer.tokens_C) for layer in self.layers[:-1])

    @property
    def confidence(self) -> Tensor:
        """exp of the best cumulative log-probability at the deepest layer (Graft Eq. 6), 0-d."""
        return self.layers[-1].logp_C.max().exp()

    @property
    def candidates(self) -> DraftTree:
        """The root and every node proposed so far."""
        root = root_tree(self.root_1)
        width = len(self.layers[0].tokens_C)
        depths_N, sources_N = _depths_and_sources(width, self.steps, self.root_1.device)
        # The root is its own parent once, not `width` times.
        parents_A = torch.cat([root.parents_N, *(layer.parents_A for layer in self.layers)])
        return DraftTree(
            torch.cat([root.tokens_N, *(layer.tokens_C for layer in self.layers)]),
            parents_A.repeat_interleave(width)[width - 1 :],
            depths_N,
            torch.cat([root.logp_N, *(layer.logp_C for layer in self.layers)]),
            sources_N,
            torch.cat([root.paths_N, *(layer.paths_C for layer in self.layers)]),
        )


@cache
def _depths_and_sources(width: int, steps: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Depths and sources of the candidates that so many steps propose; they are the same for every draft."""
    depths = [0] + [1] * width + [depth for depth in range(2, steps + 1) for _ in range(width**2)]
    sources = [Source.ROOT] + [Source.DRAFTED] * (len(depths) - 1)
    return torch.tensor(depths, device=device), torch.tensor(sources, device=device)


@dataclass
class Pending:
    """Committed positions that a head over fixed buffers has not read yet.

    Attributes:
        length_1: positions that were read, int64.
        count_1: positions that were not, int64: so many rows of the next two tensors are valid.
        tokens_F, aux_FE: of each such position the token after it, and the target's aux hidden states at it.
    """

    length_1: Tensor
    count_1: Tensor
    tokens_F: Tensor
    aux_FE: Tensor

    @property
    def tensors(self) -> list[Tensor]:
        return [self.length_1, self.count_1, self.tokens_F, self.aux_FE]

    def append(self, tokens_D: Tensor, aux_DE: Tensor, count_1: Tensor) -> None:
        """Newly committed positions; rows past the count are overwritten later."""
        rows_D = Span(self.count_1).rows(len(tokens_D), tokens_D.device)
        self.tokens_F.index_copy_(0, rows_D, tokens_D)
        self.aux_FE.index_copy_(0, rows_D, aux_DE)
        self.count_1 += count_1

    def last(self, values_FX: Tensor) -> Tensor:
        """The last valid row, [1, X]."""
        return values_FX.index_select(0, self.count_1 - 1)

    def clear(self) -> None:
        """Notes that the head has read all of them."""
        self.length_1 += self.count_1
        self.count_1.zero_()


class HeadState:
    """What a draft head keeps of one request: a KV cache, and the committed positions that it has not read yet.

    Args:
        shape: of the KV cache without its positions: (layers, key/value heads, head_dim).
        topk: children proposed per node, and nodes expanded per step (EAGLE's top-k).
        capacity: rows of the cache.
        fc_HE: the head's projection of the target's aux hidden states; the KV cache has its dtype and device.

    Attributes:
        length: positions that were read.
        span: the rows of the KV cache that the next pass writes.
        unread: number of committed positions that wait for the next `begin`.
        fixed: these positions themselves, where rounds are CUDA graphs over fixed buffers; else None.
    """

    def __init__(self, shape: tuple[int, int, int], topk: int, capacity: int, fc_HE: Tensor) -> None:
        layers, heads, width = shape
        self.keys, self.values = allocate((2, layers, heads, capacity, width), fc_HE)
        self.aux_width = fc_HE.shape[1]
        self.fixed: Pending | None = None
        self.topk = topk
        self.length = self.unread = 0
        self.span = Span()
        self.deferred: list[tuple[Tensor, Tensor]] = []

    def resume(self, length: int, topk: int, capacity: int) -> None:
        """Forgets what was read after the first `length` positions, and makes room for another request."""
        self.unread = 0
        self.deferred = []
        self.topk = topk
        self.advance(length - self.length)
        keys, values = self.keys, self.values
        if capacity > keys.shape[2]:
            self.keys, self.values = allocate((2, *keys.shape[:2], capacity, keys.shape[3]), keys)
            self.keys[:, :, :length] = keys[:, :, :length]
            self.values[:, :, :length] = values[:, :, :length]

    def advance(self, count: int) -> None:
        """Notes that so many positions more have been read."""
        self.length += count
        self.span = Span(self.length)

    def caught_up(self, tokens_A: Tensor, aux_AE: Tensor) -> tuple[Tensor, Tensor]:
        """Returns what `read` has to read: deferred positions, then these; on fixed buffers the pending ones."""
        if self.fixed is not None:
            return self.fixed.tokens_F, self.fixed.aux_FE
        if self.deferred:
            self.deferred.append((tokens_A, aux_AE))
            tokens_A, aux_AE = map(torch.cat, zip(*self.deferred, strict=True))
            self.deferred = []
        self.unread = 0
        return tokens_A, aux_AE

    def fix(self, rows: int) -> Self:
        """Stands on fixed buffers from now on, with room for so many positions that are not read; nothing is in it."""
        length_1, count_1, tokens_F = (torch.zeros(n, dtype=torch.long, device=self.keys.device) for n in (1, 1, rows))
        self.span = Span(length_1, self.keys.shape[2])
        self.fixed = Pending(length_1, count_1, tokens_F, self.keys.new_zeros(rows, self.aux_width))
        return self

    def adopt(self, other: Self, tokens_1: Tensor, aux_1E: Tensor) -> None:
        """Takes over from a request's own part, whose cache stands in these fixed buffers from now on.

        Args:
            tokens_1, aux_1E: the one position that the other has not read.
        """
        assert self.fixed is not None
        if other.keys.data_ptr() != self.keys.data_ptr():
            self.keys[:, :, : other.length] = other.keys[:, :, : other.length]
            self.values[:, :, : other.length] = other.values[:, :, : other.length]
            other.keys, other.values = self.keys, self.values
        self.fixed.length_1.fill_(other.length)
        self.fixed.count_1.fill_(1)
        self.fixed.tokens_F[:1] = tokens_1
        self.fixed.aux_FE[:1] = aux_1E


S = TypeVar("S", bound=HeadState)


def deferred(states: Sequence[S], fresh: Sequence[tuple[Tensor, Tensor]]) -> list[S]:
    """Keeps newly committed positions for the next `begin`; returns the states that have too many of them to wait."""
    for state, one in zip(states, fresh, strict=True):
        state.deferred.append(one)
        state.unread += len(one[0])
    return [state for state in states if state.unread >= DEFERRED]


def joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def parted(rows: Tensor, counts: list[int]) -> list[Tensor]:
    return [rows] if len(counts) == 1 else list(rows.split(counts))
