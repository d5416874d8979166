"""What a generation returns, and what it did."""

import time
from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor

PHASES = ("prefill", "draft", "graft", "verify", "commit")


@dataclass
class GenerationStats:
    """What one generation did.

    Attributes:
        rounds: target passes after the prefill.
        emitted: new tokens, the prefill's first one included.
        reused: tokens of the prompt whose keys and values the previous request left.
        seconds: wall time by phase. `graft` is look-up and merging, `commit` acceptance, cache and matrix.
        accepted: kept tokens of the rounds by source: drafted, retrieved, and bonus (the target's own).
        stages: rounds by the stage they stopped at; "none" where no head ran.
        captured: rounds that were replayed from CUDA graphs. Their `verify` is acceptance, cache and matrix too, and
            their `commit` what the host adds, captures included.
        uncaptured: why others were not, where the engine captures.
    """

    rounds: int = 0
    captured: int = 0
    uncaptured: str | None = None
    emitted: int = 0
    reused: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    accepted: dict[str, int] = field(default_factory=lambda: {"drafted": 0, "retrieved": 0, "bonus": 0})
    stages: Counter[str] = field(default_factory=Counter)

    @property
    def tau(self) -> float:
        """Acceptance length: tokens per target pass, bonus included, the prefill's token not; 1 for AR."""
        return (self.emitted - 1) / self.rounds if self.rounds else 1.0

    @property
    def decode_seconds(self) -> float:
        return sum(self.seconds.values()) - self.seconds["prefill"]

    @property
    def tokens_per_second(self) -> float:
        """Decoding speed; the prefill and its token are not counted."""
        return (self.emitted - 1) / self.decode_seconds if self.rounds else 0.0


@dataclass
class Generation:
    """Attributes:
    sequences: prompt and new tokens, [1, prompt + new] int64.
    logprobs: natural log-probability of every new token under the distribution it was taken from (after
        processors and temperature), [new] float32; None unless asked for.
    """

    sequences: Tensor
    stats: GenerationStats
    logprobs: Tensor | None = None


class PhaseClock:
    """Adds the time since the last mark to a phase; on a GPU it waits for the device first."""

    def __init__(self, seconds: dict[str, float], device: torch.device) -> None:
        self.seconds = seconds
        self.device = device
        self.last = self._now()

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def start(self) -> None:
        self.last = self._now()

    def mark(self, phase: str) -> None:
        now = self._now()
        self.seconds[phase] += now - self.last
        self.last = now
