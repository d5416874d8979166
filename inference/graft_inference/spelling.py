"""Incremental detokenisation, and stop strings."""

from collections.abc import Sequence
from typing import Any


class Spelling:
    """Text of tokens, piece by piece; a character of several tokens comes with its last one.

    Args:
        skip_special: leave the tokenizer's special tokens out of the text.
    """

    def __init__(self, tokenizer: Any, skip_special: bool = True) -> None:
        self.tokenizer = tokenizer
        self.skip_special = skip_special
        self.ids: list[int] = []
        self.text = ""
        # A piece is what its tokens add to those of the piece before, as some tokenizers go by what precedes.
        self._start = self._end = 0

    def put(self, token: int) -> str:
        """Adds a token; returns the text that can no longer change."""
        self.ids.append(token)
        piece = self._piece()
        return "" if piece.endswith("\ufffd") else self._take(piece)

    def end(self) -> str:
        """Returns the text that was held back, once no more tokens come."""
        return self._take(self._piece())

    def _piece(self) -> str:
        before, after = self._decoded(self._end), self._decoded(len(self.ids))
        return after[len(before) :]

    def _decoded(self, end: int) -> str:
        ids = self.ids[self._start : end]
        return self.tokenizer.decode(ids, skip_special_tokens=self.skip_special, clean_up_tokenization_spaces=False)

    def _take(self, piece: str) -> str:
        if piece:
            self._start, self._end = self._end, len(self.ids)
            self.text += piece
        return piece


class StopCutter:
    """Passes text on up to the first stop string, which is left out.

    Attributes:
        is_cut: a stop string has come; nothing after it is let through.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = stops
        self.is_cut = False
        self._held = ""

    def put(self, piece: str) -> str:
        """Adds a piece; returns the text that certainly comes before any stop string."""
        if self.is_cut:
            return ""
        text = self._held + piece
        # The stop string that is complete first counts, so that it does not matter how the text is parted.
        found = [(place + len(stop), place) for stop in self.stops if (place := text.find(stop)) >= 0]
        self.is_cut = bool(found)
        safe = min(found)[1] if found else len(text) - self._begun(text)
        self._held = text[safe:]
        return text[:safe]

    def end(self) -> str:
        """Returns the text that was held back, once no more text comes."""
        return "" if self.is_cut else self._held

    def _begun(self, text: str) -> int:
        """Characters at the end of a text with which a stop string may begin."""
        longest = max(map(len, self.stops), default=1) - 1
        ends = range(min(longest, len(text)), 0, -1)
        return next((end for end in ends if any(stop.startswith(text[-end:]) for stop in self.stops)), 0)
