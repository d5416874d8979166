"""Retrieval from the successor matrix (Graft section 3.3; Token Recycling, arXiv 2408.08696)."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from ..errors import GraftError
from ..noise import LEAST, Noise
from ..tree import PATH_BASE, DraftTree, Source

RankPath = tuple[int, ...]


@dataclass(frozen=True)
class Level:
    """The nodes of one depth, as rows of the template.

    Attributes:
        ranks: of each node among its parent's successors.
        parents: place of each node's parent among the nodes of the level above; of the root, 0.
        flat: place of each node in [distinct parents, ranks up to the template's greatest], flattened.
        above: place of each distinct parent among the nodes of the level above; of the root, 0.
        parents_above: place of their parents among the distinct parents of the level above; of the root's, 0.
    """

    ranks: Tensor
    parents: Tensor
    flat: Tensor
    above: Tensor
    parents_above: Tensor


class Template:
    """A prefix-closed list of rank paths, by priority: which retrieved nodes a tree gets.

    The path (0, 2) is the third successor of the root's first successor.

    Args:
        rank_paths: parents before children; an empty list is a template of the root alone.
        source: of its nodes.

    Raises:
        GraftError: a path stands before its parent, or twice.
    """

    def __init__(self, rank_paths: list[RankPath], device: torch.device, source: Source = Source.MATRIX) -> None:
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
        above_inner = [0]
        for depth in range(1, max(map(len, paths)) + 1):
            level = [path for path in paths if len(path) == depth]
            inner = sorted({rows[path[:-1]] for path in level})
            self.levels.append(
                Level(
                    ranks=column([path[-1] for path in level]),
                    parents=column([above.index(path[:-1]) for path in level]),
                    flat=column([inner.index(rows[path[:-1]]) * (self.max_rank + 1) + path[-1] for path in level]),
                    above=column([above.index(paths[row]) for row in inner]),
                    parents_above=column([above_inner.index(rows[paths[row][:-1]]) for row in inner]),
                )
            )
            above, above_inner = level, inner
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
        """The retrieved tree of what was found, level by level, the root first.

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
        """The retrieved tree of these tokens.

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


@dataclass
class SuccessorMatrix:
    """Row t holds the likely successors of token t, best first; -1 where none is known (Graft Eq. 9).

    Attributes:
        ids_VK: int32 [V, k].
        probs_VK: fp16 [V, k], their probabilities; None: only ids are kept, and nodes are not scored.
        learned_V: int64, observations behind each row since the matrix was loaded.
        made_for: the target it belongs to, as its file says it.
    """

    ids_VK: Tensor
    probs_VK: Tensor | None = None
    learned_V: Tensor | None = None
    made_for: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.probs_VK is not None and self.learned_V is None:
            self.learned_V = torch.zeros(len(self.ids_VK), dtype=torch.long, device=self.ids_VK.device)

    @classmethod
    def empty(cls, vocab_size: int, k: int, device: torch.device) -> "SuccessorMatrix":
        return cls(torch.full((vocab_size, k), -1, dtype=torch.int32, device=device))

    @property
    def k(self) -> int:
        return self.ids_VK.shape[1]

    @property
    def tensors(self) -> list[Tensor]:
        """All that an update changes."""
        return [tensor for tensor in (self.ids_VK, self.probs_VK, self.learned_V) if tensor is not None]

    def clone(self) -> "SuccessorMatrix":
        return self._each(Tensor.clone)

    def to(self, device: torch.device) -> "SuccessorMatrix":
        return self._each(lambda tensor: tensor.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> "SuccessorMatrix":
        probs_VK = None if self.probs_VK is None else change(self.probs_VK)
        learned_V = None if self.learned_V is None else change(self.learned_V)
        return replace(self, ids_VK=change(self.ids_VK), probs_VK=probs_VK, learned_V=learned_V)

    def expand(self, root_1: Tensor, template: Template, noise: Noise | None = None) -> DraftTree:
        """Retrieved nodes below the root: one gather per depth (Graft Eq. 10).

        Their `logp_N` is the cumulative log-probability where the matrix has probabilities (-inf for
        EMPTY rows), else 0.

        Args:
            root_1: the root's token, [1] int64.
            noise: of the draws; ranks are then those of what will be drawn. Needs probabilities.
        """
        if noise is not None and self.probs_VK is not None:
            return self._foresee(root_1, template, noise)
        ids_X, tokens, places = self.ids_VK.view(-1), [root_1], [root_1[:0]]
        for level in template.levels:
            parent_M = tokens[-1].index_select(0, level.parents)
            places.append(torch.add(level.ranks, parent_M, alpha=self.k))
            tokens.append(ids_X.take(places[-1]).long())
        if self.probs_VK is None:
            return template.found(torch.cat(tokens), None)
        prob_P = self.probs_VK.view(-1).take(torch.cat(places)).float()
        # The root's own step is certain.
        return template.found(torch.cat(tokens), F.pad(prob_P.clamp_(min=LEAST).log_(), (1, 0)))

    def _foresee(self, root_1: Tensor, template: Template, noise: Noise) -> DraftTree:
        """`expand` with each node's successors in the order in which they are likely to be drawn."""
        tokens, steps = [root_1], [torch.zeros_like(root_1, dtype=torch.float32)]
        for depth, level in enumerate(template.levels, 1):
            row_M = tokens[-1].index_select(0, level.above)
            ids_MK, logp_MK = self.successors_of(row_M, template.max_rank + 1, noise, depth)
            tokens.append(ids_MK.take(level.flat).long())
            steps.append(logp_MK.take(level.flat))
        return template.found(torch.cat(tokens), torch.cat(steps))

    def successors_of(
        self, tokens_M: Tensor, count: int, noise: Noise | None = None, depth: int = 1
    ) -> tuple[Tensor, Tensor]:
        """The likeliest successors and their log-probabilities, [M, count]; ids are -1 where there are fewer.

        Args:
            tokens_M: int64; below an unknown one, -1, whatever is found means nothing.
            noise: of the draws, where the likeliest to be drawn at that depth are wanted.
        """
        assert self.probs_VK is not None
        row_M = tokens_M.clamp(min=0)
        ids_MK, probs_MK = self.ids_VK.index_select(0, row_M), self.probs_VK.index_select(0, row_M).float()
        if noise is not None:
            return noise.ranked(ids_MK, probs_MK, depth, count)
        return ids_MK[:, :count], probs_MK[:, :count].clamp(min=LEAST).log()

    def update(self, tokens_M: Tensor, logits_MV: Tensor) -> None:
        """M[x] <- argtopk p(. | path to x) for every token the target has just read (Graft Eq. 12).

        The paper leaves conflicts open: where a token occurs twice, its later row wins.

        Args:
            tokens_M: tokens just read by the target, int64.
            logits_MV: its logits after each of them.
        """
        top = logits_MV.topk(self.k, dim=-1)
        row_M = torch.arange(len(tokens_M), device=tokens_M.device)
        last_M = ((tokens_M[:, None] == tokens_M) * row_M).amax(dim=1)
        ids_MK = top.indices.index_select(0, last_M).to(torch.int32)
        if self.probs_VK is not None and self.learned_V is not None:
            seen_MK = (top.values.float() - logits_MV.float().logsumexp(dim=-1, keepdim=True)).exp()[last_M]
            # A target that overflows leaves no trace of it in later requests.
            self.probs_VK[tokens_M] = seen_MK.nan_to_num_(nan=0.0).to(self.probs_VK.dtype)
            self.learned_V.index_add_(0, tokens_M, torch.ones_like(tokens_M))
        self.ids_VK[tokens_M] = ids_MK

    def save(self, path: str | Path) -> None:
        """Writes what was learned since loading, for `corpus.merge` of build_corpus: `ids`, `probs`, `counts`.

        `counts` are the observations since loading; a row without any adds nothing when merged.

        Raises:
            GraftError: the matrix keeps no probabilities.
        """
        if self.probs_VK is None or self.learned_V is None:
            raise GraftError("this matrix keeps no probabilities, so there is nothing to merge: build the corpus again")
        tensors = {"ids": self.ids_VK, "probs": self.probs_VK, "counts": self.learned_V}
        save_table(Path(path), tensors, self.made_for)


def save_table(path: Path, tensors: dict[str, Tensor], made_for: dict[str, Any] | None) -> None:
    """Writes a safetensors file, aside and renamed; `made_for` goes into its metadata as JSON."""
    aside = path.with_name(f".{path.name}.tmp")
    metadata = {"made_for": json.dumps(made_for, sort_keys=True)} if made_for else None
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, aside, metadata)
    aside.replace(path)
