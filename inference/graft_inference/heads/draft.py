"""What drafters of all families share: a draft as layers of candidates, and a request's part of a head."""

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
        tokens_C, logp_C, paths_C: the children's columns of the tree, by parent.
        parents_A: rows of their parents in the tree.
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
            best: `topk` of `logp_C`.
            first_row: of this layer's children in the tree.
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
        root_1: its root's token.
        noise: of the draws, where the head is told of it.
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


class HeadState:
    """A request's part of a draft head: a key/value cache of its own, and what it has not read.

    Args:
        shape: of keys and values but for the tokens: (layers, heads, head_dim).
        topk: children proposed per node, and nodes expanded per step (EAGLE's top-k).
        capacity: rows of the cache.
        like: of the dtype and device of keys and values.

    Attributes:
        length: positions that were read.
        span: where the next pass stands.
        unread: committed positions that wait for the next `begin`.
    """

    def __init__(self, shape: tuple[int, int, int], topk: int, capacity: int, like: Tensor) -> None:
        layers, heads, width = shape
        self.keys, self.values = allocate((2, layers, heads, capacity, width), like)
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
        """Returns the positions that `read` has to read: those that were deferred, then these."""
        if self.deferred:
            self.deferred.append((tokens_A, aux_AE))
            tokens_A, aux_AE = map(torch.cat, zip(*self.deferred, strict=True))
            self.deferred = []
        self.unread = 0
        return tokens_A, aux_AE


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
