"""A round in pieces that read nothing on the host: functions of tensors at fixed addresses, of fixed shapes.

They do what the engine's eager round does, which is their reference. Lengths and places lie on the device; caches are
read by whole buckets, of which masks hide what is not valid.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ..heads.eagle3.drafter import Draft, Layer
from ..heads.eagle3.static_drafter import StaticDrafter
from ..noise import Noise
from ..policy.plan import Plan, Stage
from ..policy.tree_builder import Grafter
from ..retrieval.prompt_lookup import Echo
from ..retrieval.successor_matrix import SuccessorMatrix
from ..target.bucket_cache import BucketCache, BucketVisibility, allocated
from ..target.kv_cache import TreeCache
from ..target.model import Target
from ..tree import DraftTree, root_tree
from .cuda_graph import CudaGraphs
from .sampling import Sampler
from .verification import Acceptance, accept, learn, to_record


def fresh_rows(depth: int) -> int:
    """Room for one commit more, while at most half of it is taken."""
    return 2 * (depth + 1)


def slack_rows(plan: Plan, rows: int, depth: int) -> int:
    """Rows of either cache that a round may write behind the committed ones."""
    return max(rows, fresh_rows(depth) + plan.topk * plan.num_steps)


class Statics:
    """Buffers at fixed addresses, for one request at a time.

    Args:
        cache: of a request; its layout is copied.
        capacity: rows of the caches.
        rows, depth: greatest of the trees.

    Attributes:
        length_1, place_1, root_1, seed_1: int64, what a request calls so.
        tree: what is verified next.
        drafter, successors, echo, noise_PV: None until a request needs them; the matrix is that of a request alone,
            the noise that of the next round's draws.
        record: host memory that segments write to: what a draft told, then what a verification did.
    """

    def __init__(self, cache: TreeCache, capacity: int, rows: int, depth: int, graphs: CudaGraphs) -> None:
        self.capacity, self.rows, self.depth = capacity, rows, depth
        self.graphs = graphs
        self.buffers = allocated(cache, capacity)
        device = self.buffers[0].device
        self.length_1, self.place_1, self.root_1, self.seed_1 = torch.zeros((4, 1), dtype=torch.long, device=device)
        self.tree = DraftTree(*(column.repeat(rows) for column in columns(root_tree(self.root_1))))
        self.logp_D = torch.zeros(depth + 1, device=device)
        self.record = graphs.host(2 + 2 * (depth + 1))
        self.drafter: StaticDrafter | None = None
        self.successors: SuccessorMatrix | None = None
        self.echo: Echo | None = None
        self.noise_PV: Tensor | None = None

    @property
    def fresh(self) -> int:
        """Rows for what the head has not read."""
        return fresh_rows(self.depth)

    def foresee(self, sampler: Sampler, place: int | Tensor) -> None:
        """Makes the noise of the draws from this place on."""
        if self.noise_PV is not None:
            places, vocab_size = self.noise_PV.shape
            noise = sampler.noise(place, places, vocab_size, self.noise_PV.device)
            if noise is not None:
                self.noise_PV.copy_(noise.gumbel_PV)

    def changing(self, successors: SuccessorMatrix | None) -> list[Tensor]:
        """What segments change for good, this matrix included; keys and values past the lengths do not count."""
        tensors = [self.length_1, self.place_1, self.root_1]
        if self.drafter is not None:
            drafter = self.drafter
            tensors += [drafter.length_1, drafter.pending_1, drafter.tokens_F, drafter.aux_FE]
        if self.echo is not None:
            tensors += [self.echo.text_S, self.echo.end_1]
        if self.noise_PV is not None:
            tensors.append(self.noise_PV)
        return tensors + (successors.tensors if successors is not None else [])


def columns(value: DraftTree | Layer) -> list[Tensor]:
    return [getattr(value, column.name) for column in fields(value)]


def flat(values: Sequence[DraftTree] | Sequence[Layer]) -> list[Tensor]:
    return [column for value in values for column in columns(value)]


@dataclass(frozen=True)
class Segments:
    """The pieces of one plan's rounds, over one bucket.

    Each returns what later pieces read, if anything.

    Attributes:
        size: of the bucket.
        cache: the target's, so far.
        successors: looked up and, if `learns`, taught.
        echo: the request's own text, where it is searched.
        drafts: whether the head is kept up to date.
        logprobs: whether those of emitted tokens are wanted.
    """

    static: Statics
    target: Target
    plan: Plan
    grafter: Grafter
    sampler: Sampler
    size: int
    cache: BucketCache
    successors: SuccessorMatrix | None
    echo: Echo | None
    learns: bool
    drafts: bool
    logprobs: bool

    def look_up(self, stage: Stage) -> list[Tensor]:
        """A first stage without the head: what was retrieved, and to the host whether that is enough."""
        retrieved = self._retrieve(stage)
        self._say(self.grafter.skips_drafting(stage, retrieved))
        return flat(retrieved)

    def _retrieve(self, stage: Stage) -> list[DraftTree]:
        return self.grafter.retrieve(stage, self.successors, self.static.root_1, self.echo, self._shared_noise)

    def draft(self, stage: Stage, layers: Sequence[Layer], retrieved: list[DraftTree] | None) -> list[Tensor]:
        """The passes up to a stage, and to the host whether to stop there; what this stage retrieves, meanwhile.

        Returns:
            columns of the new layers, then of the retrieved trees, if there are any and they were not given.
        """
        static, drafter, width = self.static, self._drafter, self.plan.topk
        with static.graphs.aside():
            found = self._retrieve(stage) if retrieved is None else []
        grown = list(layers)
        if not grown:
            grown.append(drafter.begin(self.size, width, self._shared_noise))
        while len(grown) < stage.passes:
            grown.append(drafter.deepen(grown[-1], len(grown), width, self._shared_noise))
        if stage is not self.plan.stages[-1]:
            self._say(Draft(static.root_1, grown).confidence <= stage.threshold)
        static.graphs.join()
        return flat(grown[len(layers) :]) + flat(found)

    def catch_up(self) -> list[Tensor]:
        """The head reads what is pending, where nothing is drafted."""
        self._drafter.read(self.size)
        return []

    def graft(self, stage: Stage, layers: Sequence[Layer], retrieved: list[DraftTree] | None) -> list[Tensor]:
        """The tree to verify."""
        static = self.static
        drafted = Draft(static.root_1, list(layers)).candidates if layers else root_tree(static.root_1)
        if retrieved is None:
            retrieved = self._retrieve(stage)
        tree = self.grafter.tree(stage, drafted, retrieved)
        for kept, column in zip(columns(static.tree), columns(tree), strict=True):
            kept[: stage.rows].copy_(column)
        return []

    def verify(self, rows: int, depth: int) -> list[Tensor]:
        """One target pass, acceptance, and all that follows from it; the round's record to the host.

        Args:
            depth: bound on the tree's.
        """
        static, cache = self.static, self.cache
        tree = static.tree.first(rows) if rows > 1 else root_tree(static.root_1)
        ancestors_NN = tree.ancestors(depth)
        cache.place.rows_N = static.length_1 + torch.arange(rows, device=static.length_1.device)
        positions_N = self.target.positions(static.length_1, tree)
        visible = BucketVisibility(positions_N, static.length_1, cache.place.rows_N, ancestors_NN, self.size)
        output = self.target.forward(tree.tokens_N, cache, visible)
        drawn_N, logp_N = self.sampler.draw(tree, output.logits_NV, self._noise, depth, None, self.logprobs)
        acceptance = accept(tree, ancestors_NN, drawn_N, depth)
        self._learn(tree, output.logits_NV, acceptance)
        count_1, path_D, emitted_D = acceptance.count[None], acceptance.path_D, acceptance.emitted_D
        if depth:
            self._keep_branch(path_D)
        if self.drafts:
            self._drafter.append(emitted_D, output.aux_NE[path_D], count_1)
        if logp_N is not None:
            static.logp_D[: depth + 1] = logp_N[path_D]
        if self.echo is not None:
            self.echo.read(emitted_D, count_1)
        static.root_1.copy_(emitted_D.index_select(0, count_1 - 1))
        static.length_1 += count_1
        static.place_1 += count_1
        static.foresee(self.sampler, static.place_1)
        record = to_record(tree, acceptance)
        static.record[1 : 1 + len(record)].copy_(record, non_blocking=True)
        return []

    def _keep_branch(self, path_D: Tensor) -> None:
        """Moves the accepted rows behind the committed ones. Rows of no account follow, which are overwritten."""
        static = self.static
        to_D = static.length_1 + torch.arange(len(path_D), device=path_D.device)
        from_D = static.length_1 + path_D
        for buffer in static.buffers:
            buffer.index_copy_(2, to_D, buffer.index_select(2, from_D))

    def _learn(self, tree: DraftTree, logits_NV: Tensor, acceptance: Acceptance) -> None:
        if self.successors is None or not self.learns:
            return
        if not self.plan.learns_accepted:
            learn(self.successors, tree, logits_NV, acceptance)
            return
        # The root takes the place of what is missing: before itself, where it changes nothing.
        missing = len(acceptance.path_D) - acceptance.count
        row_D = torch.arange(len(acceptance.path_D), device=logits_NV.device) - missing
        row_D = acceptance.path_D[row_D.clamp(min=0)]
        self.successors.update(tree.tokens_N[row_D], logits_NV[row_D])
        if self.successors.learned_V is not None:
            self.successors.learned_V.index_add_(0, tree.tokens_N[:1], -missing[None])

    @property
    def _noise(self) -> Noise | None:
        if self.sampler.greedy:
            return None
        assert self.static.noise_PV is not None
        return self.sampler.adding(self.static.noise_PV)

    @property
    def _shared_noise(self) -> Noise | None:
        return self._noise if self.plan.shares_noise else None

    @property
    def _drafter(self) -> StaticDrafter:
        assert self.static.drafter is not None
        return self.static.drafter

    def _say(self, value: Tensor) -> None:
        """Tells the host one number."""
        self.static.record[:1].copy_(value.long().reshape(1), non_blocking=True)
