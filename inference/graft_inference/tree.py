"""The draft tree as flat tensors, and its algebra. No Python loop runs over nodes."""

from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

PATH_BASE = 6364136223846793005
"""Odd 64-bit multiplier (Knuth's MMIX): path keys are polynomials of it modulo 2**64."""


class Source(IntEnum):
    """Where a node comes from; an EMPTY row only pads the tree to its fixed size and is never accepted."""

    EMPTY = -1
    ROOT = 0
    DRAFTED = 1
    RETRIEVED = 2


@dataclass
class DraftTree:
    """N rows in topological order: a parent stands before its children, the root in row 0.

    Attributes:
        tokens_N: target token ids, int64.
        parents_N: row of the parent, int64; the root is its own parent.
        depths_N: the root has depth 0, int64.
        logp_N: cumulative draft log-probability (Graft Eq. 5), float32; 0 where no head scored the node.
        sources_N: values of `Source`, int64.
        paths_N: key of the token path from the root, int64; equal paths have equal keys.
    """

    tokens_N: Tensor
    parents_N: Tensor
    depths_N: Tensor
    logp_N: Tensor
    sources_N: Tensor
    paths_N: Tensor

    def __len__(self) -> int:
        return len(self.tokens_N)

    def best(self, rows: int) -> "DraftTree":
        """The root and the `rows` best-scored nodes.

        A child never scores above its parent and stands after it, so a stable sort keeps the selection
        closed under parents and in topological order.
        """
        chosen_K = torch.sort(self.logp_N, descending=True, stable=True).indices[: rows + 1]
        slot_N = torch.zeros_like(self.parents_N)
        slot_N[chosen_K] = torch.arange(len(chosen_K), device=chosen_K.device)
        return DraftTree(
            self.tokens_N[chosen_K],
            slot_N[self.parents_N[chosen_K]],
            self.depths_N[chosen_K],
            self.logp_N[chosen_K],
            self.sources_N[chosen_K],
            self.paths_N[chosen_K],
        )

    def ancestors(self, max_depth: int) -> Tensor:
        """[N, N] bool: row i marks node i and all its ancestors. Doubling: log2(max_depth) steps."""
        jump_N = self.parents_N
        ancestors_NN = torch.eye(len(self), dtype=torch.bool, device=jump_N.device)
        reach = 1
        while reach <= max_depth:
            ancestors_NN = ancestors_NN | ancestors_NN[jump_N]
            jump_N = jump_N[jump_N]
            reach *= 2
        return ancestors_NN


def root_tree(token_1: Tensor) -> DraftTree:
    """A tree of the root alone. token_1: the last emitted token, [1] int64."""
    zero = torch.zeros_like(token_1)
    return DraftTree(token_1, zero, zero, zero.float(), zero, zero)


def child_paths(parent_paths_M: Tensor, tokens_M: Tensor) -> Tensor:
    """Path keys of children from their parents' keys and their own tokens."""
    return parent_paths_M * PATH_BASE + tokens_M + 1


def merge(drafted: DraftTree, retrieved: DraftTree, rows: int) -> DraftTree:
    """Hangs up to `rows` retrieved nodes below the drafted tree's root (Graft Eq. 8).

    A retrieved node whose path was drafted already is the same node: it takes no row, and its children
    hang under the drafted twin. Its row goes to the next retrieved node in order of priority, so no two
    siblings share a token, which exact acceptance relies on.

    Args:
        drafted: root and drafted nodes.
        retrieved: root and retrieved nodes by priority, EMPTY where the matrix had no successor.
        rows: rows for retrieved nodes; the result has len(drafted) + rows rows, padded with EMPTY ones.
    """
    twin_TD = retrieved.paths_N[:, None] == drafted.paths_N
    has_twin_T, twin_T = twin_TD.to(torch.uint8).max(dim=1)
    new_T = (has_twin_T == 0) & (retrieved.sources_N != Source.EMPTY)
    rank_T = new_T.cumsum(0)
    kept_T = new_T & (rank_T <= rows)
    size = len(drafted) + rows
    slot_T = torch.where(new_T, len(drafted) - 1 + rank_T, twin_T)
    row_T = torch.where(kept_T, slot_T, size)  # the row past the end collects what is not kept

    def scatter(drafted_D: Tensor, values_T: Tensor, empty: int) -> Tensor:
        out = torch.full((size + 1,), empty, dtype=drafted_D.dtype, device=drafted_D.device)
        out[: len(drafted_D)] = drafted_D
        return out.scatter_(0, row_T, values_T)[:size]

    return DraftTree(
        scatter(drafted.tokens_N, retrieved.tokens_N, 0),
        scatter(drafted.parents_N, slot_T[retrieved.parents_N], 0),
        scatter(drafted.depths_N, retrieved.depths_N, 0),
        scatter(drafted.logp_N, retrieved.logp_N, 0),
        scatter(drafted.sources_N, retrieved.sources_N, Source.EMPTY),
        scatter(drafted.paths_N, retrieved.paths_N, 0),
    )
