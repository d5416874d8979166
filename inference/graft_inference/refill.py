"""Continuous batching: when a prompt of the batch has ended, the next one that waits takes its place."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from .decode.state import DecodeState
from .request import Row
from .stats import GenerationStats
from .verification import Emitted


@dataclass
class Finished:
    """A prompt that has ended.

    Attributes:
        number: of the prompt, from 0 in the order in which they were asked for.
        tokens: the new ones; the end-of-sequence token, where it came, is the last.
        aux_SE: the target's aux hidden states of every token of prompt and output; None unless they are kept.
    """

    number: int
    tokens: list[int]
    stats: GenerationStats
    aux_SE: Tensor | None = None


@dataclass
class Running:
    """A prompt under way."""

    number: int
    row: Row
    state: DecodeState
    tokens: list[int] = field(default_factory=list)
    has_ended: bool = False

    def take(self, emitted: Emitted) -> None:
        """Notes what a round emitted, as far as the output goes."""
        for token, source in zip(*emitted, strict=True):
            if not self.has_ended:
                self.state.stats.count(source)
                self.tokens.append(token)
                self.has_ended = self.row.is_last(token)

    @property
    def length(self) -> int:
        """Of prompt and output."""
        return len(self.row.prompt_S) + len(self.tokens)

    @property
    def is_done(self) -> bool:
        """Whether nothing is missing. The target reads an emitted token one round later than it draws it."""
        return self.has_ended and (self.state.aux is None or sum(map(len, self.state.aux)) >= self.length)

    def finished(self) -> Finished:
        self.state.clock.settle()
        aux_SE = None if self.state.aux is None else torch.cat(self.state.aux)[: self.length]
        return Finished(self.number, self.tokens, self.state.stats, aux_SE)


def refilled(
    requests: Iterable[Any],
    at_most: int,
    begin: Callable[[Sequence[tuple[int, Any]]], list[Running]],
    advance: Callable[[Sequence[Running]], list[Emitted]],
) -> Iterator[Finished]:
    """Runs at most so many requests at a time and yields each as it ends.

    Args:
        requests: read one by one, when there is room for them.
        begin: prefills numbered requests.
        advance: runs one round of those under way.
    """
    numbered = enumerate(requests)
    running: list[Running] = []
    while True:
        fresh = list(islice(numbered, at_most - len(running)))
        if fresh:
            running += begin(fresh)
        elif running:
            for one, emitted in zip(running, advance(running), strict=True):
                one.take(emitted)
        else:
            return
        yield from (one.finished() for one in running if one.is_done)
        running = [one for one in running if not one.is_done]
