"""EAGLE-3's training-time test: the head drafts several steps ahead at every position at once.

At step k, position t reads the embedding of token t+1+k and the head's own previous output at t, and its
query sees the step-0 keys up to t plus one key per later step, the one of its own column: what a server's
draft chain that starts at t would have in its cache.

Rows are padded on the right. A causal query never looks right, so padding needs no mask here; the loss
leaves padded positions out.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from graft_inference.draft_head import DraftHead

UnrollAttention = Callable[[Tensor, list[Tensor], list[Tensor]], Tensor]
"""(query_BQCD, keys, values) -> attended BQCD. keys[0] BKSD is step 0's; the later ones, BKCD, are those of
steps 1..k, this one last. Queries are the last C of the S columns."""


def reference_attention(query_BQCD: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    """The definition, with the full mask over the keys of all steps written out."""
    columns, length = query_BQCD.shape[2], keys[0].shape[2]
    query_column = torch.arange(length - columns, length, device=query_BQCD.device)[:, None]
    causal_CS = query_column >= torch.arange(length, device=query_BQCD.device)
    own_CC = torch.eye(columns, dtype=torch.bool, device=query_BQCD.device)
    mask_CT = torch.cat([causal_CS] + [own_CC] * (len(keys) - 1), dim=1)
    return F.scaled_dot_product_attention(
        query_BQCD, torch.cat(keys, dim=2), torch.cat(values, dim=2), attn_mask=mask_CT, enable_gqa=True
    )


def merged_attention(query_BQCD: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    """The same on a CPU, twice as fast: flash attention over step 0, merged with the few later scores."""
    groups = query_BQCD.shape[1] // keys[0].shape[1]
    if groups > 1:
        keys = [key.repeat_interleave(groups, dim=1) for key in keys]
        values = [value.repeat_interleave(groups, dim=1) for value in values]
    if len(keys) == 1:
        return F.scaled_dot_product_attention(query_BQCD, keys[0], values[0], is_causal=True)
    own_keys_BQCJD, own_values_BQCJD = torch.stack(keys[1:], dim=3), torch.stack(values[1:], dim=3)
    return _Merged.apply(query_BQCD, keys[0], values[0], own_keys_BQCJD, own_values_BQCJD)


class _Merged(torch.autograd.Function):
    """One softmax over the causal step-0 keys and each column's J own keys, never written out whole.

    Flash attention's backward needs only the output and the log-sum-exp of the softmax its keys are part
    of: given the merged ones, it returns the gradients of its share.
    """

    @staticmethod
    def forward(ctx, query_BQCD, key_BQSD, value_BQSD, own_keys_BQCJD, own_values_BQCJD):
        causal = _causal(query_BQCD, key_BQSD)
        attended_BQCD, causal_lse_BQC = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query_BQCD, key_BQSD, value_BQSD, **causal
        )
        own_BQCJ = (query_BQCD[..., None, :] * own_keys_BQCJD).sum(-1).float() * query_BQCD.shape[-1] ** -0.5
        lse_BQC = torch.logaddexp(causal_lse_BQC, own_BQCJ.logsumexp(dim=-1))
        weights_BQCJ = (own_BQCJ - lse_BQC[..., None]).exp().to(query_BQCD.dtype)
        share_BQC1 = (causal_lse_BQC - lse_BQC).exp().to(query_BQCD.dtype)[..., None]
        output_BQCD = attended_BQCD * share_BQC1 + (weights_BQCJ[..., None] * own_values_BQCJD).sum(-2)
        inputs = (query_BQCD, key_BQSD, value_BQSD, own_keys_BQCJD, own_values_BQCJD)
        ctx.save_for_backward(*inputs, weights_BQCJ, output_BQCD, lse_BQC)
        return output_BQCD

    @staticmethod
    def backward(ctx, grad_BQCD):
        *inputs, weights_BQCJ, output_BQCD, lse_BQC = ctx.saved_tensors
        query_BQCD, key_BQSD, value_BQSD, own_keys_BQCJD, own_values_BQCJD = inputs
        flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        grad_query, grad_key, grad_value = flash_backward(
            grad_BQCD, query_BQCD, key_BQSD, value_BQSD, output_BQCD, lse_BQC, **_causal(query_BQCD, key_BQSD)
        )
        # Softmax: d score = weight * (d weight - sum over all keys of weight * d weight).
        mean_BQC1 = (grad_BQCD * output_BQCD).sum(-1, keepdim=True)
        grad_own_BQCJ = weights_BQCJ * ((grad_BQCD[..., None, :] * own_values_BQCJD).sum(-1) - mean_BQC1)
        grad_own_BQCJ1 = grad_own_BQCJ[..., None] * query_BQCD.shape[-1] ** -0.5
        return (
            grad_query + (grad_own_BQCJ1 * own_keys_BQCJD).sum(-2),
            grad_key,
            grad_value,
            grad_own_BQCJ1 * query_BQCD[..., None, :],
            weights_BQCJ[..., None] * grad_BQCD[..., None, :],
        )


def _causal(query_BQCD: Tensor, key_BQSD: Tensor) -> dict[str, Any]:
    """Arguments of flash attention for queries that are the last C of S columns."""
    columns, length = query_BQCD.shape[2], key_BQSD.shape[2]
    if columns == length:
        return {"dropout_p": 0.0, "is_causal": True}
    # `is_causal` would align the first query with the first key.
    bias_CS = torch.full((columns, length), -torch.inf, dtype=query_BQCD.dtype).triu(length - columns + 1)
    return {"dropout_p": 0.0, "is_causal": False, "attn_mask": bias_CS}


def unroll(
    head: DraftHead,
    embedding_BSH: Tensor,
    taps_BSE: Tensor,
    steps: int,
    first: int = 0,
    attention: UnrollAttention | None = None,
) -> list[Tensor]:
    """Runs the head `steps` draft steps ahead from every position.

    Args:
        embedding_BSH: the target's embeddings of the tokens themselves, unshifted.
        taps_BSE: the target's tapped states at the same positions.
        first: columns before this one only lend their step-0 keys; no draft starts there.
        attention: default: the fastest for the device.

    Returns:
        Per step the head's un-normed output at columns first..S-1, [B, S-first, H]. Output [k][:, t-first]
        predicts token t+2+k; where that lies beyond the row it is meaningless.
    """
    length = embedding_BSH.shape[1]
    # A GPU's masked kernel never writes its scores out, so the definition serves there.
    attention = attention or (merged_attention if embedding_BSH.is_cpu else reference_attention)
    keys: list[Tensor] = []
    values: list[Tensor] = []

    def attend(query_BQCD: Tensor, key_BKCD: Tensor, value_BKCD: Tensor) -> Tensor:
        # Under autocast RoPE leaves queries and keys in fp32, and the projections values in bf16.
        keys.append(key_BKCD.to(value_BKCD.dtype))
        values.append(value_BKCD)
        return attention(query_BQCD.to(value_BKCD.dtype), keys, values)

    outputs = []
    feature_BCH = head.fuse(taps_BSE)
    for step in range(steps):
        start = first if step else 0
        positions_1C = torch.arange(start + step, length + step, device=embedding_BSH.device)[None]
        # Column t reads token t+1+step; past the end of the row any embedding will do.
        read_BCH = F.pad(embedding_BSH[:, start + 1 + step :], (0, 0, 0, min(1 + step, length - start)))
        output_BCH = head(read_BCH, feature_BCH, positions_1C, attend)
        feature_BCH = output_BCH if step else output_BCH[:, first:]
        outputs.append(feature_BCH)
    return outputs
