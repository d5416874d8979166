"""What a generation returns, and what it did."""

import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor

from .device import event
from .retrieval.sources import SOURCES

PHASES = ("prefill", "draft", "graft", "verify", "commit")


@dataclass
class GenerationStats:
    """What one generation did.

    Attributes:
        rounds: target passes after the prefill; of a batch, the sum over its prompts, which share their passes.
        emitted: new tokens, the prefill's first one included.
        reused: tokens of the prompt whose keys and values the previous request left.
        seconds: time by phase, of a GPU its own, which is complete when the generation has ended. `graft` is look-up
            and merging, `commit` acceptance, cache and matrix.
        accepted: kept tokens of the rounds by source: drafted; retrieved, by the names of the sources; and bonus (the
            target's own). What several proposed counts for the first of them.
        sources: of every new token in order, the first one's being "prefill"; of a batch, prompt by prompt.
        checkpoints: rounds by the checkpoint they stopped at; "none" where no head ran.
        captured: rounds that were replayed from CUDA graphs. In their `seconds`, `verify` includes acceptance, cache
            and matrix, and `commit` is what the host adds. All of a round that captures a graph is `commit`.
        uncaptured: why the other rounds were not, where the engine captures.
        fallback: rounds by the plan that the fallback chose, and why; empty where it had no say.
        prompts: prompts that these statistics are of.
    """

    rounds: int = 0
    captured: int = 0
    uncaptured: str | None = None
    emitted: int = 0
    reused: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    accepted: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("drafted", *SOURCES, "bonus"), 0))
    sources: list[str] = field(default_factory=list)
    checkpoints: Counter[str] = field(default_factory=Counter)
    fallback: Counter[str] = field(default_factory=Counter)
    prompts: int = 1

    @classmethod
    def together(cls, parts: Sequence[Self]) -> Self:
        """Sums the statistics of prompts that were decoded together; times are the longest of any."""
        if len(parts) == 1:
            return parts[0]
        # The one that was under way longest took part in every pass.
        seconds = {phase: max(part.seconds[phase] for part in parts) for phase in PHASES}
        return cls(
            rounds=sum(part.rounds for part in parts),
            emitted=sum(part.emitted for part in parts),
            reused=sum(part.reused for part in parts),
            seconds=seconds,
            accepted={name: sum(part.accepted[name] for part in parts) for name in parts[0].accepted},
            sources=[source for part in parts for source in part.sources],
            checkpoints=sum((part.checkpoints for part in parts), Counter()),
            captured=sum(part.captured for part in parts),
            uncaptured=next((part.uncaptured for part in parts if part.uncaptured), None),
            fallback=sum((part.fallback for part in parts), Counter()),
            prompts=len(parts),
        )

    def count(self, source: str) -> None:
        """Counts one more token, by its source or as "prefill"."""
        self.emitted += 1
        self.sources.append(source)
        if source != "prefill":
            self.accepted[source] += 1

    @property
    def acceptance_length(self) -> float:
        """Tokens emitted for a pass of the target, with the bonus and without the prefill's; 1 for plain decoding."""
        return (self.emitted - self.prompts) / self.rounds if self.rounds else 1.0

    @property
    def decode_seconds(self) -> float:
        return sum(self.seconds.values()) - self.seconds["prefill"]

    @property
    def tokens_per_second(self) -> float:
        """Decoding speed; the prefill and its token are not counted. 0 until a round's time is known."""
        return (self.emitted - self.prompts) / self.decode_seconds if self.decode_seconds else 0.0


@dataclass
class Generation:
    """What came out; of a batch of B prompts, the new tokens begin at the same column for all.

    Attributes:
        sequences: the prompts as they were passed (those of a list padded on the left) and the new tokens, padded
            on the right, [B, prompt + new] int64.
        stats: of all prompts together.
        each: the statistics of every prompt; its seconds are those in which it was under way.
        logprobs: natural log-probability of every new token under the distribution it was taken from (after
            processors and temperature), [new] float32; of a batch [B, new], 0 for padding. None unless asked for.
    """

    sequences: Tensor
    stats: GenerationStats
    each: list[GenerationStats]
    logprobs: Tensor | None = None


class PhaseClock:
    """Adds the time since the last mark to a phase: of a GPU its own time, without waiting for it.

    Args:
        seconds: by phase; of a GPU they are complete after `settle`.
    """

    def __init__(self, seconds: dict[str, float], device: torch.device) -> None:
        self.seconds = seconds
        self.device = device
        self._marks: deque[tuple[str, torch.cuda.Event, torch.cuda.Event]] = deque()
        self.start()

    def now(self) -> float:
        """Of the host."""
        return time.perf_counter()

    def start(self) -> None:
        self._add_reached()
        self._last = self._moment()

    def mark(self, phase: str) -> None:
        moment = self._moment()
        if isinstance(moment, float):
            self.seconds[phase] += moment - self._last
        else:
            self._marks.append((phase, self._last, moment))
        self._last = moment

    def settle(self) -> None:
        """Waits for the device, and adds what is not in the seconds yet."""
        if self._marks:
            self._marks[-1][2].synchronize()
        self._add_reached()

    def _add_reached(self) -> None:
        while self._marks and self._marks[0][2].query():
            phase, start, end = self._marks.popleft()
            self.seconds[phase] += start.elapsed_time(end) / 1e3

    def _moment(self) -> Any:
        """Seconds of the host, or an event that the GPU will reach."""
        return event(self.device) if self.device.type == "cuda" else self.now()
