"""Runs requests: makes their state, reads their prompts, and plays their rounds."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .decode.captured import CapturedRounds
from .decode.cuda_graph import CudaGraphs
from .decode.prefill import prefill
from .decode.prefix import KeptPrefix
from .decode.round import run_round
from .decode.state import DecodeState
from .errors import GraftError
from .heads.families import Head, proposer_of
from .policy.fallback import Fallback, Fallbacks, fallback_plans
from .policy.plan import Plan
from .policy.policy import Policy
from .policy.tree_builder import TreeBuilder, builder_of
from .proposer import SCOPES, Opening, TokenSource
from .request import Request, Row
from .retrieval.sources import SOURCES
from .retrieval.successor_matrix import SuccessorMatrix
from .speculator import Speculation, Speculator
from .stats import GenerationStats, PhaseClock
from .target.kv_cache import TreeCache
from .target.model import Target
from .verification import Emitted


@dataclass(frozen=True)
class EngineSettings:
    """How an engine runs its requests.

    Attributes:
        retrieval_scope: what the matrix learns from a request lasts for that "request" alone, or stays in the
            "engine"; "frozen" teaches it nothing.
        prefill_chunk: most tokens of prompts that are read in one pass; fewer need less memory.
        keep_prefix: keep the caches of the last request that ended, or whose stream was closed, so that the next turn
            of its chat reads only what is new. Output is the same, though not always the rounds: the matrix learns
            nothing from what is not read again. Memory stays taken.
        captured: replay rounds as CUDA graphs where that is possible. None: wherever there is CUDA.
        fallback: where `method="graft"` costs more time than it saves, its tree is narrowed, and in the end it does not
            speculate. A request's own `plan` and the other methods stay what they are.

    Raises:
        GraftError: an unknown scope, or a piece of no token.
    """

    retrieval_scope: str = "request"
    prefill_chunk: int = 1024
    keep_prefix: bool = False
    captured: bool | None = None
    fallback: bool = True

    def __post_init__(self) -> None:
        if self.retrieval_scope not in SCOPES:
            raise GraftError(f"unknown retrieval_scope {self.retrieval_scope!r}: choose one of {', '.join(SCOPES)}")
        if self.prefill_chunk < 1:
            raise GraftError(f"prefill_chunk={self.prefill_chunk}: a prompt is read at least one token at a time")


class Runner:
    """Target, speculator and what requests share; the rounds of several requests take turns.

    Args:
        target, policy, head, successors: those of `GraftEngine`.

    Raises:
        GraftError: graphs asked for without CUDA.
    """

    def __init__(
        self,
        target: Target,
        policy: Policy,
        head: Head | None,
        successors: SuccessorMatrix,
        settings: EngineSettings,
    ) -> None:
        is_cuda = target.device.type == "cuda"
        if settings.captured and not is_cuda:
            raise GraftError(f"captured=True needs a CUDA device, and the target is on {target.device}")
        self.target = target
        self.policy = policy
        self.head = head
        self.successors = successors
        self.retrieval_scope = settings.retrieval_scope
        self.prefill_chunk = settings.prefill_chunk
        self.keep_prefix = settings.keep_prefix
        self.fallback = settings.fallback
        self.speculator = Speculator(
            None if head is None else proposer_of(head, target.embed, target.unembed, target.max_positions)
        )
        self.captured: CapturedRounds | None = None
        if settings.captured or (settings.captured is None and is_cuda):
            self.captured = CapturedRounds(target, self.speculator, CudaGraphs(target.device))
        self.fallbacks: Fallbacks = {}
        self._kept: KeptPrefix | None = None
        self._builders: dict[Plan, TreeBuilder] = {}
        self._lock = threading.RLock()

    def _prefill(
        self,
        rows: Sequence[Row],
        plan: Plan,
        each: Sequence[GenerationStats],
        logprobs: Sequence[list[Tensor] | None],
        resumes: bool = True,
        keep_aux: bool = False,
    ) -> tuple[list[DecodeState], list[int]]:
        """Reads the prompts; the first token of each.

        Args:
            resumes: whether a kept prefix may be used, which only one request can.
            keep_aux: keep the target's auxiliary states of what is read and committed.
        """
        states = [
            self._open(row, plan, stats, found, resumes and len(rows) == 1)
            for row, stats, found in zip(rows, each, logprobs, strict=True)
        ]
        for state in states:
            state.aux = [] if keep_aux else None
        first = prefill(self.target, self.speculator, states, [row.prompt_S for row in rows], self.prefill_chunk)
        for state in states:
            state.clock.mark("prefill")
        return states, first

    def _open(
        self, row: Row, plan: Plan, stats: GenerationStats, logprobs: list[Tensor] | None, resumes: bool
    ) -> DecodeState:
        """The state that a request starts with, before its prompt is read; `resumes` as in `_prefill`."""
        kept = None
        if resumes:
            kept, self._kept = self._kept, None
        prompt_S = row.prompt_S
        stats.reused = kept.shared(prompt_S, plan.drafts) if kept else 0
        cache, head = self._caches(prompt_S, row.new_tokens, plan, kept if stats.reused else None)
        speculation = Speculation(
            builder=self._builder(plan),
            head=head,
            sources=self._sources(prompt_S, row.new_tokens, plan, kept if stats.reused else None),
            root_1=prompt_S[-1:],
            fresh_tokens_A=prompt_S[:0],
            fresh_aux_AE=torch.empty((0, 0), device=self.target.device),
        )
        return DecodeState(
            speculation=speculation,
            cache=cache,
            sampler=row.sampler,
            history_S=row.seen_S if row.sampler.needs_history else None,
            logprobs=logprobs,
            stats=stats,
            clock=PhaseClock(stats.seconds, self.target.device),
        )

    def _sources(
        self, prompt_S: Tensor, new_tokens: int, plan: Plan, kept: KeptPrefix | None
    ) -> dict[str, TokenSource]:
        """The sources that the plan asks, opened on the prompt."""
        # As many as the cache: the last round may go beyond the request's end.
        capacity = len(prompt_S) + new_tokens + plan.num_draft_tokens
        left = kept.sources if kept and kept.continues(prompt_S) else {}
        return {
            name: SOURCES[name].open(Opening(prompt_S, capacity, self.tables, self.retrieval_scope, left.get(name)))
            for name in plan.sources
        }

    def _caches(
        self, prompt_S: Tensor, new_tokens: int, plan: Plan, kept: KeptPrefix | None
    ) -> tuple[TreeCache, Any | None]:
        """Those of the target and the head, holding what the last request left of the same text."""
        tokens = len(prompt_S) + new_tokens
        if kept is not None:
            return kept.resume(self.speculator, kept.shared(prompt_S, plan.drafts), plan, tokens)
        part = self.speculator.head.open(plan.topk, plan.num_steps, tokens) if plan.drafts else None
        return self.target.new_cache(tokens + plan.num_draft_tokens), part

    def _round(self, states: Sequence[DecodeState]) -> list[Emitted]:
        """One target pass for all of them: the tokens it emits for each, and where each came from."""
        fallback, clock = self._govern(states), states[0].clock
        started, captures = clock.now(), self.captured and self.captured.captures
        emitted = self._replayed(states) or run_round(self.target, self.speculator, states)
        # A round that captures a graph is slow once, which is no plan's fault.
        if fallback is not None and captures == (self.captured and self.captured.captures):
            fallback.record(clock.now() - started, sum(len(tokens) for tokens, _ in emitted))
        return emitted

    def _govern(self, states: Sequence[DecodeState]) -> Fallback | None:
        """Chooses the next round's plan where requests may fall back; each number of prompts is a case of its own."""
        levels = states[0].levels
        if not levels:
            return None
        fallbacks, size = states[0].fallbacks, len(states).bit_length()
        if size not in fallbacks:
            fallbacks[size] = Fallback(tuple(fallback_plans(levels[0].plan)), self.target.agree)
        fallback = fallbacks[size]
        place, reason = fallback.choose(max(state.cache.length for state in states))
        for state in states:
            state.speculation.builder = state.levels[place]
            state.stats.fallback[reason] += 1
        return fallback

    def _replayed(self, states: Sequence[DecodeState]) -> list[Emitted] | None:
        """Runs the round by CUDA graphs; None if it has to run eagerly."""
        if self.captured is None:
            return None
        if len(states) == 1:
            emitted = self.captured.round(states[0], self.tables)
            return None if emitted is None else [emitted]
        for state in states:
            state.stats.uncaptured = "several prompts are decoded together"
        return None

    def _falls_back(self, request: Request) -> bool:
        return self.fallback and request.plan is None and request.method == "graft"

    def _let_fall_back(self, states: Sequence[DecodeState], request: Request, plan: Plan) -> None:
        if self._falls_back(request):
            for state in states:
                state.levels = tuple(map(self._builder, fallback_plans(plan).values()))
                state.fallbacks = self.fallbacks.setdefault(plan, {})

    def _builder(self, plan: Plan) -> TreeBuilder:
        if plan not in self._builders:
            self._builders[plan] = builder_of(plan, self.target.device)
        return self._builders[plan]

    @property
    def tables(self) -> dict[str, Any]:
        """The bundle's tables for sources, by name."""
        return {"matrix": self.successors}
