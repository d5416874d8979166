"""A round over buffers at fixed addresses: the functions of an eager round, in pieces that end where the host decides.

Lengths and positions are tensors on the device. KV caches are read by whole buckets, and masks hide the rows that are
not valid. Nothing here waits for the device, so each piece can be captured once and replayed.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ..noise import signed
from ..policy.plan import Plan
from ..policy.tree_builder import ScoredBuilder, TreeBuilder
from ..proposer import Opening, TokenSource
from ..retrieval.sources import SOURCES
from ..speculator import Speculation, Speculator, is_unsure, retrieve
from ..stats import GenerationStats, PhaseClock
from ..target.kv_cache import Span, TreeCache
from ..target.model import Target
from ..tree import DraftTree, root_tree
from ..verification import to_record
from .cuda_graph import CudaGraphs, changed
from .round import judge, keep
from .sampling import Sampler
from .state import DecodeState


def fresh_rows(depth: int) -> int:
    """Rows for positions that the head has not read: twice the most that one round commits."""
    return 2 * (depth + 1)


def slack_rows(plan: Plan, rows: int, depth: int) -> int:
    """Rows of either cache that a round may write after the committed ones."""
    return max(rows, fresh_rows(depth) + plan.topk * plan.num_steps)


class Buffers:
    """Tensors at fixed addresses, for one request at a time.

    Args:
        cache: of a request; its layout is copied.
        capacity: rows of the caches.
        rows, depth: most nodes, and greatest depth, of the trees.

    Attributes:
        cache: the target's keys and values.
        length_1, place_1, root_1, seed_1: int64; committed positions, emitted tokens, last token and seed.
        tree: the tree that is verified next.
        logp_D: log-probabilities of the tokens just emitted.
        head, noise_PV: None until a request needs them; the noise is that of the next round's draws.
        sources: by name, the sources whose state belongs to one request; made when a request first needs them.
        record: host memory that pieces write to: a draft's decision, then the result of a verification.
    """

    def __init__(self, cache: TreeCache, capacity: int, rows: int, depth: int, graphs: CudaGraphs) -> None:
        self.capacity, self.rows, self.depth = capacity, rows, depth
        self.graphs = graphs
        self.cache = cache.twin(capacity)
        device = self.cache.buffers[0].device
        self.length_1, self.place_1, self.root_1, self.seed_1 = torch.zeros((4, 1), dtype=torch.long, device=device)
        self.tree = changed(root_tree(self.root_1), lambda column: column.repeat(rows))
        self.logp_D = torch.zeros(depth + 1, device=device)
        self.record = graphs.host(2 + 2 * (depth + 1))
        self.head: Any | None = None
        self.sources: dict[str, TokenSource] = {}
        self.noise_PV: Tensor | None = None

    @property
    def fresh(self) -> int:
        """Rows for what the head has not read."""
        return fresh_rows(self.depth)

    def make_sources(self, names: Iterable[str], tables: dict[str, Any]) -> None:
        """Room for what these sources hold of a request, where there is none yet."""
        for name in set(names) - self.sources.keys():
            self.sources[name] = SOURCES[name].open(Opening(self.root_1[:0], self.capacity, tables))

    def make_noise(self, vocab_size: int) -> None:
        """Room for the noise of a round's draws, where there is none yet."""
        if self.noise_PV is None:
            self.noise_PV = torch.zeros(self.depth + 1, vocab_size, device=self.root_1.device)

    def take(self, state: DecodeState) -> None:
        """Takes over the request's cache and numbers."""
        if state.cache.buffers[0] is not self.cache.buffers[0]:
            state.cache.move_into(self.cache)
        self.length_1.fill_(state.cache.length)
        self.place_1.fill_(state.place)
        self.root_1.copy_(state.speculation.root_1)
        assert isinstance(state.sampler.seed, int)
        self.seed_1.fill_(signed(state.sampler.seed))
        self.foresee(state.sampler, state.place)

    def source(self, name: str, source: TokenSource) -> TokenSource:
        """A request's source over fixed buffers; what all requests share stands in some already."""
        if source.is_shared or source is self.sources[name]:
            return source
        self.sources[name].adopt(source)
        return self.sources[name]

    def foresee(self, sampler: Sampler, place: int | Tensor) -> None:
        """Makes the noise of the draws from this position of the output on."""
        if self.noise_PV is not None:
            places, vocab_size = self.noise_PV.shape
            noise = sampler.noise(place, places, vocab_size, self.noise_PV.device)
            if noise is not None:
                self.noise_PV.copy_(noise.gumbel_PV)

    def changing(self, sources: Iterable[TokenSource]) -> list[Tensor]:
        """What pieces change for good, these sources included; keys and values past the lengths do not count."""
        tensors = [self.length_1, self.place_1, self.root_1]
        if self.head is not None:
            tensors += self.head.fixed.tensors
        if self.noise_PV is not None:
            tensors.append(self.noise_PV)
        return tensors + [tensor for source in sources for tensor in source.tensors]


@dataclass(frozen=True)
class FixedRound:
    """The pieces of one plan's rounds, over one bucket of the KV cache. Each returns what later pieces read.

    Attributes:
        size: rows of the bucket.
        sources: by name; they propose, and learn.
        drafts: whether the head is kept up to date.
        logprobs: whether those of emitted tokens are wanted.
    """

    buffers: Buffers
    target: Target
    speculator: Speculator
    builder: TreeBuilder
    sampler: Sampler
    size: int
    sources: Mapping[str, TokenSource]
    drafts: bool
    logprobs: bool

    @property
    def plan(self) -> Plan:
        return self.builder.plan

    @property
    def state(self) -> DecodeState:
        """The request over the fixed buffers, as an eager round would know it."""
        buffers, noise, nothing = self.buffers, None, self.buffers.root_1[:0]
        if buffers.noise_PV is not None and not self.sampler.greedy:
            noise = self.sampler.adding(buffers.noise_PV)
        head = buffers.head if self.drafts else None
        if head is not None:
            head.topk = self.plan.topk
            head.span = Span(head.fixed.length_1, self.size)
        buffers.cache.span = Span(buffers.length_1, self.size)
        speculation = Speculation(self.builder, head, self.sources, buffers.root_1, nothing, nothing, noise)
        logprobs: list[Tensor] | None = [] if self.logprobs else None
        stats = GenerationStats()
        clock = PhaseClock(stats.seconds, buffers.root_1.device)
        return DecodeState(speculation, buffers.cache, self.sampler, None, logprobs, stats, clock)

    def look_up(self, checkpoint: Any) -> list[DraftTree]:
        """A first checkpoint without the head: what was retrieved, and to the host whether that is enough."""
        retrieved = retrieve(self.state.speculation, checkpoint)
        assert isinstance(self.builder, ScoredBuilder)
        self._say(self.builder.skips_drafting(checkpoint, retrieved))
        return retrieved

    def draft(
        self, checkpoint: Any, draft: Any | None, retrieved: list[DraftTree] | None
    ) -> tuple[Any, list[DraftTree]]:
        """The steps up to a checkpoint, and to the host whether to stop there; what it retrieves, meanwhile."""
        request, graphs = self.state.speculation, self.buffers.graphs
        with graphs.aside():
            found = retrieve(request, checkpoint) if retrieved is None else retrieved
        (grown,) = self.speculator.advance([request], [draft], checkpoint)
        if checkpoint is not self.plan.checkpoints[-1]:
            self._say(is_unsure(grown, checkpoint))
        graphs.join()
        return grown, found

    def catch_up(self) -> None:
        """The head reads what is pending, where nothing is drafted."""
        request = self.state.speculation
        self.speculator.head.read([request.head], [request.fresh])

    def build(self, checkpoint: Any, draft: Any | None, retrieved: list[DraftTree] | None) -> None:
        """The tree to verify."""
        request = self.state.speculation
        request.retrieved = retrieved
        drafted = root_tree(request.root_1) if draft is None else draft.candidates
        ((_, tree),) = self.speculator.build([request], [(checkpoint, drafted)])
        for column in fields(tree):
            kept: Tensor = getattr(self.buffers.tree, column.name)
            kept[: checkpoint.num_draft_tokens].copy_(getattr(tree, column.name))

    def verify(self, nodes: int, depth: int) -> None:
        """One target pass, acceptance, and all that follows from it; the round's record to the host.

        Args:
            depth: bound on the tree's.
        """
        buffers, state = self.buffers, self.state
        tree = buffers.tree.first(nodes) if nodes > 1 else root_tree(buffers.root_1)
        ancestors_NN = tree.ancestors(depth)
        verified = judge(state, tree, self.target.verify(tree, ancestors_NN, state.cache), ancestors_NN, depth)
        logp_D, count_1 = keep(state, verified, None), verified.acceptance.count[None]
        if self.logprobs:
            buffers.logp_D[: depth + 1] = logp_D
        buffers.length_1 += count_1
        buffers.place_1 += count_1
        buffers.foresee(self.sampler, buffers.place_1)
        record = to_record(tree, verified.acceptance)
        buffers.record[1 : 1 + len(record)].copy_(record, non_blocking=True)

    def _say(self, value: Tensor) -> None:
        """Tells the host one number."""
        self.buffers.record[:1].copy_(value.long().reshape(1), non_blocking=True)
