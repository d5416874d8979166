"""Attention of the unroll: each column sees the step-0 keys of its document causally, and its own later keys.

A head's sliding window hides step-0 keys alone, and counts from the column: as trainers of such heads have it.

One definition and two fast forms of it. Both split a column's softmax in parts (step-0 keys; one own key
per later step), compute each where it is cheap, and merge them by their log-sum-exps, so that no mask over
the keys of all steps ever exists.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from graft_inference.heads.eagle3.model import first_step_sees
from graft_train.distill.eagle3.layout import Layout

UnrollAttention = Callable[[Tensor, list[Tensor], list[Tensor], Layout], Tensor]
"""(query_BQCD, keys, values, layout) -> attended BQCD. keys[0] BKSD is step 0's; the later ones, BKCD, are
those of steps 1..k, this one last."""


def fastest_attention(device: torch.device) -> UnrollAttention:
    match device.type:
        case "cpu":
            return merged_attention
        case "cuda":
            return flex_attention
    return reference_attention


def reference_attention(query_BQCD: Tensor, keys: list[Tensor], values: list[Tensor], layout: Layout) -> Tensor:
    """The definition, with the full mask over the keys of all steps written out."""
    column_C1, document_S = layout.columns_C[:, None], layout.document_S
    causal_CS = first_step_sees(column_C1, torch.arange(len(document_S), device=column_C1.device), layout.window)
    causal_CS = causal_CS & (document_S[column_C1] == document_S)
    own_CC = torch.eye(len(column_C1), dtype=torch.bool, device=column_C1.device)
    mask_CT = torch.cat([causal_CS] + [own_CC] * (len(keys) - 1), dim=1)
    return F.scaled_dot_product_attention(
        query_BQCD, torch.cat(keys, dim=2), torch.cat(values, dim=2), attn_mask=mask_CT, enable_gqa=True
    )


def flex_attention(query_BQCD: Tensor, keys: list[Tensor], values: list[Tensor], layout: Layout) -> Tensor:
    """The same on CUDA: flex_attention over step 0 with one block mask a batch, merged with the own keys."""
    from torch.nn.attention.flex_attention import AuxRequest

    if not query_BQCD.shape[2]:  # a kernel over no queries cannot be built
        return reference_attention(query_BQCD, keys, values, layout)
    attended_BQCD, aux = _flex(query_BQCD.device.type)(
        query_BQCD,
        keys[0],
        values[0],
        block_mask=layout.block_mask,
        enable_gqa=True,
        return_aux=AuxRequest(lse=True),
    )
    if len(keys) == 1:
        return attended_BQCD
    group = (keys[0].shape[1], query_BQCD.shape[1] // keys[0].shape[1])
    query_BKGCD, scale = query_BQCD.unflatten(1, group), query_BQCD.shape[-1] ** -0.5
    own = [(query_BKGCD * key[:, :, None]).sum(-1).flatten(1, 2).float() * scale for key in keys[1:]]
    weights_BQCJ = torch.stack([aux.lse.float(), *own], dim=-1).softmax(dim=-1).to(query_BQCD.dtype)
    output_BKGCD = (attended_BQCD * weights_BQCJ[..., :1]).unflatten(1, group)
    for step, value_BKCD in enumerate(values[1:], start=1):
        output_BKGCD = output_BKGCD + weights_BQCJ[..., step, None].unflatten(1, group) * value_BKCD[:, :, None]
    return output_BKGCD.flatten(1, 2)


@cache
def _flex(device: str) -> Any:
    from torch.nn.attention import flex_attention as flex

    return torch.compile(flex.flex_attention) if device == "cuda" else flex.flex_attention


def merged_attention(query_BQCD: Tensor, keys: list[Tensor], values: list[Tensor], layout: Layout) -> Tensor:
    """The same on a CPU: flash attention over the step-0 pieces of each document, merged with the own keys."""
    return _Merged.apply(layout, query_BQCD, keys[0], values[0], *keys[1:], *values[1:])


class _Merged(torch.autograd.Function):
    """One softmax over step-0 pieces and own keys, never written out whole.

    Flash attention's backward needs only the output and the log-sum-exp of the softmax its keys are part
    of: given the merged ones, it returns the gradients of its share.
    """

    @staticmethod
    def forward(ctx, layout, query_BQCD, key_BKSD, value_BKSD, *own):
        group = (key_BKSD.shape[1], query_BQCD.shape[1] // key_BKSD.shape[1])
        own_keys, own_values = own[: len(own) // 2], own[len(own) // 2 :]
        key_BQSD, value_BQSD = _spread(key_BKSD, group), _spread(value_BKSD, group)
        query_BKGCD, scale = query_BQCD.unflatten(1, group), query_BQCD.shape[-1] ** -0.5

        # A column has a causal piece and, after a prompt, another one, the prompt; or one piece with a window's mask.
        parts = [torch.zeros_like(query_BQCD), torch.zeros_like(query_BQCD)]
        lse_BQC2 = query_BQCD.new_full((*query_BQCD.shape[:3], 2), -torch.inf, dtype=torch.float32)
        for piece in layout.pieces:
            place = 0 if piece.causal else 1
            parts[place][:, :, piece.queries], lse_BQC2[:, :, piece.queries, place] = (
                torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                    query_BQCD[:, :, piece.queries],
                    key_BQSD[:, :, piece.keys],
                    value_BQSD[:, :, piece.keys],
                    is_causal=piece.causal,
                    attn_mask=piece.mask(query_BQCD.dtype),
                )
            )
        scores = [(query_BKGCD * key[:, :, None]).sum(-1).flatten(1, 2).float() * scale for key in own_keys]
        scores_BQCP = torch.cat([lse_BQC2, *(score[..., None] for score in scores)], dim=-1)
        lse_BQC = scores_BQCP.logsumexp(dim=-1)
        weights_BQCP = (scores_BQCP - lse_BQC[..., None]).exp_().to(query_BQCD.dtype)
        output_BQCD = parts[0].mul_(weights_BQCP[..., :1]).addcmul_(parts[1], weights_BQCP[..., 1:2])
        output_BKGCD = output_BQCD.unflatten(1, group)
        for place, value_BKCD in enumerate(own_values, start=2):
            output_BKGCD.addcmul_(weights_BQCP[..., place, None].unflatten(1, group), value_BKCD[:, :, None])
        ctx.layout, ctx.group = layout, group
        ctx.save_for_backward(query_BQCD, key_BKSD, value_BKSD, weights_BQCP, output_BQCD, lse_BQC, *own)
        return output_BQCD

    @staticmethod
    def backward(ctx, grad_BQCD):
        query_BQCD, key_BKSD, value_BKSD, weights_BQCP, output_BQCD, lse_BQC, *own = ctx.saved_tensors
        group, scale = ctx.group, query_BQCD.shape[-1] ** -0.5
        own_keys, own_values = own[: len(own) // 2], own[len(own) // 2 :]
        key_BQSD, value_BQSD = _spread(key_BKSD, group), _spread(value_BKSD, group)
        grad_BQCD = grad_BQCD.contiguous()
        query_grad, key_grad, value_grad = map(torch.zeros_like, (query_BQCD, key_BQSD, value_BQSD))
        for piece in ctx.layout.pieces:
            queries, keys = (slice(None), slice(None), piece.queries), (slice(None), slice(None), piece.keys)
            grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad_BQCD[queries],
                query_BQCD[queries],
                key_BQSD[keys],
                value_BQSD[keys],
                output_BQCD[queries],
                lse_BQC[queries],
                0.0,
                piece.causal,
                attn_mask=piece.mask(query_BQCD.dtype),
            )
            query_grad[queries] += grads[0]
            key_grad[keys] += grads[1]
            value_grad[keys] += grads[2]
        # Softmax: d score = weight * (d weight - sum over all keys of weight * d weight).
        grad_BKGCD, query_BKGCD = grad_BQCD.unflatten(1, group), query_BQCD.unflatten(1, group)
        mean_BKGC = (grad_BQCD * output_BQCD).sum(-1).unflatten(1, group)
        query_grad_BKGCD = query_grad.unflatten(1, group)
        own_key_grads, own_value_grads = [], []
        for place, (key_BKCD, value_BKCD) in enumerate(zip(own_keys, own_values, strict=True), start=2):
            weight_BKGC1 = weights_BQCP[..., place, None].unflatten(1, group)
            score_BKGC1 = ((grad_BKGCD * value_BKCD[:, :, None]).sum(-1) - mean_BKGC)[..., None] * weight_BKGC1 * scale
            query_grad_BKGCD.addcmul_(score_BKGC1, key_BKCD[:, :, None])
            own_key_grads.append((score_BKGC1 * query_BKGCD).sum(2))
            own_value_grads.append((weight_BKGC1 * grad_BKGCD).sum(2))
        key_grad, value_grad = (grad.unflatten(1, group).sum(2) for grad in (key_grad, value_grad))
        return None, query_grad, key_grad, value_grad, *own_key_grads, *own_value_grads


def _spread(key_BKSD: Tensor, group: tuple[int, int]) -> Tensor:
    return key_BKSD.repeat_interleave(group[1], dim=1) if group[1] > 1 else key_BKSD
