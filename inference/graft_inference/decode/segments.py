"""A round in pieces that read nothing on the host: functions of tensors at fixed addresses, of fixed shapes.

They do what the engine's eager round does, which is their reference. Lengths and places lie on the device; caches are
read by whole buckets, of which masks hide what is not valid.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ..heads.eagle3.drafter import Draft, Layer
from ..heads.eagle3.static_drafter import StaticDrafter
from ..noise import Noise
from ..policy.plan import Plan
from ..policy.tree_builder import ScoredBuilder, TreeBuilder
from ..proposer import TokenSource
from ..speculator import Speculation, retrieve
from ..target.bucket_cache import BucketCache, BucketVisibility, allocated
from ..target.kv_cache import TreeCache
from ..target.model import Target
from ..tree import DraftTree, root_tree
from ..verification import accept, to_record
from .cuda_graph import CudaGraphs
from .sampling import Sampler


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
        drafter, noise_PV: None until a request needs them; the noise is that of the next round's draws.
        sources: by name, once a request needed them: those that hold what is a request's alone.
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
        self.sources: dict[str, TokenSource] = {}
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

    def changing(self, sources: Iterable[TokenSource]) -> list[Tensor]:
        """What segments change for good, these sources included; keys and values past the lengths do not count."""
        tensors = [self.length_1, self.place_1, self.root_1]
        if self.drafter is not None:
            drafter = self.drafter
            tensors += [drafter.length_1, drafter.pending_1, drafter.tokens_F, drafter.aux_FE]
        if self.noise_PV is not None:
            tensors.append(self.noise_PV)
        return tensors + [tensor for source in sources for tensor in source.tensors]


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
        sources: asked and taught, by name.
        drafts: whether the head is kept up to date.
        logprobs: whether those of emitted tokens are wanted.
    """

    static: Statics
    target: Target
    plan: Plan
    builder: TreeBuilder
    sampler: Sampler
    size: int
    cache: BucketCache
    sources: Mapping[str, TokenSource]
    drafts: bool
    logprobs: bool

    @property
    def request(self) -> Speculation:
        """The request as the speculator knows it."""
        nothing = self.static.root_1[:0]
        noise = self._noise
        return Speculation(self.builder, None, self.sources, self.static.root_1, nothing, nothing, noise)

    def look_up(self, checkpoint: Any) -> list[Tensor]:
        """A first checkpoint without the head: what was retrieved, and to the host whether that is enough."""
        retrieved = retrieve(self.request, checkpoint)
        assert isinstance(self.builder, ScoredBuilder)
        self._say(self.builder.skips_drafting(checkpoint, retrieved))
        return flat(retrieved)

    def draft(self, checkpoint: Any, layers: Sequence[Layer], retrieved: list[DraftTree] | None) -> list[Tensor]:
        """The steps up to a checkpoint, and to the host whether to stop there; what it retrieves, meanwhile.

        Returns:
            columns of the new layers, then of the retrieved trees, if there are any and they were not given.
        """
        static, drafter, width = self.static, self._drafter, self.plan.topk
        with static.graphs.aside():
            found = retrieve(self.request, checkpoint) if retrieved is None else []
        grown = list(layers)
        if not grown:
            grown.append(drafter.begin(self.size, width, self._shared_noise))
        while len(grown) < checkpoint.steps:
            grown.append(drafter.deepen(grown[-1], len(grown), width, self._shared_noise))
        if checkpoint is not self.plan.checkpoints[-1]:
            self._say(Draft(static.root_1, grown).confidence <= checkpoint.threshold)
        static.graphs.join()
        return flat(grown[len(layers) :]) + flat(found)

    def catch_up(self) -> list[Tensor]:
        """The head reads what is pending, where nothing is drafted."""
        self._drafter.read(self.size)
        return []

    def graft(self, checkpoint: Any, layers: Sequence[Layer], retrieved: list[DraftTree] | None) -> list[Tensor]:
        """The tree to verify."""
        static = self.static
        drafted = Draft(static.root_1, list(layers)).candidates if layers else root_tree(static.root_1)
        if retrieved is None:
            retrieved = retrieve(self.request, checkpoint)
        tree = self.builder.build(checkpoint, drafted, retrieved)
        for kept, column in zip(columns(static.tree), columns(tree), strict=True):
            kept[: checkpoint.num_draft_tokens].copy_(column)
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
        self.request.observe(tree, output.logits_NV, output.aux_NE, acceptance)
        count_1, path_D, emitted_D = acceptance.count[None], acceptance.path_D, acceptance.emitted_D
        if depth:
            self._keep_branch(path_D)
        if self.drafts:
            self._drafter.append(emitted_D, output.aux_NE[path_D], count_1)
        if logp_N is not None:
            static.logp_D[: depth + 1] = logp_N[path_D]
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

    @property
    def _noise(self) -> Noise | None:
        if self.sampler.greedy:
            return None
        assert self.static.noise_PV is not None
        return self.sampler.adding(self.static.noise_PV)

    @property
    def _shared_noise(self) -> Noise | None:
        return self.request.shared_noise

    @property
    def _drafter(self) -> StaticDrafter:
        assert self.static.drafter is not None
        return self.static.drafter

    def _say(self, value: Tensor) -> None:
        """Tells the host one number."""
        self.static.record[:1].copy_(value.long().reshape(1), non_blocking=True)
