"""Prompt lookup: what followed the longest earlier match of the end of the request's own text."""

from typing import Self

import torch
from torch import Tensor

from ..noise import Noise
from ..proposer import Opening, Proposal, TokenSource
from ..template import Template

LONGEST = 12
"""Longest match that is looked for, in tokens; a longer one counts as this."""


class PromptLookup(TokenSource):
    """Proposes what followed the longest earlier match of the text's end, within one request's prompt and output.

    Prompt lookup (Saxena 2023), with the length of the match as the evidence from which P(accepted) follows. Every
    position is compared with the end of the text by a few operators of fixed shapes. So there is no index to maintain.

    Args:
        capacity: most tokens of prompt and output together.
    """

    name = "lookup"
    kinds = LONGEST

    def __init__(self, capacity: int, device: torch.device) -> None:
        # -1 stands before the text, where a match may not begin, and after it, where none may end.
        self.text_S = torch.full((LONGEST + capacity,), -1, dtype=torch.int32, device=device)
        self.end_1 = torch.full((1,), LONGEST - 1, dtype=torch.long, device=device)
        self._place_W = torch.arange(capacity + 1, device=device)
        # Column w is the window of LONGEST tokens from place w on; its last token is the most recent.
        self._windows_LW = self.text_S.unfold(0, len(self._place_W), 1)
        self._weight_L1 = torch.arange(1, LONGEST + 1, dtype=torch.uint8, device=device)[:, None]

    @classmethod
    def open(cls, opening: Opening) -> Self:
        source = cls(opening.capacity, opening.device)
        source.extend(opening.tokens_S)
        return source

    def propose(self, root_1: Tensor, template: Template, noise: Noise | None) -> Proposal:
        """Proposes what followed the longest match; the length of the match is the evidence."""
        tokens_D, length_1 = self.find(len(template) - 1)
        tokens_D = tokens_D.masked_fill_(length_1 == 0, -1)
        return Proposal(template.tree(torch.cat((root_1, tokens_D)), None), length_1)

    def extend(self, tokens_A: Tensor, count_1: Tensor | None = None) -> None:
        row_A = self._place_W[1 : len(tokens_A) + 1]
        if count_1 is not None:
            tokens_A = torch.where(row_A <= count_1, tokens_A, -1)
        self.text_S.index_copy_(0, self.end_1 + row_A, tokens_A.to(torch.int32))
        self.end_1 += len(tokens_A) if count_1 is None else count_1

    @property
    def tensors(self) -> list[Tensor]:
        return [self.text_S, self.end_1]

    def adopt(self, other: Self) -> None:
        self.text_S.fill_(-1)
        super().adopt(other)

    def find(self, count: int) -> tuple[Tensor, Tensor]:
        """Finds what followed the longest match of the text's end; of equally long ones the latest.

        A match that overlaps the end of the text is taken for a period, and goes on by repeating it.

        Returns:
            tokens_D: the `count` tokens, int64.
            length_1: matched tokens, at most LONGEST, int64; 0: no match, and the tokens are meaningless.
        """
        start_1 = self.end_1 - (LONGEST - 1)
        recent_L1 = self._windows_LW.index_select(1, start_1)
        # The last of a window's places that differs, counted from 1, leaves the matched tokens after it.
        differs_W = ((self._windows_LW != recent_L1) * self._weight_L1).amax(dim=0)
        length_W = (LONGEST - differs_W.long()).index_fill_(0, start_1, 0)
        best_1 = (length_W * len(length_W) + self._place_W).argmax(dim=0, keepdim=True)
        period_1 = (start_1 - best_1).clamp_(min=1)
        # Not of `_place_W`: a short request has room for fewer tokens than a plan foresees.
        place_D = best_1 + LONGEST + torch.arange(count, device=period_1.device).remainder(period_1)
        tokens_D = self.text_S.index_select(0, torch.minimum(place_D, self.end_1))
        return tokens_D.long(), length_W.index_select(0, best_1)
