"""Where in a packed batch blocks are drafted, and what each of their slots may see."""

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from graft_inference.heads.block.view import View


@dataclass
class BlockLayout:
    """Documents one behind the other, and the anchors of the blocks that are drafted in them.

    A is the number of anchors, P the slots of a block, K its drafts: draft k = 1..K of an anchor is the token k
    places behind it. The A * P slots stand one behind the other, block by block.

    Attributes:
        lengths: of the documents, in order.
        positions_S: of each token within its document.
        document_S: the number of its document.
        anchors_A: ascending; the last accepted token of a draft, whose own state is not known yet.
        started_AK: whether draft k of the anchor is a token of the anchor's own answer.
        slots: P.
        view: what they see of the tokens before their anchor, and of each other.
        first: slots before this one do not ask: they only lend their keys.
    """

    lengths: list[int]
    positions_S: Tensor
    document_S: Tensor
    anchors_A: Tensor
    started_AK: Tensor
    slots: int
    view: View = field(default_factory=lambda: View(causal=False))
    first: int = 0

    def to(self, device: torch.device) -> "BlockLayout":
        tensors = ("positions_S", "document_S", "anchors_A", "started_AK")
        moved = {name: getattr(self, name).to(device) for name in tensors}
        return replace(self, **moved)

    def seen_by(self, view: View) -> "BlockLayout":
        """The same blocks in a layer whose slots see what this view says."""
        return replace(self, view=view)

    @property
    def asking(self) -> int:
        """Slots of a block that ask."""
        return self.slots - self.first

    @property
    def slot_positions_N(self) -> Tensor:
        """The slots' positions in their documents, block by block, N = A * P."""
        places_P = torch.arange(self.slots, device=self.anchors_A.device)
        return (self.positions_S[self.anchors_A][:, None] + places_P).flatten()

    @cached_property
    def pieces(self) -> list[tuple[slice, slice]]:
        """Of each document with anchors: which anchors, and the tokens before the last of them."""
        counts = self.document_S[self.anchors_A].bincount(minlength=len(self.lengths)).tolist()
        pieces, anchor, start = [], 0, 0
        for count, length in zip(counts, self.lengths, strict=True):
            if count:
                pieces.append((slice(anchor, anchor + count), slice(start, int(self.anchors_A[anchor + count - 1]))))
            anchor, start = anchor + count, start + length
        return pieces

    @cached_property
    def biases(self) -> list[Tensor]:
        """Of each piece what is added to its slots' scores: 0 for what they see, else -inf; fp32, [slots, keys]."""
        biases = []
        for anchors, tokens in self.pieces:
            keys = torch.arange(tokens.start, tokens.stop, device=self.anchors_A.device)
            anchor_N1 = self.anchors_A[anchors].repeat_interleave(self.asking)[:, None]
            hidden = keys >= anchor_N1
            if self.view.window is not None:
                first_P = self.view.first_seen(self.slots, keys.device)[self.first :]
                hidden |= keys < anchor_N1 + first_P.repeat(len(anchor_N1) // self.asking)[:, None]
            biases.append(torch.zeros(hidden.shape, device=keys.device).masked_fill_(hidden, -torch.inf))
        return biases

    @cached_property
    def block_mask(self) -> Any:
        """For flex_attention: the slots that ask over the S tokens and, behind them, the A * P slots."""
        from torch.nn.attention.flex_attention import create_block_mask

        document_S, anchors_A, slots, view = self.document_S, self.anchors_A, self.slots, self.view
        first_P = None if view.window is None else view.first_seen(slots, document_S.device)
        tokens, asking, first = len(document_S), self.asking, self.first

        def sees(batch: Tensor, head: Tensor, asked: Tensor, key: Tensor) -> Tensor:
            query = asked // asking * slots + asked % asking + first
            anchor, own = anchors_A[query // slots], key - tokens
            token = key.clamp(max=tokens - 1)
            context = (key < tokens) & (key < anchor) & (document_S[token] == document_S[anchor])
            if first_P is not None:
                context = context & (key >= anchor + first_P[query % slots])
            block = (key >= tokens) & (own // slots == query // slots)
            return context | (block & (own <= query) if view.causal else block)

        blocks = len(anchors_A)
        return create_block_mask(sees, None, None, blocks * asking, tokens + blocks * slots, device=document_S.device)


def make_block_layout(
    lengths: list[int], loss_mask_S: Tensor, slots: int, drafts: int, anchors: int, seed: int
) -> BlockLayout:
    """Draws anchors uniformly, without replacement, among the tokens whose successor can be taught.

    Anchor and successor are tokens of one answer, and the anchor is not the first token of its document, for which
    there is no context.

    Args:
        loss_mask_S: bool, the answers' tokens of all documents, on the CPU.
        drafts: K.
        anchors: at most so many.
        seed: of the draw.
    """
    length_D = torch.tensor(lengths)
    start_D = length_D.cumsum(0) - length_D
    document_S = torch.arange(len(lengths)).repeat_interleave(length_D)
    positions_S = torch.arange(len(loss_mask_S)) - start_D[document_S]
    follows_S = loss_mask_S & (positions_S > 0)
    candidates = (follows_S[:-1] & follows_S[1:]).nonzero().flatten()
    drawn = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(seed))[:anchors]
    anchors_A = candidates[drawn].sort().values
    started_AK = torch.zeros(len(anchors_A), drafts, dtype=torch.bool)
    inside_A = torch.ones_like(anchors_A, dtype=torch.bool)
    for draft in range(drafts):
        token_A = (anchors_A + draft + 1).clamp(max=len(loss_mask_S) - 1)
        inside_A = inside_A & (anchors_A + draft + 1 < len(loss_mask_S)) & follows_S[token_A]
        started_AK[:, draft] = inside_A
    return BlockLayout(lengths, positions_S, document_S, anchors_A, started_AK, slots)
