"""All blocks of a packed batch in one pass of the head, each as a server drafts it behind its anchor."""

from collections.abc import Iterable
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from graft_inference.heads.base import turned
from graft_inference.heads.block.model import BlockHead, BlockLayer
from graft_train.distill.block.attention import BlockAttention, fastest_attention
from graft_train.distill.block.layout import BlockLayout


def draft_blocks(
    head: BlockHead,
    embedding_SH: Tensor,
    mask_H: Tensor,
    aux_SE: Tensor,
    layout: BlockLayout,
    attention: BlockAttention | None = None,
) -> Tensor:
    """What lm_head reads of every draft of every block, [A, K, H].

    Args:
        embedding_SH: the target's embeddings of the batch's tokens.
        mask_H: that of the mask token.
        aux_SE: the target's aux hidden states of the batch's tokens.
        attention: default: the fastest for the device.
    """
    attention = attention or fastest_attention(embedding_SH.device)
    config, last = head.config, head.config.num_hidden_layers - 1
    keys_LBKSD, values_LBKSD = head.read_context(aux_SE[None], layout.positions_S[None])
    views = [config.view(layer) for layer in range(last + 1)]
    layouts = {view: layout.seen_by(view) for view in views}
    # Before the first layer all mask slots are alike: one row stands for them, behind those of the anchors.
    rows_1RH = torch.cat([embedding_SH[layout.anchors_A], mask_H[None]])[None]
    hidden_1NH, rope = _spread(rows_1RH, layout), head.rotary_emb(rows_1RH, layout.slot_positions_N[None])
    for index, layer in enumerate(cast(Iterable[BlockLayer], head.layers)):
        inner, seen, query_rope = layer.self_attn, layouts[views[index]], rope
        states_1RH = layer.input_layernorm(hidden_1NH if index else rows_1RH)
        query, (key, value) = inner.unturned_query(states_1RH), inner.unturned_key_value(states_1RH)
        if not index:
            query, key, value = (_spread(part, layout) for part in (query, key, value))
        if index == last and config.first_slot:
            # The anchor's own slot predicts nothing: in the last layer it only lends its key.
            seen = replace(seen, first=config.first_slot)
            hidden_1NH, query = _asking(hidden_1NH, seen), _asking(query, seen)
            query_rope = _asking(rope[0], seen), _asking(rope[1], seen)
        # Under autocast RoPE leaves queries and keys in fp32, and the projections values in bf16.
        dtype = value.dtype
        attended_1QND = attention(
            turned(query, query_rope).to(dtype),
            keys_LBKSD[index].to(dtype),
            values_LBKSD[index].to(dtype),
            turned(key, rope).to(dtype),
            value,
            seen,
        )
        hidden_1NH = layer.behind(inner.joined(attended_1QND), hidden_1NH)
    return head.norm(hidden_1NH)[0].unflatten(0, (len(layout.anchors_A), layout.slots - config.first_slot))


def _spread(rows: Tensor, layout: BlockLayout) -> Tensor:
    """Rows [..., A + 1, D] of the anchors and, last, of the mask -> of all slots, [..., A * P, D]."""
    anchors, mask = rows[..., :-1, None, :], rows[..., -1:, None, :]
    masks = mask.expand(*rows.shape[:-2], len(layout.anchors_A), layout.slots - 1, -1)
    return torch.cat([anchors, masks], dim=-2).flatten(-3, -2)


def _asking(slots: Tensor, layout: BlockLayout) -> Tensor:
    """Of all slots [..., A * P, D] those that ask."""
    return slots.unflatten(-2, (-1, layout.slots))[..., layout.first :, :].flatten(-3, -2)
