"""One request's answer, from its prompt to its last piece."""

import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..engine import GraftEngine
from ..errors import GraftError
from ..spelling import Spelling, StopCutter
from ..stats import GenerationStats

ROUND_ENDS = ("prefill", "bonus")
"""Sources of the token that ends a round; the prefill gives one token alone."""


class TooLong(GraftError):
    """Prompt and answer have more tokens than the server takes."""


@dataclass(frozen=True)
class Limits:
    """Attributes:
    model_length: most tokens of prompt and answer together.
    new_tokens: most tokens of an answer whose request names no number.
    """

    model_length: int
    new_tokens: int


@dataclass(frozen=True)
class Asked:
    """What one request asks.

    Attributes:
        encode: takes the tokenizer, and returns the prompt's token ids, [S].
        max_tokens: of the answer; None: as many as the limits allow.
        sampling: settings of `Request`: temperature, seed, filters, penalty.
        stops: strings that end the answer, and are not part of it.
        skip_special: leave special tokens out of the text.
    """

    encode: Callable[[Any], Tensor]
    max_tokens: int | None
    sampling: dict[str, Any]
    stops: tuple[str, ...] = ()
    skip_special: bool = True


@dataclass(frozen=True)
class Piece:
    """What a round adds to an answer.

    Attributes:
        finish: with the last piece, "stop" (an end token or a stop string) or "length".
    """

    text: str
    ids: list[int]
    finish: str | None = None


@dataclass
class Answer:
    """An answer: computed by one thread, read by another, which may cancel it.

    Attributes:
        tell: called with every piece, or with the exception that ended the answer, and with None at the end.
        outcome: how it ended: completed, cancelled, refused (the request's fault) or failed (the server's).
        arrived, first, ended: times of arrival, first piece and end, in seconds of `time.perf_counter`; 0 until then.
    """

    asked: Asked
    tell: Callable[[Piece | Exception | None], None]
    stats: GenerationStats = field(default_factory=GenerationStats)
    prompt_ids: list[int] = field(default_factory=list)
    is_cancelled: bool = False
    outcome: str = "cancelled"
    arrived: float = field(default_factory=time.perf_counter)
    first: float = 0.0
    ended: float = 0.0
    _most: int = 0
    _ends: frozenset[int] = frozenset()
    _tokens: Generator[int, None, None] | None = None
    _spelling: Spelling | None = None
    _cutter: StopCutter = field(init=False)

    def __post_init__(self) -> None:
        self._cutter = StopCutter(self.asked.stops)

    def cancel(self) -> None:
        """Ends the answer after the round under way."""
        self.is_cancelled = True

    def begin(self, engine: GraftEngine, method: str, limits: Limits) -> bool:
        """Reads the prompt's text and checks lengths; computes nothing yet.

        Raises:
            GraftError: a prompt that the tokenizer or the chat template refuses, or one that is too long.
        """
        prompt_S = self.asked.encode(engine.tokenizer)
        self.prompt_ids = prompt_S.tolist()
        self._most = _room(len(self.prompt_ids), self.asked.max_tokens, limits)
        self._ends = engine.eos_token_ids
        self._spelling = Spelling(engine.tokenizer, self.asked.skip_special)
        sampling = self.asked.sampling
        self._tokens = engine.stream(prompt_S, self._most, method=method, stats=self.stats, **sampling)
        return True

    def advance(self) -> bool:
        """Computes the prefill or a round, and calls `tell` with its piece. Returns whether there is more to come."""
        assert self._tokens is not None
        text, ids, is_last = "", [], True
        for token in self._tokens:
            ids.append(token)
            text += self._text_of(token)
            goes_on = token not in self._ends and self.stats.emitted < self._most
            if self._cutter.is_cut or (goes_on and self.stats.sources[-1] in ROUND_ENDS):
                is_last = self._cutter.is_cut
                break
        self.first = self.first or time.perf_counter()
        if is_last:
            text += self._rest()
            self.outcome = "completed"
        self.tell(Piece(text, ids, self._finish() if is_last else None))
        return not is_last

    def fail(self, error: Exception) -> None:
        self.outcome = "refused" if isinstance(error, GraftError) else "failed"
        self.tell(error)

    def close(self) -> None:
        """Frees what the answer holds of the engine."""
        self.ended = time.perf_counter()
        if self._tokens is not None:
            self._tokens.close()

    def _text_of(self, token: int) -> str:
        """What a token adds to the text; the one that ends the sequence is no part of it."""
        assert self._spelling is not None
        return "" if token in self._ends else self._cutter.put(self._spelling.put(token))

    def _rest(self) -> str:
        assert self._spelling is not None
        return self._cutter.put(self._spelling.end()) + self._cutter.end()

    def _finish(self) -> str:
        assert self._spelling is not None
        has_ended = len(self._spelling.ids) < self.stats.emitted or self._cutter.is_cut
        return "length" if self.stats.emitted == self._most and not has_ended else "stop"


def _room(prompt: int, asked: int | None, limits: Limits) -> int:
    """Most tokens of the answer to a prompt of so many."""
    room = limits.model_length - prompt
    if room < max(asked or 1, 1):
        wanted = f"{asked} in the completion" if asked else "no room for a completion"
        raise TooLong(
            f"This model's maximum context length is {limits.model_length} tokens, and the request asks for more: "
            f"{prompt} in the prompt, {wanted}. Shorten the prompt, or ask for fewer tokens"
        )
    return min(room, limits.new_tokens) if asked is None else asked
