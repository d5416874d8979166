"""From the candidates of both sources to the tree that is verified, as a plan says."""

import torch
from torch import Tensor

from .ngrams import NgramSource
from .policy import Plan, Stage
from .retrieval import SuccessorMatrix, Template
from .tree import DraftTree, Source, compete, merge


class Grafter:
    """A plan's templates and scale, ready on the device."""

    def __init__(self, plan: Plan, device: torch.device) -> None:
        self.plan = plan
        self.scale = plan.scale
        # By passes, which tell a plan's stages apart and hash faster than templates.
        self.depths = {stage.passes: plan.depth(stage) for stage in plan.stages}
        if self.scale is None:
            self._templates = {stage.passes: Template(list(stage.template), device) for stage in plan.stages}
            return
        shared = Template(list(self.scale.template), device)
        self._templates = {stage.passes: shared for stage in plan.stages}
        self._retrieved_T2 = _table(self.scale.retrieved, device)[shared.depths_T]
        self._drafted_D2 = _table(self.scale.drafted, device)
        self._widths = {stage.passes: torch.tensor(stage.widths, device=device) for stage in plan.stages}
        self._prices = {stage.passes: torch.tensor(stage.prices, device=device) for stage in plan.stages}

    def retrieve(
        self, stage: Stage, successors: SuccessorMatrix | NgramSource | None, root_1: Tensor
    ) -> DraftTree | None:
        """The candidates that the source has for this stage; scored by `logp_N` where the plan has a scale."""
        template = self._templates[stage.passes]
        if successors is None or len(template) == 1:
            return None
        tree = successors.expand(root_1, template)
        if self.scale:
            tree.logp_N = score(self._retrieved_T2, tree.logp_N)
        return tree

    def skips_drafting(self, stage: Stage, retrieved: DraftTree) -> Tensor:
        """Whether what was retrieved promises so many tokens that the head is not asked, [1] bool."""
        return (retrieved.logp_N.exp().sum() > stage.threshold)[None]

    def tree(self, stage: Stage, drafted: DraftTree, retrieved: DraftTree | None) -> DraftTree:
        """The best nodes, as many as the stage verifies at most.

        Args:
            drafted: every node the head proposed.
            retrieved: what `retrieve` found, if anything.
        """
        if self.scale is None:
            best = drafted.best(stage.drafted)
            return best if retrieved is None else merge(best, retrieved, stage.retrieved)
        trees, scores = [drafted], [score(self._drafted_D2[drafted.depths_N], drafted.logp_N)]
        if retrieved is not None:
            trees.append(retrieved)
            scores.append(retrieved.logp_N)
        tree = compete(trees, scores, stage.rows)
        if self.plan.drafted_only:
            tree.sources_N = tree.sources_N.masked_fill(tree.sources_N == Source.RETRIEVED, Source.EMPTY)
        return tree

    def best_width(self, stage: Stage, tree: DraftTree) -> Tensor:
        """Which of the stage's widths has the most expected tokens above its price, [1] int64."""
        expected_N = tree.logp_N.exp().cumsum(0)
        worth = expected_N[self._widths[stage.passes] - 1] - self._prices[stage.passes]
        return worth.argmax(dim=0, keepdim=True)


def _table(pairs: tuple[tuple[float, float], ...], device: torch.device) -> Tensor:
    """[depth + 1, 2] slopes and offsets; the root, at depth 0, scores its log-probability of 0."""
    return torch.tensor([(1.0, 0.0), *pairs], device=device)


def score(table_N2: Tensor, logp_N: Tensor) -> Tensor:
    """log P(accepted) of each node; see `Scale`."""
    return torch.addcmul(table_N2[:, 1], table_N2[:, 0], logp_N)
