"""Builds the tree that is verified from the candidates of head and sources, as a plan says."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import GraftError
from ..noise import Noise
from ..proposer import TokenSource
from ..retrieval.sources import SOURCES, number_of
from ..template import Template
from ..tree import DraftTree, best_chain, merge, pooled
from .acceptance import SourceScorer, step_scores
from .plan import ChainPlan, Checkpoint, Plan, QuotaCheckpoint, QuotaPlan, ScoredPlan


def check_sources(plan: Plan, draft_vocab_size: int, tables: dict[str, Any], most_steps: int | None = None) -> None:
    """Raises GraftError where a plan asks head or sources for more than they have.

    Args:
        draft_vocab_size: number of tokens that the head can propose.
        tables: the bundle's tables for sources, by name.
        most_steps: most draft steps that the head can run; None: any number.
    """
    if most_steps is not None and plan.num_steps > most_steps:
        raise GraftError(
            f"the plan drafts {plan.num_steps} tokens in a row, but the head's blocks have {most_steps}: calibrate "
            f"again with policy.num_steps={most_steps} or less"
        )
    if plan.drafts and plan.topk > draft_vocab_size:
        raise GraftError(
            f"the plan takes the {plan.topk} likeliest tokens of a head that knows {draft_vocab_size}: "
            "calibrate again with this head"
        )
    for name in plan.sources:
        has, asked = SOURCES[name].most_ranks(tables), plan.most_ranks(name)
        if asked > has:
            raise GraftError(
                f"the plan asks the source {name} for {asked} guesses after a token, but it keeps {has}: "
                "calibrate again with this corpus"
            )
        if isinstance(plan, ScoredPlan) and not SOURCES[name].can_score(tables):
            raise GraftError(
                f"the plan scores what {name} retrieves, but its table keeps no probabilities: build it again"
            )


class TreeBuilder:
    """Builds the trees of one plan: what is retrieved, and which nodes are verified. `builder_of` makes the right kind.

    Attributes:
        depths: greatest possible depth of a tree, by the draft steps of its checkpoint.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        # By steps, which tell a plan's checkpoints apart and hash faster than templates.
        self.depths = {checkpoint.steps: plan.depth(checkpoint) for checkpoint in plan.checkpoints}
        self.max_depth = max(self.depths.values())

    def retrieve(
        self, checkpoint: Any, sources: Mapping[str, TokenSource], root_1: Tensor, noise: Noise | None
    ) -> list[DraftTree]:
        """Asks the sources for this checkpoint's candidates, one tree each.

        Args:
            root_1: the last emitted token, [1].
            noise: of the draws, where the plan shares it; else None.
        """
        raise NotImplementedError

    def build(self, checkpoint: Any, drafted: DraftTree, retrieved: list[DraftTree]) -> DraftTree:
        """Chooses the best nodes, as many as the checkpoint verifies.

        Args:
            drafted: the root and every node that the head proposed.
            retrieved: the result of `retrieve`.
        """
        raise NotImplementedError


class QuotaBuilder(TreeBuilder):
    """The paper's trees: the head's best nodes, and below the same root the first new ones of the template."""

    def __init__(self, plan: QuotaPlan, device: torch.device) -> None:
        super().__init__(plan)
        number = number_of("matrix")
        self._templates = {one.steps: Template(one.template, device, number) for one in plan.checkpoints}

    def retrieve(
        self, checkpoint: QuotaCheckpoint, sources: Mapping[str, TokenSource], root_1: Tensor, noise: Noise | None
    ) -> list[DraftTree]:
        template = self._templates[checkpoint.steps]
        if len(template) == 1 or "matrix" not in sources:
            return []
        return [sources["matrix"].propose(root_1, template, noise).tree]

    def build(self, checkpoint: QuotaCheckpoint, drafted: DraftTree, retrieved: list[DraftTree]) -> DraftTree:
        best = drafted.best(checkpoint.drafted)
        return merge(best, retrieved[0], checkpoint.retrieved) if retrieved else best


class ScoredBuilder(TreeBuilder):
    """Nodes of all sources compete by their P(accepted)."""

    def __init__(self, plan: ScoredPlan, device: torch.device) -> None:
        super().__init__(plan)
        self._scorers = {model.name: SourceScorer(model, device) for model in plan.acceptance.sources if model.template}
        # A root's slope and offset are never used.
        self._drafted_D2 = torch.tensor([(1.0, 0.0), *plan.acceptance.drafted], device=device)

    def retrieve(
        self, checkpoint: Checkpoint, sources: Mapping[str, TokenSource], root_1: Tensor, noise: Noise | None
    ) -> list[DraftTree]:
        """Their `logp_N` is log P(accepted)."""
        return [
            scorer.score(sources[name].propose(root_1, scorer.template, noise))
            for name, scorer in self._scorers.items()
            if name in sources
        ]

    def skips_drafting(self, checkpoint: Checkpoint, retrieved: list[DraftTree]) -> Tensor:
        """Whether the retrieved nodes are expected to give so many tokens that drafting is skipped, [1] bool.

        The expected number is that of the best source, not the sum: sources often propose the same tokens.
        """
        promises = torch.stack([tree.logp_N.exp().sum() for tree in retrieved])
        return promises.amax(dim=0, keepdim=True) > checkpoint.threshold

    def build(self, checkpoint: Checkpoint, drafted: DraftTree, retrieved: list[DraftTree]) -> DraftTree:
        pool = self._pool(checkpoint, drafted, retrieved)
        return pool.chosen(pool.logp_N, checkpoint.num_draft_tokens)

    def _pool(self, checkpoint: Checkpoint, drafted: DraftTree, retrieved: list[DraftTree]) -> DraftTree:
        """All candidates in one tree; their `logp_N` is log P(accepted)."""
        step_N = step_scores(self._drafted_D2.index_select(0, drafted.depths_N), drafted)
        own_N = drafted.path_sums(step_N, checkpoint.steps)
        return pooled([drafted, *retrieved], [own_N, *(tree.logp_N for tree in retrieved)])


class ChainBuilder(ScoredBuilder):
    """The best path through the nodes of all sources."""

    def build(self, checkpoint: Checkpoint, drafted: DraftTree, retrieved: list[DraftTree]) -> DraftTree:
        pool = self._pool(checkpoint, drafted, retrieved)
        return best_chain(pool, self.depths[checkpoint.steps], checkpoint.num_draft_tokens)


def builder_of(plan: Plan, device: torch.device) -> TreeBuilder:
    """The builder for this kind of plan."""
    if isinstance(plan, ChainPlan):
        return ChainBuilder(plan, device)
    return ScoredBuilder(plan, device) if isinstance(plan, ScoredPlan) else QuotaBuilder(plan, device)  # type: ignore[arg-type]
