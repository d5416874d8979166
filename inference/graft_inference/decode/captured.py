"""Rounds as CUDA graphs: one per piece and bucket of the caches, captured when first needed, then replayed.

A *piece* is a part of a round between two decisions of the host. The host reads a small record when a round ends, and
one number at each decision in between, and then replays the next piece. Nothing else waits for the device. A round ends
by starting the next round's draft, up to its first decision, whose number comes with the record. So a round that stops
drafting there needs one host read.
"""

import time
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from ..errors import GraftError
from ..policy.tree_builder import ScoredBuilder
from ..proposer import TokenSource
from ..speculator import Speculator
from ..target.kv_cache import TreeCache, bucket
from ..target.model import SWITCHING_ROPE, Target, rope_type
from ..tree import DraftTree
from ..verification import Emitted, of_record
from .cuda_graph import CannotCapture, CudaGraphs, KeptGraphs
from .fixed import Buffers, FixedRound, slack_rows
from .sampling import Sampler
from .state import DecodeState

CAPTURED_PROCESSORS = {TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper}
"""They read nothing but the scores, and nothing on the host."""
MOST_SAMPLINGS = 16
"""Settings of the sampling that graphs are kept for."""


@dataclass
class Drafted:
    """How far the draft of a round has come.

    Attributes:
        pieces: the round's pieces.
        place: index of the checkpoint that was reached; -1 before the first.
        stops: whether drafting stops there; None as long as the host has not read it.
    """

    pieces: FixedRound
    place: int = -1
    draft: Any | None = None
    retrieved: list[DraftTree] | None = None
    stops: bool | None = None

    @property
    def checkpoint(self) -> Any:
        return self.pieces.plan.checkpoints[max(0, self.place)]

    @property
    def is_last(self) -> bool:
        return self.checkpoint is self.pieces.plan.checkpoints[-1]


class CapturedRounds:
    """Rounds as CUDA graphs, for one request at a time; other requests that are under way run eagerly.

    Args:
        graphs: captures and replays functions.
    """

    def __init__(self, target: Target, speculator: Speculator, graphs: CudaGraphs) -> None:
        self.target = target
        self.speculator = speculator
        self.graphs = graphs
        self._tables: dict[str, Any] = {}
        self._buffers: Buffers | None = None
        self._owner: Callable[[], TreeCache | None] = lambda: None
        self._current: Callable[[], DecodeState | None] = lambda: None
        self._place = self._pending = 0
        self._begun: Drafted | None = None
        # By builders, of which a plan has one and which hash faster.
        self._captured = KeptGraphs(graphs)
        self._refused: dict[tuple, str] = {}
        self._samplings: set[tuple] = set()

    @property
    def captures(self) -> int:
        """Graphs captured so far, failed attempts included."""
        return self._captured.captures

    def round(self, state: DecodeState, tables: dict[str, Any]) -> Emitted | None:
        """Runs one round.

        Args:
            tables: the engine's tables for sources, which are used in place where the request has no copy.

        Returns:
            The tokens that the round emits and the source of each. None if the round has to run eagerly: then nothing
            has changed, and `stats.uncaptured` says why.
        """
        start, captures = time.perf_counter(), self.captures
        reason = self._obstacle(state)
        if reason is None:
            sampling = self._sampling(state.sampler)
            key = (state.speculation.builder, sampling, bucket(state.cache.length))
            reason = self._refused.get(key)
        if reason is None:
            try:
                self._share(tables)
                emitted, seconds = self._round(state, self._adopt(state), sampling)
            except (CannotCapture, GraftError) as error:
                self._current = lambda: None
                reason = self._refused[key] = str(error)
            else:
                if self.captures > captures:
                    seconds = {}  # of no phase, but of capturing
                state.stats.captured += 1
                for phase, taken in seconds.items():
                    state.stats.seconds[phase] += taken
                state.stats.seconds["commit"] += time.perf_counter() - start - sum(seconds.values())
                return emitted
        state.stats.uncaptured = reason
        return None

    def _sampling(self, sampler: Sampler) -> tuple:
        """The sampler's settings. With too many that differ all graphs go, which hold memory."""
        settings = _settings(sampler)
        if settings not in self._samplings and len(self._samplings) == MOST_SAMPLINGS:
            self._samplings.clear()
            self._captured.clear()
            self._refused.clear()
        self._samplings.add(settings)
        return settings

    def _obstacle(self, state: DecodeState) -> str | None:
        """What is known not to work."""
        if self.target.is_split:
            return "the target is spread over several devices"
        if rope_type(self.target.config) in SWITCHING_ROPE:
            return "the target's RoPE looks at every position before it is applied"
        if any(type(processor) not in CAPTURED_PROCESSORS for processor in state.sampler.processors):
            return "a logits processor may read more than the scores"
        if self._owner() not in (None, state.cache):
            return "the graphs serve another request that is under way"
        return None

    def _share(self, tables: dict[str, Any]) -> None:
        """Graphs on other tables would read and write those."""
        if any(tables[name] is not self._tables.get(name) for name in tables):
            self._captured.clear()
            self._tables = tables
            if self._buffers is not None:
                self._buffers.sources = {}

    def _adopt(self, state: DecodeState) -> Buffers:
        """The fixed buffers, made those of this request where they are not yet."""
        buffers = self._room(state)
        if self._current() is state and self._place == state.place:
            return buffers
        self._begun = None
        self._owner, self._current = weakref.ref(state.cache), weakref.ref(state)
        self._place, request = state.place, state.speculation
        buffers.take(state)
        if request.head is not None and buffers.head is not None:
            tokens_A, aux_AE = request.head.caught_up(*request.fresh)
            if len(tokens_A) > 1:
                self.speculator.head.read([request.head], [(tokens_A[:-1], aux_AE[:-1])])
            buffers.head.adopt(request.head, tokens_A[-1:], aux_AE[-1:])
            self._leave_pending(state, buffers.head, 1)
        request.sources = {name: buffers.source(name, source) for name, source in request.sources.items()}
        return buffers

    def _room(self, state: DecodeState) -> Buffers:
        """Buffers that are large enough. New ones cost every graph."""
        request, buffers = state.speculation, self._buffers
        plan = request.builder.plan
        depth, rows = request.builder.max_depth, plan.num_draft_tokens
        if buffers is not None:
            depth, rows = max(depth, buffers.depth), max(rows, buffers.rows)
        capacity = bucket(state.cache.tree_layers[0].capacity + slack_rows(plan, rows, depth))
        if buffers is None or capacity > buffers.capacity or (depth, rows) != (buffers.depth, buffers.rows):
            capacity = max(capacity, buffers.capacity if buffers else 0)
            self._captured.clear()
            self._buffers = buffers = None
            self._current = lambda: None
            buffers = self._buffers = Buffers(state.cache, capacity, rows, depth, self.graphs)
        if request.head is not None and buffers.head is None:
            buffers.head = self.speculator.head.open(plan.topk, 0, buffers.capacity).fix(buffers.fresh)
        buffers.make_sources(request.sources, self._tables)
        if not state.sampler.greedy:
            buffers.make_noise(self.target.config.vocab_size)
        return buffers

    def _round(self, state: DecodeState, buffers: Buffers, sampling: tuple) -> tuple[Emitted, dict[str, float]]:
        """What was emitted, and the seconds that the pieces of each phase took.

        Args:
            sampling: the sampler's settings.
        """
        graphs, request = self.graphs, state.speculation
        drafted = self._resumed(state, buffers)
        pieces = drafted.pieces
        times = [graphs.now()]
        drafted = self._draft(drafted, sampling)
        checkpoint, read = drafted.checkpoint, self._pending if drafted.draft else 0
        if request.head is not None and not drafted.draft and self._pending > buffers.fresh // 2:
            self._run(pieces, ("catch up", pieces.size), pieces.catch_up)
            read = self._pending
        times.append(graphs.now())
        nodes = checkpoint.num_draft_tokens
        if nodes > 1:
            key = ("graft", checkpoint.steps, *self._key(pieces, sampling))
            given = drafted.draft, drafted.retrieved
            self._run(pieces, key, lambda: pieces.build(checkpoint, *given))
        times.append(graphs.now())
        depth = request.builder.max_depth
        asked = (*_keys(pieces.sources), request.builder.plan.learns_accepted)
        key = ("verify", pieces.size, nodes, depth, pieces.drafts, asked, pieces.logprobs, sampling)
        self._run(pieces, key, lambda: pieces.verify(nodes, depth))
        times.append(graphs.now())
        self._begin(state, buffers, sampling, depth + 1)
        times.append(graphs.now())
        graphs.wait()
        told, *record = buffers.record[: 2 + 2 * (depth + 1)].tolist()
        if self._begun is not None and not self._begun.is_last:
            self._begun.stops = bool(told)
        draft, graft, verify, ahead = (graphs.seconds(start, end) for start, end in pairwise(times))
        tokens, sources = of_record(record)
        self._commit(state, buffers, len(tokens), read)
        state.note(tokens, checkpoint)
        return (tokens, sources), {"draft": draft + ahead, "graft": graft, "verify": verify}

    def _pieces(self, state: DecodeState, buffers: Buffers, more: int = 0) -> FixedRound:
        """Over the bucket that a round needs once so many more positions are committed."""
        size = bucket(
            state.cache.length + more + slack_rows(state.speculation.builder.plan, buffers.rows, buffers.depth)
        )
        return FixedRound(
            buffers=buffers,
            target=self.target,
            speculator=self.speculator,
            builder=state.speculation.builder,
            sampler=Sampler(state.sampler.processors, state.sampler.greedy, buffers.seed_1),
            size=size,
            sources=state.speculation.sources,
            drafts=state.speculation.head is not None,
            logprobs=state.logprobs is not None,
        )

    def _resumed(self, state: DecodeState, buffers: Buffers) -> Drafted:
        """The draft that the last round began, or none, where it was begun for another plan."""
        begun, self._begun = self._begun, None
        if begun is not None and begun.pieces.builder is state.speculation.builder:
            return begun
        if begun is not None and state.speculation.head is not None and buffers.head is not None:
            # What it has read on the device the host never took note of: it is read again.
            buffers.head.fixed.length_1.fill_(state.speculation.head.length)
            buffers.head.fixed.count_1.fill_(self._pending)
        return Drafted(self._pieces(state, buffers))

    def _begin(self, state: DecodeState, buffers: Buffers, sampling: tuple, count: int) -> None:
        """Starts the next round's draft on what this round commits.

        Args:
            count: positions that are committed at most.
        """
        if not state.speculation.builder.plan.drafts or state.speculation.head is None:
            return
        with suppress(CannotCapture):  # the next round meets it at its beginning, where it can still run eagerly
            self._begun = self._step(Drafted(self._pieces(state, buffers, count)), sampling)

    def _draft(self, drafted: Drafted, sampling: tuple) -> Drafted:
        """Drafts on from checkpoint to checkpoint; the passes after the last one needed are never replayed."""
        pieces = drafted.pieces
        if not pieces.drafts or not pieces.plan.drafts:
            return drafted
        while drafted.place < 0 or not (drafted.is_last or self._stops(drafted)):
            drafted = self._step(drafted, sampling)
        return drafted

    def _step(self, drafted: Drafted, sampling: tuple) -> Drafted:
        """Replays the piece up to the next checkpoint."""
        pieces, place = drafted.pieces, drafted.place + 1
        checkpoint, key = pieces.plan.checkpoints[place], self._key(pieces, sampling)
        if checkpoint.steps == 0:
            found = self._run(pieces, ("look up", *key), lambda: pieces.look_up(checkpoint))
            return Drafted(pieces, place, None, found)
        given = drafted.draft, drafted.retrieved if isinstance(pieces.builder, ScoredBuilder) else None
        draft, retrieved = self._run(
            pieces, ("draft", checkpoint.steps, *key), partial(pieces.draft, checkpoint, *given), given
        )
        return Drafted(pieces, place, draft, retrieved)

    def _key(self, pieces: FixedRound, sampling: tuple) -> tuple:
        """What tells the pieces before the verification apart."""
        told = not pieces.sampler.greedy and pieces.plan.shares_noise
        return pieces.builder, pieces.size, _keys(pieces.sources), sampling if told else None

    def _run(self, pieces: FixedRound, key: tuple, function: Callable[[], Any], given: Any = None) -> Any:
        """What a piece returned, from its graph.

        Args:
            given: what it was given.
        """
        buffers = pieces.buffers
        known = (given, buffers.noise_PV, buffers.root_1)
        return self._captured.run(key, function, known, lambda: buffers.changing(pieces.sources.values()))

    def _stops(self, drafted: Drafted) -> bool:
        """What the piece up to this checkpoint told the host: one read, unless the last round's brought it."""
        if drafted.stops is None:
            self.graphs.wait()
            drafted.stops = bool(drafted.pieces.buffers.record[0])
        return drafted.stops

    def _commit(self, state: DecodeState, buffers: Buffers, count: int, read: int) -> None:
        """Tells the request, which may go on eagerly, what has happened on the device.

        Args:
            count: positions committed.
            read: positions that the head has read.
        """
        state.cache.commit(count)
        state.place += count
        self._place = state.place
        request = state.speculation
        request.root_1 = buffers.root_1
        if request.head is not None and buffers.head is not None:
            request.head.advance(read)
            self._leave_pending(state, buffers.head, self._pending + count - read)
        if state.logprobs is not None:
            state.logprobs.append(buffers.logp_D[:count].clone())

    def _leave_pending(self, state: DecodeState, head: Any, count: int) -> None:
        """So many positions are yet to be read by the head, eagerly too if it comes to that."""
        self._pending = count
        request = state.speculation
        request.fresh_tokens_A, request.fresh_aux_AE = head.fixed.tokens_F[:count], head.fixed.aux_FE[:count]


def _keys(sources: Mapping[str, TokenSource]) -> tuple:
    """What tells the sources of requests apart."""
    return tuple((name, source.is_shared, source.learns) for name, source in sources.items())


def _settings(sampler: Sampler) -> tuple:
    """What tells samplers apart, the seed excepted."""
    processors = ((type(processor), *sorted(vars(processor).items())) for processor in sampler.processors)
    return sampler.greedy, *processors
