"""Retrieval from the successor matrix (Graft section 3.3; Token Recycling, arXiv 2408.08696)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import GraftError
from .tree import DraftTree, Source, child_paths

RankPath = tuple[int, ...]


class Template:
    """A prefix-closed list of rank paths, by priority: which retrieved nodes a tree gets.

    The path (0, 2) is the third successor of the root's first successor.

    Args:
        rank_paths: parents before children; an empty list is a template of the root alone.

    Raises:
        GraftError: a path stands before its parent, or twice.
    """

    def __init__(self, rank_paths: list[RankPath], device: torch.device) -> None:
        rows: dict[RankPath, int] = {(): 0}
        for path in rank_paths:
            if path[:-1] not in rows or path in rows:
                raise GraftError(f"template path {list(path)} needs its parent before it, and to be there once")
            rows[path] = len(rows)
        paths = list(rows)

        def column(values: list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.long, device=device)

        self.parents_T = column([rows[path[:-1]] for path in paths])
        self.depths_T = column([len(path) for path in paths])
        self.depth = max(map(len, paths))
        self.levels = []
        for depth in range(1, self.depth + 1):
            level = [path for path in paths if len(path) == depth]
            self.levels.append(
                (
                    column([rows[path] for path in level]),
                    column([rows[path[:-1]] for path in level]),
                    column([path[-1] for path in level]),
                )
            )
        self.max_rank = max((path[-1] for path in rank_paths), default=-1)

    def __len__(self) -> int:
        return len(self.parents_T)


@dataclass
class SuccessorMatrix:
    """Row t holds the likely successors of token t, best first; -1 where none is known (Graft Eq. 9).

    Attributes:
        ids_VK: int32 [V, k].
    """

    ids_VK: Tensor

    @classmethod
    def empty(cls, vocab_size: int, k: int, device: torch.device) -> "SuccessorMatrix":
        return cls(torch.full((vocab_size, k), -1, dtype=torch.int32, device=device))

    def clone(self) -> "SuccessorMatrix":
        return SuccessorMatrix(self.ids_VK.clone())

    def expand(self, root_1: Tensor, template: Template) -> DraftTree:
        """Retrieved nodes below the root: one gather per depth (Graft Eq. 10).

        Args:
            root_1: the root's token, [1] int64.
        """
        tokens_T = root_1.expand(len(template)).clone()
        paths_T = torch.zeros_like(tokens_T)
        for rows, parents, ranks in template.levels:
            parent_tokens = tokens_T[parents]
            # An unknown successor is -1, and so are all its descendants.
            known = parent_tokens >= 0
            child = self.ids_VK[parent_tokens.clamp(min=0), ranks].long()
            tokens_T[rows] = torch.where(known, child, -1)
            paths_T[rows] = child_paths(paths_T[parents], tokens_T[rows])
        sources_T = torch.where(tokens_T >= 0, Source.RETRIEVED, Source.EMPTY)
        sources_T[0] = Source.ROOT
        return DraftTree(
            tokens_T.clamp(min=0),
            template.parents_T,
            template.depths_T,
            torch.zeros_like(tokens_T, dtype=torch.float32),
            sources_T,
            paths_T,
        )

    def update(self, tokens_M: Tensor, logits_MV: Tensor) -> None:
        """M[x] <- argtopk p(. | path to x) for every token the target has just read (Graft Eq. 12).

        The paper leaves conflicts open: where a token occurs twice, its later row wins.

        Args:
            tokens_M: tokens just read by the target, int64.
            logits_MV: its logits after each of them.
        """
        successors_MK = logits_MV.topk(self.ids_VK.shape[1], dim=-1).indices.to(torch.int32)
        row_M = torch.arange(len(tokens_M), device=tokens_M.device)
        last_V = torch.zeros(len(self.ids_VK), dtype=torch.long, device=tokens_M.device)
        last_V.scatter_reduce_(0, tokens_M, row_M, "amax")
        self.ids_VK[tokens_M] = successors_MK[last_V[tokens_M]]
