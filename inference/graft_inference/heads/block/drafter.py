"""From a block head to scored candidate nodes: one pass of the head, then one depth of the tree a step.

A slot's distribution belongs to its position alone: it does not depend on which tokens were drafted before it. As in
DDTree, the best nodes of a tree are those with the greatest sum of log-probabilities along their path. So each draft
step extends the best paths by the likeliest tokens of the next slot. With a Markov head, a slot's distribution also
depends on the token before it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ...noise import Noise
from ..draft import Draft, HeadState, Layer, deferred, joined, parted
from .model import BlockHead
from .view import View


@dataclass
class BlockDraft(Draft[Layer]):
    """A tree that grows by one slot a step.

    Attributes:
        logits_KD: of all K drafts of the block over the draft vocabulary, before any Markov bias.
    """

    logits_KD: Tensor | None = None


class BlockState(HeadState):
    """A request's part of a block head.

    Attributes:
        slots: of the blocks that it asks for; set by whoever opens it.
    """

    slots: int


class BlockProposer:
    """A block head, for all requests of an engine.

    Args:
        embed: the target's embeddings, tokens [...] -> [..., H].
        unembed: the target's lm_head, [..., H] -> [..., V].
        max_positions: of the target.
    """

    def __init__(
        self,
        head: BlockHead,
        embed: Callable[[Tensor], Tensor],
        unembed: Callable[[Tensor], Tensor],
        max_positions: int,
    ) -> None:
        self.head = head
        self.embed = embed
        self.unembed = unembed
        self.max_positions = max_positions
        self.most_steps: int | None = head.config.drafts

    def open(self, topk: int, num_steps: int, tokens: int) -> BlockState:
        """What the head keeps of a new request: a KV cache of the context.

        Args:
            num_steps: of its plan, beyond which slots are left out where the head is causal; 0: all slots.
        """
        config = self.head.config
        shape = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
        state = BlockState(shape, topk, tokens, self.head.fc.weight)
        state.slots = self._slots(num_steps)
        return state

    def resume(self, state: BlockState, length: int, topk: int, num_steps: int, tokens: int) -> None:
        """Reuses what another request left: keeps its first `length` positions, and makes room for this one."""
        state.resume(length, topk, tokens)
        state.slots = self._slots(num_steps)

    def _slots(self, num_steps: int) -> int:
        config = self.head.config
        shorter = config.causal and num_steps
        return min(config.block_size, num_steps + config.first_slot) if shorter else config.block_size

    def read(self, states: Sequence[HeadState], fresh: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Projects the target's aux hidden states of newly committed positions into the KV cache of the context.

        Args:
            fresh: of each request the token after each position, [A], which is ignored, and the aux hidden states
                there, [A, E]. Over fixed buffers the pending positions are read instead.
        """
        parts = [state.caught_up(*one)[1] for state, one in zip(states, fresh, strict=True)]
        positions = [
            state.span.rows(len(part_AE), part_AE.device) for state, part_AE in zip(states, parts, strict=True)
        ]
        position_A = joined(positions).clamp(max=self.max_positions - 1)
        keys_L1KTD, values_L1KTD = self.head.read_context(joined(parts)[None], position_A[None])
        counts = [len(part_AE) for part_AE in parts]
        keys, values = (states_L1KTD[:, 0].split(counts, dim=2) for states_L1KTD in (keys_L1KTD, values_L1KTD))
        for state, count, key_LKTD, value_LKTD in zip(states, counts, keys, values, strict=True):
            state.span.write(state.keys, key_LKTD)
            state.span.write(state.values, value_LKTD)
            if state.fixed is None:
                state.advance(count)
            else:
                state.fixed.clear()

    def defer(self, states: Sequence[HeadState], fresh: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Keeps newly committed positions for the next `begin`, where a round does not draft."""
        if full := deferred(states, fresh):
            self.read(full, [state.deferred.pop() for state in full])

    def begin(
        self,
        states: Sequence[BlockState],
        fresh: Sequence[tuple[Tensor, Tensor]],
        roots: Sequence[Tensor],
        noises: Sequence[Noise | None],
    ) -> list[BlockDraft]:
        """Reads newly committed positions, runs the head over one block per root, and proposes the roots' children.

        Args:
            noises: of the draws, or None: with noise the head proposes the tokens that are likeliest to be drawn.
        """
        self.read(states, fresh)
        drafts = []
        for state, root_1, noise, logits_KD in zip(states, roots, noises, self._blocks(states, roots), strict=True):
            draft = BlockDraft(root_1, [], noise, logits_KD)
            draft.layers.append(Layer.below_root(*self._children(draft, state.topk, root_1)))
            drafts.append(draft)
        return drafts

    def deepen(self, states: Sequence[HeadState], drafts: Sequence[BlockDraft]) -> list[BlockDraft]:
        """Extends every draft by the next slot; the head does not run."""
        deeper = []
        for state, draft in zip(states, drafts, strict=True):
            last = draft.layers[-1]
            best = last.logp_C.topk(state.topk)
            children = self._children(draft, state.topk, last.tokens_C[best.indices])
            layers = [*draft.layers, last.below(best, draft.first_row, *children)]
            deeper.append(BlockDraft(draft.root_1, layers, draft.noise, draft.logits_KD))
        return deeper

    def _children(self, draft: BlockDraft, topk: int, parents_A: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities and target ids of the likeliest children of these parents in the next slot, [A, k]."""
        assert draft.logits_KD is not None
        logits_AD = draft.logits_KD[draft.steps].expand(len(parents_A), -1)
        if self.head.config.markov_rank:
            logits_AD = logits_AD + self.head.markov_bias(parents_A).float()
        if draft.noise is not None:
            logits_AD = draft.noise.foreseen(logits_AD, self.head.target_ids, draft.steps + 1)
        logp_Ak, draft_ids_Ak = logits_AD.log_softmax(dim=-1).topk(topk, dim=-1)
        # A head that overflows says NaN: its proposals come last, and drafting stops.
        return logp_Ak.nan_to_num_(nan=-torch.inf, neginf=-torch.inf), self.head.target_ids[draft_ids_Ak]

    def _blocks(self, states: Sequence[BlockState], roots: Sequence[Tensor]) -> list[Tensor]:
        """Logits of the drafts of each request's block, [K, D] float32, in one pass of the head."""
        config, slots = self.head.config, [state.slots for state in states]
        mask_P = roots[0].new_full((config.block_size - 1,), config.mask_token_id)
        asked = zip(roots, slots, strict=True)
        tokens_P = torch.cat([part for root_1, count in asked for part in (root_1, mask_P[: count - 1])])
        position_P = torch.cat([state.span.rows(state.slots, tokens_P.device) for state in states])
        position_P.clamp_(max=self.max_positions - 1)

        def attend(layer: int, query_BQPD: Tensor, key_BKPD: Tensor, value_BKPD: Tensor) -> Tensor:
            parts = zip(states, *(one.split(slots, dim=2) for one in (query_BQPD, key_BKPD, value_BKPD)), strict=True)
            return torch.cat([_attend(state, layer, config.view(layer), *part) for state, *part in parts], dim=2)

        embed = self.head.embed_tokens or self.embed
        embedding_1PH = embed(tokens_P[None]).to(self.head.fc.weight.dtype)
        hidden_PH = self.head(embedding_1PH, position_P[None], attend)[0]
        hidden_PH = joined([part_PH[config.first_slot :] for part_PH in hidden_PH.split(slots)])
        logits_PD = self.unembed(hidden_PH) if self.head.lm_head is None else self.head.lm_head(hidden_PH)
        return parted(logits_PD.float(), [count - config.first_slot for count in slots])


def _attend(
    state: HeadState, layer: int, view: View, query_BQPD: Tensor, key_BKPD: Tensor, value_BKPD: Tensor
) -> Tensor:
    """Of one block, over its request's context, as far back as any slot sees, and itself."""
    start, end = state.span.start, state.span.end(0)
    anchor_1 = start if isinstance(start, Tensor) else None
    first = 0 if anchor_1 is not None or view.window is None else max(0, end - view.window)
    rows = slice(layer, layer + 1), slice(None), slice(first, end)
    key_BKSD = torch.cat((state.keys[rows], key_BKPD), dim=2)
    value_BKSD = torch.cat((state.values[rows], value_BKPD), dim=2)
    mask_PS = view.mask(end - first, query_BQPD.shape[2], query_BQPD.device, anchor_1)
    return F.scaled_dot_product_attention(query_BQPD, key_BKSD, value_BKSD, attn_mask=mask_PS, enable_gqa=True)
