"""EAGLE-3's training-time test: the head drafts several steps ahead at every column at once.

At step k, column t reads the embedding of token t+1+k and the head's own previous output at t, and its
query sees the step-0 keys of its document up to t, within the head's window, plus one key per later step, the one of
its own column: what a server's draft chain that starts at t would have in its cache.
"""

import torch
from torch import Tensor

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
    columns_C = layout.columns_C
    keys: list[Tensor] = []
    values: list[Tensor] = []

    def attend(query_BQSD: Tensor, key_BKSD: Tensor, value_BKSD: Tensor) -> Tensor:
        # Under autocast RoPE leaves queries and keys in fp32, and the projections values in bf16.
        query_BQSD = query_BQSD.to(value_BKSD.dtype)
        keys.append(key_BKSD.to(value_BKSD.dtype))
        values.append(value_BKSD)
        if len(keys) > 1:
            return attention(query_BQSD, keys, values, layout)
        # At step 0 the other columns only lend their keys; what they attend to is nobody's input.
        attended_BQCD = attention(query_BQSD[:, :, columns_C], keys, values, layout)
        return torch.zeros_like(query_BQSD).index_copy(2, columns_C, attended_BQCD)

    outputs: list[Tensor] = []
    feature_BCH = head.fuse(aux_SE[None])
    reads = torch.arange(len(embedding_SH), device=columns_C.device)
    for step in range(steps):
        # Column t reads token t+1+step; past the end of its document any embedding will do.
        read_BCH = embedding_SH[(reads + 1 + step).clamp(max=len(embedding_SH) - 1)][None]
        output_BCH = head(read_BCH, feature_BCH, layout.positions_S[reads][None] + step, attend)
        feature_BCH = output_BCH if step else output_BCH[:, columns_C]
        reads = columns_C
        outputs.append(feature_BCH[0])
    return outputs
