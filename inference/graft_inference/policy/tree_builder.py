"""From the candidates of both sources to the tree that is verified, as a plan says."""

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import GraftError
from ..noise import Noise
from ..retrieval.ngrams import NgramSource, NgramTable
from ..retrieval.prompt_lookup import Echo
from ..retrieval.successor_matrix import SuccessorMatrix, Template
from ..tree import DraftTree, Source, compete, merge
from .plan import Plan, Stage

LEAST = 1e-4
"""Probabilities this close to 0 and 1 count as that close."""


def check_sources(
    plan: Plan, draft_vocab_size: int, successors: SuccessorMatrix, ngrams: NgramTable | None = None
) -> None:
    """Raises GraftError where a plan asks for what the head and the other sources do not have."""
    if plan.drafts and plan.topk > draft_vocab_size:
        raise GraftError(
            f"the plan takes the {plan.topk} likeliest tokens of a head that knows {draft_vocab_size}: "
            "calibrate again with this head"
        )
    if plan.expands and plan.max_rank >= successors.k:
        raise GraftError(
            f"the plan's templates use successor rank {plan.max_rank}, but the matrix keeps {successors.k} "
            "successors: calibrate again with this corpus"
        )
    if plan.expands and plan.scale and successors.probs_VK is None:
        raise GraftError("the plan scores retrieved nodes, but the matrix keeps no probabilities: build it again")
    if plan.ngrams and (ngrams is None or successors.probs_VK is None):
        raise GraftError(
            "the plan follows longer contexts, but the engine has no n-gram table or its matrix no probabilities: "
            "build the corpus with corpus.ngrams=true"
        )


class Grafter:
    """A plan's templates and scale, ready on the device."""

    def __init__(self, plan: Plan, device: torch.device) -> None:
        self.plan = plan
        self.scale = plan.scale
        # By passes, which tell a plan's stages apart and hash faster than templates.
        self.depths = {stage.passes: plan.depth(stage) for stage in plan.stages}
        self.max_depth = max(self.depths.values())
        if self.scale is None:
            self._templates = {stage.passes: Template(list(stage.template), device) for stage in plan.stages}
            return
        shared = Template(list(self.scale.template), device)
        self._templates = {stage.passes: shared for stage in plan.stages}
        retrieved = [(1.0, 0.0)]
        for path in self.scale.template:
            slope, offset = self.scale.retrieved[len(path) - 1]
            retrieved.append((slope, offset + self.scale.ranks[path[-1]]))
        self._retrieved_T2 = torch.tensor(retrieved, device=device)
        # A root's slope and offset are never used.
        self._drafted_D2 = torch.tensor([(1.0, 0.0), *self.scale.drafted], device=device)
        chain = [(0,) * depth for depth in range(1, self.scale.echo_depth + 1)]
        self._chain = Template(chain, device, Source.LOOKUP)
        # Where nothing matched, nothing is proposed; the root stands first.
        nothing = [-torch.inf] * self.scale.echo_depth
        self._echo_ME = torch.tensor([[0.0, *row] for row in (nothing, *self.scale.echo)], device=device)
        self._zero = torch.zeros((), device=device)

    def retrieve(
        self,
        stage: Stage,
        successors: SuccessorMatrix | NgramSource | None,
        root_1: Tensor,
        echo: Echo | None = None,
        noise: Noise | None = None,
    ) -> list[DraftTree]:
        """The candidates that each source has for this stage; scored by `logp_N` where the plan has a scale.

        Args:
            noise: what the sources are told of the draws.
        """
        trees = []
        template = self._templates[stage.passes]
        if successors is not None and len(template) > 1:
            tree = successors.expand(root_1, template, noise)
            trees.append(tree)
            if self.scale:
                step_T = step_scores(self._retrieved_T2, tree).masked_fill_(tree.sources_N == Source.EMPTY, -torch.inf)
                tree.logp_N = torch.where(template.lineage_TT, step_T, self._zero).sum(dim=1)
        if echo is not None and self.plan.echoes:
            trees.append(self._repeated(echo, root_1))
        return trees

    def _repeated(self, echo: Echo, root_1: Tensor) -> DraftTree:
        """What the request's own text says, as a chain."""
        tokens_E, length_1 = echo.find(len(self._chain) - 1)
        tree = self._chain.tree(torch.cat((root_1, tokens_E)), None)
        tree.logp_N = self._echo_ME.index_select(0, length_1)[0]
        return tree

    def skips_drafting(self, stage: Stage, retrieved: list[DraftTree]) -> Tensor:
        """Whether what was retrieved promises so many tokens that the head is not asked, [1] bool.

        The source that promises most speaks: they foresee the same tokens.
        """
        promises = torch.stack([tree.logp_N.exp().sum() for tree in retrieved])
        return promises.amax(dim=0, keepdim=True) > stage.threshold

    def tree(self, stage: Stage, drafted: DraftTree, retrieved: list[DraftTree]) -> DraftTree:
        """The best nodes, as many as the stage verifies.

        Args:
            drafted: every node the head proposed.
            retrieved: what `retrieve` found.
        """
        if self.scale is None:
            best = drafted.best(stage.drafted)
            return merge(best, retrieved[0], stage.retrieved) if retrieved else best
        step_N = step_scores(self._drafted_D2.index_select(0, drafted.depths_N), drafted)
        own_N = drafted.path_sums(step_N, stage.passes)
        tree = compete([drafted, *retrieved], [own_N, *(tree.logp_N for tree in retrieved)], stage.rows)
        if self.plan.drafted_only:
            tree.sources_N = tree.sources_N.masked_fill(tree.sources_N > Source.DRAFTED, Source.EMPTY)
        return tree


def step_scores(table_N2: Tensor, tree: DraftTree) -> Tensor:
    """log P(accepted | parent accepted) of each row, see `Scale`; 0 for the root."""
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
