"""Which nodes are retrieved: rank paths below the root."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import GraftError
from .tree import MAX_NODES, PATH_BASE, DraftTree, Source

RankPath = tuple[int, ...]
RankPaths = tuple[RankPath, ...]
"""The path (0, 2) is the third guess after the root's first one. Parents stand before children."""


def check_template(template: RankPaths, what: str) -> None:
    """Raises GraftError unless the rank paths are closed under parents, each there once, and not too many."""
    seen: set[RankPath] = {()}
    for path in template:
        if not path or path[:-1] not in seen or path in seen or path[-1] < 0:
            raise GraftError(f"{what} needs ranks from 0, and the parent of {list(path)} before it, each path once")
        seen.add(path)
    if len(template) >= MAX_NODES:
        raise GraftError(f"{what} has {len(template)} paths, over the limit of {MAX_NODES - 1}")


def chain(depth: int) -> RankPaths:
    """A template of one guess after the other."""
    return tuple((0,) * length for length in range(1, depth + 1))


def depth_template(counts: tuple[int, ...], max_rank: int = 7) -> RankPaths:
    """Rank paths with the given number of nodes at each depth, the likeliest first.

    At each depth the paths of least total rank (ties: lowest ranks first) whose parents are in.
    """
    template: list[RankPath] = []
    parents: list[RankPath] = [()]
    for count in counts:
        children = [(*parent, rank) for parent in parents for rank in range(max_rank + 1)]
        parents = sorted(children, key=lambda path: (sum(path), path))[:count]
        template += parents
    return tuple(sorted(template, key=lambda path: (len(path) + sum(path), path)))


@dataclass(frozen=True)
class Level:
    """The nodes of one depth.

    Attributes:
        ranks: of each node among its parent's guesses.
        parents: place of each node's parent among the nodes of the level above; of the root, 0.
        flat: place of each node in [distinct parents, ranks up to the template's greatest], flattened.
        above: place of each distinct parent among the nodes of the level above; of the root, 0.
    """

    ranks: Tensor
    parents: Tensor
    flat: Tensor
    above: Tensor


class Template:
    """A list of rank paths by priority, parents before children, with its tensors on a device.

    Args:
        rank_paths: parents before children; an empty list is a template of the root alone.
        source: of its nodes, as trees number it.

    Raises:
        GraftError: a path stands before its parent, or twice.
    """

    def __init__(self, rank_paths: RankPaths, device: torch.device, source: int) -> None:
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
        self.max_rank = max((path[-1] for path in rank_paths), default=-1)
        self.levels, by_level = [], [0]
        above: list[RankPath] = [()]
        for depth in range(1, max(map(len, paths)) + 1):
            level = [path for path in paths if len(path) == depth]
            inner = sorted({rows[path[:-1]] for path in level})
            self.levels.append(
                Level(
                    ranks=column([path[-1] for path in level]),
                    parents=column([above.index(path[:-1]) for path in level]),
                    flat=column([inner.index(rows[path[:-1]]) * (self.max_rank + 1) + path[-1] for path in level]),
                    above=column([above.index(paths[row]) for row in inner]),
                )
            )
            above = level
            by_level += [rows[path] for path in level]
        self.by_level_T = column(by_level).argsort()  # place of each row among the levels, one after the other
        powers = torch.zeros((len(paths), len(paths)), dtype=torch.long)
        for path in rank_paths:
            for depth in range(1, len(path) + 1):
                power = pow(PATH_BASE, len(path) - depth, 1 << 64)
                powers[rows[path], rows[path[:depth]]] = power - (power >> 63 << 64)
        self.powers_TT = powers.to(device)
        self.lineage_TT = (powers != 0).to(device)
        self._sources_T = column([Source.ROOT, *[source] * len(rank_paths)])

    def __len__(self) -> int:
        return len(self.parents_T)

    def found(self, tokens_L: Tensor, steps_L: Tensor | None) -> DraftTree:
        """Makes the retrieved tree from tokens that were found level by level, the root first.

        Args:
            tokens_L: int64, -1 where nothing was found. What hangs below that was not found either.
            steps_L: log-probability of each after its parent; None: not scored.
        """
        tokens_T = tokens_L.index_select(0, self.by_level_T)
        tokens_T.masked_fill_((self.lineage_TT & (tokens_T < 0)).any(dim=1), -1)
        if steps_L is None:
            return self.tree(tokens_T, None)
        step_T = steps_L.index_select(0, self.by_level_T)
        return self.tree(tokens_T, step_T.masked_fill_(tokens_T < 0, -torch.inf))

    def tree(self, tokens_T: Tensor, step_logp_T: Tensor | None) -> DraftTree:
        """Makes the retrieved tree of these tokens.

        Args:
            tokens_T: int64, -1 where nothing was found.
            step_logp_T: log-probability of each node after its parent; None: not scored, all 0.
        """
        sources_T = self._sources_T.masked_fill(tokens_T < 0, Source.EMPTY)
        if step_logp_T is None:
            logp_T = torch.zeros_like(tokens_T, dtype=torch.float32)
        else:
            logp_T = torch.where(self.lineage_TT, step_logp_T, 0.0).sum(dim=1)
        # child_paths level by level, as the polynomial that it is.
        paths_T = (self.powers_TT * (tokens_T + 1)).sum(dim=1)
        return DraftTree(tokens_T.clamp(min=0), self.parents_T, self.depths_T, logp_T, sources_T, paths_T)
