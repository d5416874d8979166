"""Rounds as CUDA graphs: one per segment and bucket of the caches, captured when first needed, then replayed.

The host reads a small record when a round ends and a number at each decision on the way, and chooses the next
segment; nothing else waits for the device. A round ends by starting the next one's draft, up to its first decision,
which the record brings along: a round that stops there is one read.
"""

import time
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from ..errors import GraftError
from ..heads.eagle3.drafter import Layer
from ..heads.eagle3.static_drafter import StaticDrafter
from ..noise import signed
from ..policy.tree_builder import ScoredBuilder
from ..proposer import Opening, TokenSource
from ..retrieval.sources import SOURCES
from ..speculator import Speculator
from ..target.bucket_cache import BucketCache, bucket, move
from ..target.kv_cache import TreeCache
from ..target.model import SWITCHING_ROPE, Target, rope_type
from ..tree import DraftTree
from ..verification import Emitted, of_record
from .cuda_graph import CannotCapture, Captured, CudaGraphs, Function
from .sampling import Sampler
from .segments import Segments, Statics, slack_rows
from .state import DecodeState

CAPTURED_PROCESSORS = {TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper}
"""They read nothing but the scores, and nothing on the host."""
MOST_SAMPLINGS = 16
"""Settings of the sampling that graphs are kept for."""
COLUMNS = 6
"""Of a layer, and of a tree."""


@dataclass
class Drafted:
    """How far a round's draft is.

    Attributes:
        segments: those of the round.
        place: of the checkpoint that it has reached; -1 before the first.
        stops: what the segment up to there told; None where the host has not read it.
    """

    segments: Segments
    place: int = -1
    layers: list[Layer] = field(default_factory=list)
    retrieved: list[DraftTree] | None = None
    stops: bool | None = None

    @property
    def checkpoint(self) -> Any:
        return self.segments.plan.checkpoints[max(0, self.place)]

    @property
    def is_last(self) -> bool:
        return self.checkpoint is self.segments.plan.checkpoints[-1]


class CapturedRounds:
    """Serves one request at a time; another that is under way meanwhile runs eagerly.

    Args:
        graphs: what captures and replays.

    Attributes:
        captures: graphs captured so far, failed attempts included.
    """

    def __init__(self, target: Target, speculator: Speculator, graphs: CudaGraphs) -> None:
        self.target = target
        self.speculator = speculator
        self.graphs = graphs
        self._tables: dict[str, Any] = {}
        self._static: Statics | None = None
        self._caches: dict[int, BucketCache] = {}
        self._owner: Callable[[], TreeCache | None] = lambda: None
        self._current: Callable[[], DecodeState | None] = lambda: None
        self._place = self._pending = 0
        self._begun: Drafted | None = None
        self.captures = 0
        # By builders, of which a plan has one and which hash faster.
        self._captured: dict[tuple, Captured] = {}
        self._refused: dict[tuple, str] = {}
        self._samplings: set[tuple] = set()

    def round(self, state: DecodeState, tables: dict[str, Any]) -> Emitted | None:
        """The tokens that one round emits and where each came from.

        Args:
            tables: the engine's own, which are used in place where the request has no copy.

        Returns:
            None, and nothing has changed, where the round has to run eagerly: `stats.uncaptured` says why.
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
            if self._static is not None:
                self._static.sources = {}

    def _adopt(self, state: DecodeState) -> Statics:
        """The fixed buffers, made those of this request where they are not yet."""
        static = self._room(state)
        if self._current() is state and self._place == state.place:
            return static
        self._begun = None
        self._owner, self._current = weakref.ref(state.cache), weakref.ref(state)
        self._place, request = state.place, state.speculation
        if state.cache.buffers[0] is not static.buffers[0]:
            move(state.cache, static.buffers)
        static.length_1.fill_(state.cache.length)
        static.place_1.fill_(state.place)
        static.root_1.copy_(request.root_1)
        assert isinstance(state.sampler.seed, int)
        static.seed_1.fill_(signed(state.sampler.seed))
        static.foresee(state.sampler, state.place)
        if request.head is not None and static.drafter is not None:
            static.drafter.adopt(request.head, request.fresh_tokens_A, request.fresh_aux_AE)
            self._leave_pending(state, static.drafter, 1)
        request.sources = {name: self._fixed(name, source, static) for name, source in request.sources.items()}
        return static

    def _fixed(self, name: str, source: TokenSource, static: Statics) -> TokenSource:
        """The source over fixed buffers; what all requests share stands in some already."""
        if source.is_shared or source is static.sources[name]:
            return source
        static.sources[name].adopt(source)
        return static.sources[name]

    def _room(self, state: DecodeState) -> Statics:
        """Buffers that are large enough. New ones cost every graph."""
        request, static = state.speculation, self._static
        plan = request.builder.plan
        depth, rows = request.builder.max_depth, plan.num_draft_tokens
        if static is not None:
            depth, rows = max(depth, static.depth), max(rows, static.rows)
        capacity = bucket(state.cache.tree_layers[0].capacity + slack_rows(plan, rows, depth))
        if static is None or capacity > static.capacity or (depth, rows) != (static.depth, static.rows):
            capacity = max(capacity, static.capacity if static else 0)
            self._captured.clear()
            self._caches.clear()
            self._static = static = None
            self._current = lambda: None
            static = self._static = Statics(state.cache, capacity, rows, depth, self.graphs)
        if request.head is not None and static.drafter is None:
            proposer: Any = self.speculator.head
            static.drafter = StaticDrafter(proposer, static.capacity, static.fresh)
        for name in request.sources.keys() - static.sources.keys():
            opening = Opening(request.root_1[:0], static.capacity, self._tables)
            static.sources[name] = SOURCES[name].open(opening)
        if not state.sampler.greedy and static.noise_PV is None:
            places, device = static.depth + 1, static.root_1.device
            static.noise_PV = torch.zeros(places, self.target.config.vocab_size, device=device)
        return static

    def _round(self, state: DecodeState, static: Statics, sampling: tuple) -> tuple[Emitted, dict[str, float]]:
        """What was emitted, and the seconds that the segments of each phase took.

        Args:
            sampling: the sampler's settings.
        """
        graphs, request = self.graphs, state.speculation
        drafted = self._resumed(state, static)
        segments = drafted.segments
        times = [graphs.now()]
        drafted = self._draft(drafted, sampling)
        checkpoint, read = drafted.checkpoint, self._pending if drafted.layers else 0
        if request.head is not None and not drafted.layers and self._pending > static.fresh // 2:
            self._run(segments, ("catch up", segments.size), segments.catch_up)
            read = self._pending
        times.append(graphs.now())
        nodes = checkpoint.num_draft_tokens
        if nodes > 1:
            key = ("graft", checkpoint.steps, *self._key(segments, sampling))
            self._run(segments, key, lambda: segments.graft(checkpoint, drafted.layers, drafted.retrieved))
        times.append(graphs.now())
        depth = request.builder.max_depth
        asked = (*_keys(segments.sources), request.builder.plan.learns_accepted)
        key = ("verify", segments.size, nodes, depth, segments.drafts, asked, segments.logprobs, sampling)
        self._run(segments, key, lambda: segments.verify(nodes, depth))
        times.append(graphs.now())
        self._begin(state, static, sampling, depth + 1)
        times.append(graphs.now())
        graphs.wait()
        told, *record = static.record[: 2 + 2 * (depth + 1)].tolist()
        if self._begun is not None and not self._begun.is_last:
            self._begun.stops = bool(told)
        draft, graft, verify, ahead = (graphs.seconds(start, end) for start, end in pairwise(times))
        tokens, sources = of_record(record)
        self._commit(state, static, len(tokens), read)
        state.tokens += tokens
        state.stats.rounds += 1
        state.stats.checkpoints[checkpoint.name] += 1
        return (tokens, sources), {"draft": draft + ahead, "graft": graft, "verify": verify}

    def _segments(self, state: DecodeState, static: Statics, more: int = 0) -> Segments:
        """Over the bucket that a round needs once so many more positions are committed."""
        size = bucket(state.cache.length + more + slack_rows(state.speculation.builder.plan, static.rows, static.depth))
        if size not in self._caches:
            self._caches[size] = BucketCache(state.cache, size)
        return Segments(
            static=static,
            target=self.target,
            plan=state.speculation.builder.plan,
            builder=state.speculation.builder,
            sampler=Sampler(state.sampler.processors, state.sampler.greedy, static.seed_1),
            size=size,
            cache=self._caches[size],
            sources=state.speculation.sources,
            drafts=state.speculation.head is not None,
            logprobs=state.logprobs is not None,
        )

    def _resumed(self, state: DecodeState, static: Statics) -> Drafted:
        """The draft that the last round began, or none, where it was begun for another plan."""
        begun, self._begun = self._begun, None
        if begun is not None and begun.segments.builder is state.speculation.builder:
            return begun
        if begun is not None and state.speculation.head is not None and static.drafter is not None:
            # What it has read on the device the host never took note of: it is read again.
            static.drafter.length_1.fill_(state.speculation.head.length)
            static.drafter.pending_1.fill_(self._pending)
        return Drafted(self._segments(state, static))

    def _begin(self, state: DecodeState, static: Statics, sampling: tuple, count: int) -> None:
        """Starts the next round's draft on what this round commits.

        Args:
            count: positions that are committed at most.
        """
        if not state.speculation.builder.plan.drafts or state.speculation.head is None:
            return
        with suppress(CannotCapture):  # the next round meets it at its beginning, where it can still run eagerly
            self._begun = self._step(Drafted(self._segments(state, static, count)), sampling)

    def _draft(self, drafted: Drafted, sampling: tuple) -> Drafted:
        """Drafts on from checkpoint to checkpoint; the passes after the last one needed are never replayed."""
        segments = drafted.segments
        if not segments.drafts or not segments.plan.drafts:
            return drafted
        while drafted.place < 0 or not (drafted.is_last or self._stops(drafted)):
            drafted = self._step(drafted, sampling)
        return drafted

    def _step(self, drafted: Drafted, sampling: tuple) -> Drafted:
        """Replays the segment up to the next checkpoint."""
        segments, place, layers = drafted.segments, drafted.place + 1, drafted.layers
        checkpoint, key = segments.plan.checkpoints[place], self._key(segments, sampling)
        if checkpoint.steps == 0:
            found = _trees(self._run(segments, ("look up", *key), lambda: segments.look_up(checkpoint)))
            return Drafted(segments, place, layers, found)
        given = drafted.retrieved if isinstance(segments.builder, ScoredBuilder) else None
        outputs = self._run(
            segments, ("draft", checkpoint.steps, *key), partial(segments.draft, checkpoint, tuple(layers), given)
        )
        ends = COLUMNS * (checkpoint.steps - len(layers))
        layers = layers + [Layer(*outputs[i : i + COLUMNS]) for i in range(0, ends, COLUMNS)]
        retrieved = given if given is not None else _trees(outputs[ends:])
        return Drafted(segments, place, layers, retrieved)

    def _key(self, segments: Segments, sampling: tuple) -> tuple:
        """What tells the segments before the verification apart."""
        told = not segments.sampler.greedy and segments.plan.shares_noise
        return segments.builder, segments.size, _keys(segments.sources), sampling if told else None

    def _run(self, segments: Segments, key: tuple, function: Function) -> list[Tensor]:
        """Replays a segment, captured first where it was not yet."""
        if key not in self._captured:
            changing = segments.static.changing(segments.sources.values())
            self.captures += 1
            self._captured[key] = self.graphs.capture(function, changing)
        captured = self._captured[key]
        captured.replay()
        return captured.outputs

    def _stops(self, drafted: Drafted) -> bool:
        """What the segment up to this checkpoint told the host: one read, unless the last round's brought it."""
        if drafted.stops is None:
            self.graphs.wait()
            drafted.stops = bool(drafted.segments.static.record[0])
        return drafted.stops

    def _commit(self, state: DecodeState, static: Statics, count: int, read: int) -> None:
        """Tells the request, which may go on eagerly, what has happened on the device.

        Args:
            count: positions committed.
            read: positions that the head has read.
        """
        state.cache.commit(count)
        state.place += count
        self._place = state.place
        request = state.speculation
        request.root_1 = static.root_1
        if request.head is not None and static.drafter is not None:
            request.head.length += read
            self._leave_pending(state, static.drafter, self._pending + count - read)
        if state.logprobs is not None:
            state.logprobs.append(static.logp_D[:count].clone())

    def _leave_pending(self, state: DecodeState, drafter: StaticDrafter, count: int) -> None:
        """So many positions are yet to be read by the head, eagerly too if it comes to that."""
        self._pending = count
        request = state.speculation
        request.fresh_tokens_A, request.fresh_aux_AE = drafter.tokens_F[:count], drafter.aux_FE[:count]


def _trees(outputs: list[Tensor]) -> list[DraftTree]:
    return [DraftTree(*outputs[start : start + COLUMNS]) for start in range(0, len(outputs), COLUMNS)]


def _keys(sources: Mapping[str, TokenSource]) -> tuple:
    """What tells the sources of requests apart."""
    return tuple((name, source.is_shared, source.learns) for name, source in sources.items())


def _settings(sampler: Sampler) -> tuple:
    """What tells samplers apart, the seed excepted."""
    processors = ((type(processor), *sorted(vars(processor).items())) for processor in sampler.processors)
    return sampler.greedy, *processors
