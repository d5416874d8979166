"""The draft tree as flat tensors, and its algebra. No Python loop runs over nodes."""

from dataclasses import dataclass, fields
from enum import IntEnum

import torch
from torch import Tensor
from torch.nn import functional as F

PATH_BASE = 6364136223846793005
"""Odd 64-bit multiplier (Knuth's MMIX): path keys are polynomials of it modulo 2**64."""


MAX_NODES = 1024
"""Of a verification, and of a template: memory grows with their square. Devices pay for 8 to 64."""


def drafted_nodes(topk: int, steps: int) -> int:
    """Nodes that a head proposes in so many steps: topk children of the root, and of the topk best at each depth."""
    return topk + (steps - 1) * topk**2 if steps else 0


class Source(IntEnum):
    """Where a node comes from; an EMPTY node only pads the tree to its fixed size and is never accepted.

    What lies above DRAFTED was retrieved: retrieval/sources.py numbers its sources.
    """

    EMPTY = -1
    ROOT = 0
    DRAFTED = 1


@dataclass
class DraftTree:
    """N nodes in topological order: a parent stands before its children, the root at index 0.

    Attributes:
        tokens_N: target token ids, int64.
        parents_N: index of the parent, int64; the root is its own parent.
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
        """The root and the `rows` best-scored nodes, see `chosen`."""
        return self.chosen(self.logp_N, 1 + rows)

    def chosen(self, score_N: Tensor, rows: int) -> "DraftTree":
        """The root and the best-scored nodes, by falling score; as many as asked for, where there are so many.

        A child that never scores above its parent stands after it, as the sort is stable. The result is a tree
        whatever the scores are: the root comes first, and a node that no number scores or whose parent is left out is
        EMPTY. torch would sort NaN first, and the rounding of a sum may lift a child above its parent.

        Args:
            score_N: the result's `logp_N`.
        """
        order_N = score_N.nan_to_num(nan=-torch.inf, neginf=-torch.inf)
        order_N[0] = torch.inf
        row_K = order_N.sort(descending=True, stable=True).indices[:rows]
        slot_N = torch.full_like(self.parents_N, rows)  # where the parent is left out
        slot_N[row_K] = torch.arange(len(row_K), device=row_K.device)
        parents_K, score_K = slot_N[self.parents_N[row_K]], score_N[row_K]
        lost_K = (parents_K == rows) | ~(score_K > -torch.inf)
        lost_K[0] = False
        return DraftTree(
            self.tokens_N[row_K],
            parents_K.masked_fill_(lost_K, 0),
            self.depths_N[row_K],
            score_K,
            self.sources_N[row_K].masked_fill_(lost_K, Source.EMPTY),
            self.paths_N[row_K],
        )

    def path_sums(self, values_N: Tensor, max_depth: int) -> Tensor:
        """[N] the sum of the values along each node's path; the root's must be 0. Doubling, as in `ancestors`."""
        jump_N = self.parents_N
        reach = 1
        while reach < max_depth:
            values_N = values_N + values_N.index_select(0, jump_N)
            jump_N = jump_N.index_select(0, jump_N)
            reach *= 2
        return values_N

    def first(self, rows: int) -> "DraftTree":
        """The tree of the first nodes."""
        return DraftTree(*(getattr(self, column.name)[:rows] for column in fields(self)))

    def ancestors(self, max_depth: int) -> Tensor:
        """[N, N] bool: row i marks node i and all its ancestors. Doubling: log2(max_depth) steps."""
        jump_N = self.parents_N
        ancestors_NN = torch.eye(len(self), dtype=torch.bool, device=jump_N.device)
        reach = 1
        while reach <= max_depth:
            ancestors_NN = ancestors_NN | ancestors_NN.index_select(0, jump_N)
            jump_N = jump_N.index_select(0, jump_N)
            reach *= 2
        return ancestors_NN


def root_tree(token_1: Tensor) -> DraftTree:
    """A tree of the root alone. token_1: the last emitted token, [1] int64."""
    zero = torch.zeros_like(token_1)
    return DraftTree(token_1, zero, zero, zero.float(), zero, zero)


def child_paths(parent_paths_M: Tensor, tokens_M: Tensor) -> Tensor:
    """Path keys of children from their parents' keys and their own tokens."""
    return torch.add(tokens_M, parent_paths_M, alpha=PATH_BASE) + 1


def drafted_tree(root_1: Tensor, tokens_C: Tensor, parents_C: Tensor, logp_C: Tensor, steps: int) -> DraftTree:
    """A drafted tree of lists, as engines and traces keep them.

    Args:
        root_1: the root's token.
        parents_C: of each candidate, the row of its parent in the tree, where the root is row 0.
        logp_C: cumulative.
        steps: the greatest depth.
    """
    tokens_N, parents_N = torch.cat((root_1.long(), tokens_C.long())), F.pad(parents_C.long(), (1, 0))
    depths_N, paths_N, sources_N = (torch.zeros_like(parents_N) for _ in range(3))
    for _ in range(steps):  # each makes one depth right
        depths_N[1:] = depths_N[parents_N[1:]] + 1
        paths_N[1:] = child_paths(paths_N[parents_N[1:]], tokens_N[1:])
    sources_N[1:] = Source.DRAFTED
    return DraftTree(tokens_N, parents_N, depths_N, F.pad(logp_C.float(), (1, 0)), sources_N, paths_N)


def merge(drafted: DraftTree, retrieved: DraftTree, rows: int) -> DraftTree:
    """Hangs up to `rows` retrieved nodes below the drafted tree's root (Graft Eq. 8).

    A retrieved node whose path was drafted already is the same node: it takes no place, and its children
    hang under the drafted twin. Its place goes to the next retrieved node in order of priority, so no two
    siblings share a token, which exact acceptance relies on.

    Args:
        drafted: root and drafted nodes.
        retrieved: root and retrieved nodes by priority, EMPTY where the matrix had no successor.
        rows: places for retrieved nodes; the result has len(drafted) + rows nodes, padded with EMPTY ones.
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


def pooled(trees: list[DraftTree], scores: list[Tensor]) -> DraftTree:
    """All nodes of several trees of one root, their scores as `logp_N`.

    A path that several trees hold is one node: it takes its best score, and the source of the first tree
    that has it. What repeats it stays, scored -inf and without children.

    Args:
        trees: each starts with the root.
        scores: per tree, a score of each node: 0 for the root, at most the parent's for others, -inf for EMPTY.
    """
    columns = [torch.cat(column) for column in zip(*map(_columns, trees), strict=True)]
    tokens_C, parents_C, depths_C, sources_C, paths_C = columns
    own, size = len(trees[0]), len(tokens_C)
    row_C = torch.arange(size, device=tokens_C.device)
    first_C, offset = row_C.clone(), own
    if size > own:  # the first tree repeats no path
        first_C[own:] = (paths_C[own:, None] == paths_C).to(torch.uint8).argmax(dim=1)
        for tree in trees[1:]:
            parents_C[offset : offset + len(tree)] += offset
            offset += len(tree)
    # A repeated node receives no score: it stays at -inf.
    score_C = torch.full((size,), -torch.inf, device=tokens_C.device)
    score_C.scatter_reduce_(0, first_C, torch.cat(scores), "amax")
    return DraftTree(tokens_C, first_C.index_select(0, parents_C), depths_C, score_C, sources_C, paths_C)


def best_chain(pool: DraftTree, max_depth: int, rows: int) -> DraftTree:
    """The root and the path below it with the most expected accepted nodes, padded with EMPTY ones.

    Args:
        pool: its `logp_N` is log P(accepted) of each node, as `pooled` leaves it.
        max_depth: bound on the depth of its nodes.
        rows: nodes of the result, the root included: a longer path is cut off.
    """
    found_N = pool.logp_N > -torch.inf
    # Nothing below what was not found was found either; a root is no accepted node.
    chance_N = torch.where(found_N, pool.logp_N, -torch.inf).exp()
    chance_N[0] = 0.0
    expected_N = pool.path_sums(chance_N, max_depth).masked_fill_(~found_N | (pool.depths_N >= rows), -1.0)
    on_path_N = pool.ancestors(max_depth).index_select(0, expected_N.argmax(dim=0, keepdim=True))[0]
    return pool.chosen(torch.where(on_path_N, pool.logp_N, -torch.inf), rows)


def _columns(tree: DraftTree) -> tuple[Tensor, ...]:
    return tree.tokens_N, tree.parents_N, tree.depths_N, tree.sources_N, tree.paths_N
