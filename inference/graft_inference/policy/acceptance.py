"""The acceptance model: P(accepted) of every candidate, on one scale for the head and all sources.

    P(accepted | parent accepted) = sigmoid(slope * logit(q) + offset),  q the proposer's probability of the step.

A candidate's own P(accepted) is the product along its path, so it is never above its parent's. Therefore the best nodes
always form a tree, whatever was fitted.
"""

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from ..checked import check_types, exactly
from ..errors import GraftError
from ..proposer import Proposal
from ..retrieval.sources import SOURCES, number_of
from ..template import RankPaths, Template, check_template
from ..tree import DraftTree, Source

LEAST = 1e-4
"""Probabilities this close to 0 and 1 count as that close."""


@dataclass(frozen=True)
class SourceModel:
    """Which guesses a plan asks of one source, and how likely each is to be accepted (docs/policy.md).

    Attributes:
        name: of the source.
        template: the rank paths that the source is asked for.
        slopes: by depth, from 1; empty for a source that has evidence in place of probabilities.
        offsets: one row for each kind of evidence (one row for a source with probabilities), by depth.
        ranks: what a node's rank among its siblings adds to its offset, by rank.

    Raises:
        GraftError: an unknown source, slopes that are not positive, or a table that is too short.
    """

    name: str
    template: RankPaths
    slopes: tuple[float, ...]
    offsets: tuple[tuple[float, ...], ...]
    ranks: tuple[float, ...]

    def __post_init__(self) -> None:
        check_types(self)
        if self.name not in SOURCES:
            raise GraftError(f"a plan asks the source {self.name!r}, but there are only {', '.join(SOURCES)}")
        check_template(self.template, f"the template of {self.name}")
        kinds = SOURCES[self.name].kinds
        if len(self.offsets) != max(1, kinds) or (len(self.slopes) > 0) != (kinds == 0):
            raise GraftError(
                f"the acceptance model of {self.name} must have {max(1, kinds)} rows of offsets, and slopes only where "
                "the source has probabilities: calibrate again"
            )
        if any(slope <= 0 for slope in self.slopes):
            raise GraftError(f"the slopes of {self.name} must be positive: calibrate again")
        if any(path[-1] >= len(self.ranks) for path in self.template):
            raise GraftError(f"{self.name} has {len(self.ranks)} known ranks, its template uses more: calibrate again")
        depths = [len(row) for row in (*self.offsets, *[self.slopes] * (kinds == 0))]
        if self.depth > min(depths):
            raise GraftError(f"{self.name} has {min(depths)} known depths, its template has {self.depth}")
        if len(set(depths)) > 1:
            raise GraftError(f"the acceptance model of {self.name} has rows of {depths} depths: calibrate again")

    @property
    def depth(self) -> int:
        """Length of the longest rank path."""
        return max(map(len, self.template), default=0)


@dataclass(frozen=True)
class AcceptanceModel:
    """P(accepted) of every candidate, on one scale for the head and all sources (docs/policy.md).

    Attributes:
        drafted: (slope, offset) of the head's nodes at depth 1, 2, ...
        sources: those that are asked; the first wins where several propose the same.

    Raises:
        GraftError: slopes that are not positive, or a source twice.
    """

    drafted: tuple[tuple[float, float], ...] = ()
    sources: tuple[SourceModel, ...] = ()

    def __post_init__(self) -> None:
        check_types(self)
        if any(slope <= 0 for slope, _ in self.drafted):
            raise GraftError("the slopes of drafted nodes must be positive: calibrate again")
        names = [source.name for source in self.sources]
        if len(set(names)) != len(names):
            raise GraftError(f"a plan asks each source once, not {names}")

    @property
    def depth(self) -> int:
        """Depth of the deepest retrieved node; 0 if nothing is retrieved."""
        return max((source.depth for source in self.sources), default=0)

    @property
    def candidates(self) -> int:
        """Nodes that the sources may add to what the head proposes."""
        return sum(len(source.template) for source in self.sources)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        sources = tuple(exactly(SourceModel, source) for source in values["sources"])
        return exactly(cls, {**values, "sources": sources})


class SourceScorer:
    """Computes P(accepted) of one source's proposals, with its model on a device."""

    def __init__(self, model: SourceModel, device: torch.device) -> None:
        self.template = Template(model.template, device, number_of(model.name))
        self._zero = torch.zeros((), device=device)
        self._known_KT: Tensor | None = None
        if SOURCES[model.name].kinds:
            self._known_KT = by_evidence(model).to(device)
        else:
            self._table_T2 = torch.tensor([(1.0, 0.0), *step_table(model)], device=device)

    def score(self, proposal: Proposal) -> DraftTree:
        """The proposed tree, its `logp_N` now log P(accepted)."""
        tree = proposal.tree
        if self._known_KT is not None:
            assert proposal.evidence_1 is not None
            tree.logp_N = self._known_KT.index_select(0, proposal.evidence_1)[0]
            return tree
        step_T = step_scores(self._table_T2, tree).masked_fill_(tree.sources_N == Source.EMPTY, -torch.inf)
        tree.logp_N = torch.where(self.template.lineage_TT, step_T, self._zero).sum(dim=1)
        return tree


def step_table(model: SourceModel) -> list[tuple[float, float]]:
    """Slope and offset of every path of the template, where the source has probabilities."""
    return [
        (model.slopes[len(path) - 1], model.offsets[0][len(path) - 1] + model.ranks[path[-1]])
        for path in model.template
    ]


def by_evidence(model: SourceModel) -> Tensor:
    """log P(accepted) of the root and every path of the template by kind of evidence, [kinds + 1, T]; at 0 -inf."""
    rows: dict[tuple[int, ...], int] = {(): 0} | {path: row for row, path in enumerate(model.template, 1)}
    logp_KT = torch.full((len(model.offsets) + 1, len(rows)), -torch.inf)
    logp_KT[:, 0] = 0.0
    offsets_KD = torch.tensor(model.offsets)
    for path, row in rows.items():
        if path:
            step_K = F.logsigmoid(offsets_KD[:, len(path) - 1] + model.ranks[path[-1]])
            logp_KT[1:, row] = logp_KT[1:, rows[path[:-1]]] + step_K
    return logp_KT


def step_scores(table_N2: Tensor, tree: DraftTree) -> Tensor:
    """log P(accepted | parent accepted) of each node; 0 for the root.

    Args:
        table_N2: slope and offset of each.
    """
    step_N = calibrated(table_N2, tree.logp_N - tree.logp_N.index_select(0, tree.parents_N))
    step_N[0] = 0.0
    return step_N


def calibrated(table_N2: Tensor, step_logp_N: Tensor) -> Tensor:
    """log P(accepted | parent accepted) from log-probabilities of steps, -inf where one is no number.

    Args:
        table_N2: slope and offset of each.
    """
    logit_N = torch.logit(step_logp_N.exp(), eps=LEAST)
    scores_N = F.logsigmoid(torch.addcmul(table_N2[..., 1], table_N2[..., 0], logit_N))
    return scores_N.nan_to_num_(nan=-torch.inf)
