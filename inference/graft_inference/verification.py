"""Exact acceptance: draw the target's token at every node, then follow the children that match.

The tree is fixed before the draws, and siblings differ in their tokens, so the emitted tokens are an
ancestral sample of the target: unchanged output at any temperature (Graft section 3; speculative
sampling with point proposals). sampling.py draws.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .retrieval.sources import name_of
from .tree import DraftTree, Source

Emitted = tuple[list[int], list[str]]
"""Tokens that a round emits for one prompt, and where each came from."""


@dataclass
class Acceptance:
    """One verification's result, of fixed size, so that nothing waits for the device.

    Attributes:
        count: accepted nodes with the root: also the number of emitted tokens. 0-d int64.
        path_D: indices of the accepted nodes by depth; entries past `count` are meaningless. [depth+1]
        emitted_D: the tokens drawn at those nodes; the last valid one is the bonus token. [depth+1]
        accepted_N: which nodes were accepted, bool.
    """

    count: Tensor
    path_D: Tensor
    emitted_D: Tensor
    accepted_N: Tensor


def accept(tree: DraftTree, ancestors_NN: Tensor, drawn_N: Tensor, max_depth: int) -> Acceptance:
    """Follows the drawn tokens down the tree.

    Args:
        tree: N nodes; siblings carry different tokens.
        ancestors_NN: `tree.ancestors(max_depth)`.
        drawn_N: the target's token at every node.
        max_depth: bound on the depth of the tree.
    """
    matches_N = (tree.tokens_N == drawn_N.index_select(0, tree.parents_N)) & (tree.sources_N != Source.EMPTY)
    matches_N[0] = True
    accepted_N = (matches_N | ~ancestors_NN).all(dim=1)
    # Accepted nodes form a chain: at most one at each depth. Others go to a slot past the end.
    depth_N = torch.where(accepted_N, tree.depths_N, max_depth + 1)
    path_D = torch.zeros(max_depth + 2, dtype=torch.long, device=drawn_N.device)
    path_D = path_D.scatter(0, depth_N, torch.arange(len(tree), device=drawn_N.device))[: max_depth + 1]
    return Acceptance(accepted_N.sum(), path_D, drawn_N.index_select(0, path_D), accepted_N)


def to_record(tree: DraftTree, acceptance: Acceptance) -> Tensor:
    """What the host reads after a verification: count, emitted tokens, their sources. [1 + 2 * (depth+1)] int64"""
    return torch.cat((acceptance.count[None], acceptance.emitted_D, tree.sources_N.index_select(0, acceptance.path_D)))


def of_record(record: Sequence[int]) -> Emitted:
    """Reads the emitted tokens and their sources from such a record on the host."""
    count, depths = record[0], len(record) // 2
    # Emitted token i is the node at depth i + 1; the last one is nobody's proposal.
    sources = record[2 + depths : 1 + depths + count]
    return list(record[1 : 1 + count]), [*map(name_of, sources), "bonus"]


Taught = tuple[Tensor, Tensor, Tensor | None]
"""Rows of a tree, the tokens there and how many observations each counts for (None: one), as sources learn them."""


def accepted_rows(tree: DraftTree, acceptance: Acceptance, count: int | None) -> Taught:
    """The rows that teach the sources where only accepted nodes do: the root and the accepted nodes.

    Args:
        count: number of accepted nodes, if the host knows it; else rows are padded to a fixed shape by repeating the
            root in front, with weight 0.
    """
    if count is not None:
        path_A = acceptance.path_D[:count]
        return path_A, tree.tokens_N[path_A], None
    depths = len(acceptance.path_D)
    row_D = torch.arange(depths, device=acceptance.path_D.device) - (depths - acceptance.count)
    path_D = acceptance.path_D[row_D.clamp(min=0)]
    return path_D, tree.tokens_N[path_D], (row_D >= 0).long()


def every_row(tree: DraftTree, acceptance: Acceptance, count: int | None) -> Taught:
    """The rows that teach the sources where every verified node does (Graft Eq. 12).

    Where a token has several rows, the last one counts. So accepted nodes come after all others, and nodes that are
    earlier in the tree after later ones. EMPTY nodes repeat the root, which is the very last.
    """
    row_N = torch.arange(len(tree), device=tree.tokens_N.device)
    empty_N = tree.sources_N == Source.EMPTY
    rank_N = acceptance.accepted_N * 2 * len(tree) - row_N
    order_N = rank_N.argsort()
    tokens_N = torch.where(empty_N, tree.tokens_N[0], tree.tokens_N)
    return order_N, tokens_N[order_N], (~empty_N[order_N]).long()
