"""The attention mask of a block head: which context tokens, and which other slots, a slot attends to."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import GraftError
from ..base import LARGEST, check_whole


@dataclass(frozen=True)
class View:
    """The attention mask of one layer. Shape suffixes: P slots, T context tokens.

    Attributes:
        causal: a slot sees itself and the slots before it, and none after it.
        window: positions that a slot attends to, its own and those before it; None: all.
        from_anchor: the window is instead so many tokens before the anchor, the same ones for every slot.
    """

    causal: bool
    window: int | None = None
    from_anchor: bool = False

    def first_seen(self, slots: int, device: torch.device) -> Tensor:
        """The first place that each slot sees, counted from the anchor's; only with a window. [P] int64"""
        assert self.window is not None
        slot_P = torch.arange(slots, device=device)
        return torch.full_like(slot_P, -self.window) if self.from_anchor else slot_P + 1 - self.window

    def mask(self, context: int, slots: int, device: torch.device, anchor_1: Tensor | None = None) -> Tensor | None:
        """Whether each slot sees so many rows of context, and the slots. [P, T + P]; None: all.

        Args:
            anchor_1: the anchor's position, [1] int64, where the rows are a bucket that begins at position 0 and holds
                nothing from there on; None: they are the tokens before it.
        """
        if not self.causal and self.window is None and anchor_1 is None:
            return None
        slot_P, place_T = torch.arange(slots, device=device), torch.arange(context, device=device)
        place_T = place_T - (context if anchor_1 is None else anchor_1)
        place_S = torch.cat((place_T, slot_P))
        # Behind the anchor a bucket holds no context.
        seen_PS = torch.cat((place_T < 0, slot_P >= 0)).repeat(slots, 1)
        if self.causal:
            seen_PS &= place_S <= slot_P[:, None]
        if self.window is not None:
            seen_PS &= place_S >= self.first_seen(slots, device)[:, None]
        return seen_PS


@dataclass(frozen=True)
class SlidingWindow:
    """Layers whose slots see only the last tokens of the context.

    Attributes:
        layers: of the head, 0-based and ascending.
        size: of the window, in tokens.
        from_anchor: counted back from the anchor, as speculators trains, and not from each slot, as DFlash's code does.
    """

    layers: tuple[int, ...]
    size: int
    from_anchor: bool = False

    def check(self, num_layers: int, block_size: int) -> None:
        """Raises GraftError for layers that the head does not have, or a window without context for the last slot."""
        if not self.layers or list(self.layers) != sorted(set(self.layers) & set(range(num_layers))):
            raise GraftError(f"sliding layers {self.layers} must be some of 0..{num_layers - 1}, ascending")
        if type(self.from_anchor) is not bool:
            raise GraftError(f"sliding_window_from_anchor={self.from_anchor!r} must be true or false")
        check_whole("sliding_window", self.size, 1 if self.from_anchor else block_size + 1, LARGEST)
