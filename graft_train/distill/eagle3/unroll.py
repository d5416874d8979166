"""EAGLE-3's training-time test: the head drafts several steps ahead at every column at once.

At step k, column t reads the embedding of token t+1+k and the head's own previous output at t, and its
query sees the step-0 keys of its document up to t, within the head's window, plus one key per later step, the one of
its own column: what a server's draft chain that starts at t would have in its cache.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from graft_inference.heads.eagle3.model import DraftHead
from graft_train.distill.eagle3.attention import UnrollAttention, fastest_attention
from graft_train.distill.eagle3.layout import Layout


def unroll(
    head: DraftHead,
    embedding_SH: Tensor,
    aux_SE: Tensor,
    layout: Layout,
    steps: int,
    attention: UnrollAttention | None = None,
) -> list[Tensor]:
    """Runs the head `steps` draft steps ahead from every column of the layout.

    Args:
        embedding_SH: the target's embeddings of the tokens themselves, unshifted.
        aux_SE: the target's aux hidden states at the same positions.
        attention: default: the fastest for the device.

    Returns:
        Per step the head's output at the layout's columns, [C, H]. Output [k] of column t
        predicts token t+2+k; where that lies beyond t's answer it is meaningless.
    """
    attention = attention or fastest_attention(embedding_SH.device)
    layer, columns_C = head.midlayer, layout.columns_C
    inner, width = layer.self_attn, head.config.hidden_size
    weights = [projection.weight for projection in (inner.q_proj, inner.k_proj, inner.v_proj)]
    # Projections of embedding and feature add up, and those of a token's embedding serve all steps.
    of_embedding, of_feature = ([weight[:, part] for weight in weights] for part in (slice(width), slice(width, None)))
    normed_SH = layer.input_layernorm(embedding_SH)
    embedded = [F.linear(normed_SH, weight) for weight in of_embedding]

    def projected(part: int, token_R: Tensor, normed_RH: Tensor) -> Tensor:
        return embedded[part].index_select(0, token_R) + F.linear(normed_RH, of_feature[part])

    keys: list[Tensor] = []
    values: list[Tensor] = []
    outputs: list[Tensor] = []
    feature_RH, reads_R = head.fuse(aux_SE), torch.arange(len(embedding_SH), device=columns_C.device)
    for step in range(steps):
        # Column t reads token t+1+step; past the end of its document any embedding will do.
        token_R = (reads_R + 1 + step).clamp(max=len(embedding_SH) - 1)
        normed_RH, rope = layer.hidden_norm(feature_RH), _rope(head, embedding_SH, layout, reads_R, step)
        key, value = (projected(part, token_R, normed_RH) for part in (1, 2))
        key_BKRD, value_BKRD = inner.key_value(key[None], value[None], rope)
        if not step:
            # The other positions only lend their keys; what they attend to is nobody's input.
            token_R, feature_RH, normed_RH = (
                one.index_select(0, columns_C) for one in (token_R, feature_RH, normed_RH)
            )
            rope, reads_R = _rope(head, embedding_SH, layout, columns_C, step), columns_C
        query = projected(0, token_R, normed_RH)
        # Under autocast RoPE leaves queries and keys in fp32, and the projections values in bf16.
        keys.append(key_BKRD.to(value_BKRD.dtype))
        values.append(value_BKRD)
        attended_BQCD = attention(inner.query(query[None], rope).to(value_BKRD.dtype), keys, values, layout)
        feature_RH = head.output(layer.behind(inner.joined(attended_BQCD)[0], feature_RH, normed_RH))
        outputs.append(feature_RH)
    return outputs


def _rope(head: DraftHead, states_SH: Tensor, layout: Layout, reads_R: Tensor, step: int) -> tuple[Tensor, Tensor]:
    return head.rotary_emb(states_SH, layout.positions_S[reads_R][None] + step)
