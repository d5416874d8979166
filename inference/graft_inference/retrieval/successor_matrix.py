"""Retrieval from the successor matrix (Graft section 3.3; Token Recycling, arXiv 2408.08696)."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from ..errors import GraftError
from ..noise import LEAST, Noise
from ..proposer import Opening, Proposal, TokenSource
from ..template import Template
from ..tree import DraftTree


@dataclass
class SuccessorMatrix:
    """Row t holds the likely successors of token t, best first; -1 where none is known (Graft Eq. 9).

    Attributes:
        ids_VK: int32 [V, k].
        probs_VK: fp16 [V, k], their probabilities; None: only ids are kept, and nodes are not scored.
        learned_V: int64, number of observations that changed each row since the matrix was loaded.
        made_for: the target that it was built for, as its file says.
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
        """Looks up the template's nodes below the root: one gather per depth (Graft Eq. 10).

        Their `logp_N` is the cumulative log-probability where the matrix has probabilities (-inf for
        EMPTY rows), else 0.

        Args:
            root_1: the root's token, [1] int64.
            noise: of the draws; successors are then ranked by how likely they are to be drawn. Needs probabilities.
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
        """`expand`, each node's successors ranked by how likely they are to be drawn."""
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
            tokens_M: int64; the result for -1, an unknown token, is meaningless.
            noise: of the draws, where the successors likeliest to be drawn at that depth are wanted.
        """
        assert self.probs_VK is not None
        row_M = tokens_M.clamp(min=0)
        ids_MK, probs_MK = self.ids_VK.index_select(0, row_M), self.probs_VK.index_select(0, row_M).float()
        if noise is not None:
            return noise.ranked(ids_MK, probs_MK, depth, count)
        return ids_MK[:, :count], probs_MK[:, :count].clamp(min=LEAST).log()

    def update(self, tokens_M: Tensor, logits_MV: Tensor, weight_M: Tensor | None = None) -> None:
        """M[x] <- argtopk p(. | path to x) for every token the target has just read (Graft Eq. 12).

        The paper leaves conflicts open: where a token occurs twice, its later row wins.

        Args:
            tokens_M: tokens that the target has just read, int64.
            logits_MV: its logits after each of them.
            weight_M: number of observations that each row counts for, int64; None: one each.
        """
        top = logits_MV.topk(self.k, dim=-1)
        row_M = torch.arange(len(tokens_M), device=tokens_M.device)
        last_M = ((tokens_M[:, None] == tokens_M) * row_M).amax(dim=1)
        ids_MK = top.indices.index_select(0, last_M).to(torch.int32)
        if self.probs_VK is not None and self.learned_V is not None:
            seen_MK = (top.values.float() - logits_MV.float().logsumexp(dim=-1, keepdim=True)).exp()[last_M]
            # A target that overflows leaves no trace of it in later requests.
            self.probs_VK[tokens_M] = seen_MK.nan_to_num_(nan=0.0).to(self.probs_VK.dtype)
            self.learned_V.index_add_(0, tokens_M, torch.ones_like(tokens_M) if weight_M is None else weight_M)
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


class MatrixSource(TokenSource):
    """The source that proposes from the successor matrix, for one request.

    Args:
        learns: whether the target's logits update the matrix.
        is_shared: whether the matrix is the engine's own, and not a copy for this request.
    """

    name = "matrix"

    def __init__(self, matrix: SuccessorMatrix, learns: bool = True, is_shared: bool = False) -> None:
        self.matrix = matrix
        self.learns = learns
        self.is_shared = is_shared

    @classmethod
    def open(cls, opening: Opening) -> Self:
        matrix: SuccessorMatrix = opening.tables["matrix"]
        if opening.scope != "request":
            return cls(matrix, opening.scope != "frozen", is_shared=True)
        return cls(opening.kept.matrix if isinstance(opening.kept, cls) else matrix.clone())

    @classmethod
    def most_ranks(cls, tables: dict[str, Any]) -> int:
        return tables["matrix"].k

    @classmethod
    def can_score(cls, tables: dict[str, Any]) -> bool:
        return tables["matrix"].probs_VK is not None

    def propose(self, root_1: Tensor, template: Template, noise: Noise | None) -> Proposal:
        return Proposal(self.matrix.expand(root_1, template, noise))

    def learn(self, tokens_M: Tensor, logits_MV: Tensor, weight_M: Tensor | None = None) -> None:
        self.matrix.update(tokens_M, logits_MV, weight_M)

    def ranked(self, tokens_D: Tensor, noise: Noise | None) -> Tensor:
        if noise is None:
            return self.matrix.ids_VK[tokens_D]
        rows = enumerate(tokens_D.split(1), 1)
        return torch.cat([self.matrix.successors_of(row_1, self.matrix.k, noise, depth)[0] for depth, row_1 in rows])

    @property
    def tensors(self) -> list[Tensor]:
        return self.matrix.tensors


def save_table(path: Path, tensors: dict[str, Tensor], made_for: dict[str, Any] | None) -> None:
    """Writes a safetensors file, aside and renamed; `made_for` goes into its metadata as JSON."""
    aside = path.with_name(f".{path.name}.tmp")
    metadata = {"made_for": json.dumps(made_for, sort_keys=True)} if made_for else None
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, aside, metadata)
    aside.replace(path)
