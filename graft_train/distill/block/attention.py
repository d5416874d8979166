"""Attention of the slots of blocks: each sees its document before its anchor, and its own block.

Two fast forms. Keys of context and block are different tensors, and a mask over all of both never exists on a CPU:
each softmax is computed in two parts, which are merged by their log-sum-exps.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from graft_train.distill.block.layout import BlockLayout

BlockAttention = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, BlockLayout], Tensor]
"""(query_1QND, context's key_1KSD and value_1KSD, the blocks' key_1KND and value_1KND, layout) -> attended 1QND,
for N = A * P slots, of which those that do not ask (`layout.first`) have no query."""


def fastest_attention(device: torch.device) -> BlockAttention:
    return merged_attention if device.type == "cpu" else flex_attention


def flex_attention(
    query: Tensor, context_key: Tensor, context_value: Tensor, key: Tensor, value: Tensor, layout: BlockLayout
) -> Tensor:
    """On CUDA: flex_attention over context and blocks, with one block mask a batch."""
    if not query.shape[2]:  # a kernel over no queries cannot be built
        return query
    keys, values = torch.cat([context_key, key], dim=2), torch.cat([context_value, value], dim=2)
    return _flex(query.device.type)(query, keys, values, block_mask=layout.block_mask, enable_gqa=True)


@cache
def _flex(device: str) -> Any:
    from torch.nn.attention import flex_attention as flex

    return torch.compile(flex.flex_attention) if device == "cuda" else flex.flex_attention


def merged_attention(
    query: Tensor, context_key: Tensor, context_value: Tensor, key: Tensor, value: Tensor, layout: BlockLayout
) -> Tensor:
    """On a CPU: masked flash attention over each document before its anchors, merged with the own blocks."""
    return _Merged.apply(layout, query, context_key, context_value, key, value)


class _Merged(torch.autograd.Function):
    """One softmax over context and own block, never written out whole.

    Flash attention's backward needs only the output and the log-sum-exp of the softmax its keys are part
    of: given the merged ones, it returns the gradients of its share. Query heads of a key head are folded into
    queries, which saves repeating keys: [K, G, A, P, D] and [K, G * slots, D] are the same rows. P stands for the slots
    that ask, where it is a query's.
    """

    @staticmethod
    def forward(ctx, layout, query, context_key, context_value, key, value):
        query_KGAPD, blocks = _grouped(query, key.shape[1], layout.asking), (-1, layout.slots)
        key_KAPD, value_KAPD = key[0].unflatten(1, blocks), value[0].unflatten(1, blocks)
        output_KGAPD, lse_KGAP = torch.empty_like(query_KGAPD), query_KGAPD.new_empty(query_KGAPD.shape[:-1]).float()
        for (anchors, tokens), bias in zip(layout.pieces, layout.biases, strict=True):
            part = query_KGAPD[:, :, anchors]
            attended, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                part.flatten(1, 3)[None],
                context_key[:, :, tokens],
                context_value[:, :, tokens],
                attn_mask=_mask(bias, part),
            )
            output_KGAPD[:, :, anchors], lse_KGAP[:, :, anchors] = attended.view_as(part), lse.view(part.shape[:-1])
        own_KGAPP = _own_scores(query_KGAPD, key_KAPD, layout)
        merged_KGAP = torch.logaddexp(lse_KGAP, own_KGAPP.logsumexp(-1))
        weight_KGAPP = (own_KGAPP - merged_KGAP[..., None]).exp_().to(query.dtype)
        output_KGAPD *= (lse_KGAP - merged_KGAP).exp_().to(query.dtype)[..., None]
        output_KGAPD += weight_KGAPP @ value_KAPD[:, None]
        ctx.layout = layout
        ctx.save_for_backward(
            query_KGAPD, context_key, context_value, key_KAPD, value_KAPD, output_KGAPD, merged_KGAP, weight_KGAPP
        )
        return output_KGAPD.flatten(2, 3).flatten(0, 1)[None]

    @staticmethod
    def backward(ctx, grad):
        query_KGAPD, context_key, context_value, key_KAPD, value_KAPD, output, lse, weight_KGAPP = ctx.saved_tensors
        layout, scale = ctx.layout, query_KGAPD.shape[-1] ** -0.5
        grad_KGAPD = _grouped(grad, context_key.shape[1], layout.asking)
        query_grad, key_grad, value_grad = map(torch.zeros_like, (query_KGAPD, context_key, context_value))
        for (anchors, tokens), bias in zip(layout.pieces, layout.biases, strict=True):
            part = query_KGAPD[:, :, anchors]
            grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad_KGAPD[:, :, anchors].flatten(1, 3)[None],
                part.flatten(1, 3)[None],
                context_key[:, :, tokens],
                context_value[:, :, tokens],
                output[:, :, anchors].flatten(1, 3)[None],
                lse[:, :, anchors].flatten(1, 3)[None],
                0.0,
                False,
                attn_mask=_mask(bias, part),
            )
            query_grad[:, :, anchors] = grads[0].view_as(part)
            key_grad[:, :, tokens], value_grad[:, :, tokens] = grads[1], grads[2]
        # Softmax: d score = weight * (d weight - sum over all keys of weight * d weight).
        mean_KGAP1 = (grad_KGAPD * output).sum(-1, keepdim=True)
        score_KGAPP = weight_KGAPP * (grad_KGAPD @ value_KAPD[:, None].transpose(-1, -2) - mean_KGAP1) * scale
        query_grad += score_KGAPP @ key_KAPD[:, None]
        own_key_grad = (score_KGAPP.transpose(-1, -2) @ query_KGAPD).sum(1).flatten(1, 2)[None]
        own_value_grad = (weight_KGAPP.transpose(-1, -2) @ grad_KGAPD).sum(1).flatten(1, 2)[None]
        return None, query_grad.flatten(2, 3).flatten(0, 1)[None], key_grad, value_grad, own_key_grad, own_value_grad


def _grouped(query: Tensor, key_heads: int, slots: int) -> Tensor:
    """[1, Q, A * P, D] -> [K, G, A, P, D]"""
    return query[0].unflatten(0, (key_heads, -1)).unflatten(2, (-1, slots))


def _mask(bias: Tensor, part_KGAPD: Tensor) -> Tensor:
    """The bias of the slots of a piece for all query heads of a key head, [1, 1, G * slots, keys]."""
    return bias.to(part_KGAPD.dtype).repeat(part_KGAPD.shape[1], 1)[None, None]


def _own_scores(query_KGAPD: Tensor, key_KAPD: Tensor, layout: BlockLayout) -> Tensor:
    scores = (query_KGAPD @ key_KAPD[:, None].transpose(-1, -2)).float() * query_KGAPD.shape[-1] ** -0.5
    if layout.view.causal:
        behind = torch.ones(layout.asking, layout.slots, dtype=torch.bool, device=scores.device).triu(1 + layout.first)
        scores = scores.masked_fill_(behind, -torch.inf)
    return scores
