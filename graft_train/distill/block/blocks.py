"""All blocks of a packed batch in one pass of the head, each as a server drafts it behind its anchor."""

import torch
from torch import Tensor

from graft_inference.heads.block.model import BlockHead
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
    keys_LBKSD, values_LBKSD = head.read_context(aux_SE[None], layout.positions_S[None])
    views = [head.config.view(layer) for layer in range(head.config.num_hidden_layers)]
    layouts = {view: layout.seen_by(view) for view in views}

    def attend(layer: int, query_BQND: Tensor, key_BKND: Tensor, value_BKND: Tensor) -> Tensor:
        # Under autocast RoPE leaves queries and keys in fp32, and the projections values in bf16.
        dtype = value_BKND.dtype
        context = keys_LBKSD[layer].to(dtype), values_LBKSD[layer].to(dtype)
        return attention(query_BQND.to(dtype), *context, key_BKND.to(dtype), value_BKND, layouts[views[layer]])

    masks_AMH = mask_H.expand(len(layout.anchors_A), layout.slots - 1, -1)
    embedding_APH = torch.cat([embedding_SH[layout.anchors_A][:, None], masks_AMH], dim=1)
    hidden_BNH = head(embedding_APH.flatten(0, 1)[None], layout.slot_positions_N[None], attend)
    return hidden_BNH[0].unflatten(0, (-1, layout.slots))[:, head.config.first_slot :]
