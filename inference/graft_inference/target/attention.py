"""Tree attention: each node attends to the KV cache and to its ancestors. transformers knows it as `graft_tree`."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface

from ..errors import GraftError
from .kv_cache import Span

ATTENTION = "graft_tree"


class UntoldError(GraftError):
    """Our attention was called without the `visible` argument that a `Target` passes to its model."""


class Visibility:
    """The attention mask of a pass over N tokens: each attends to committed tokens, and to some of its own pass.

    Sliding windows count logical positions: of a committed key that is its index, of a token of the pass it is given.

    Args:
        positions_N: logical positions of the tokens.
        span: where in the KV cache the pass writes: after the committed keys.
        own_NN: bool, which tokens of the pass each one attends to; None for causal (a prompt).
    """

    def __init__(self, positions_N: Tensor, span: Span, own_NN: Tensor | None = None) -> None:
        self.positions_N = positions_N
        self.span = span
        self.own_NN = own_NN
        self.windows: set[int | None] = set()
        self._biases: dict[tuple[int | None, int, torch.dtype, torch.device], Tensor | None] = {}

    def first_key(self, window: int | None) -> int:
        """Index of the first key that any token of this pass may attend to, as far as the host knows."""
        start = self.span.start
        return max(0, start - window + 1) if window and isinstance(start, int) else 0

    def bias(self, window: int | None, groups: int, query: Tensor) -> Tensor | None:
        """The mask as an additive bias, [groups * N, K], over the keys from `first_key` on: 0 or -inf; None: causal.

        Args:
            groups: how often the N rows are repeated, for query heads that share a key head.
            query: gives the dtype and device.
        """
        key = (window, groups, query.dtype, query.device)
        if key not in self._biases:
            self.windows.add(window)
            mask_NK = self._build(window)
            # Once a pass: of a mask of booleans every layer would make it anew.
            self._biases[key] = None if mask_NK is None else as_bias(mask_NK, groups, query)
        return self._biases[key]

    def _build(self, window: int | None) -> Tensor | None:
        rows, start, device = len(self.positions_N), self.span.start, self.positions_N.device
        if window is not None and window >= self.span.end(rows):
            window = None  # no row stands deeper than its index, so none is that far from a key
        is_causal = self.own_NN is None and start == 0 and window is None
        if not self.span.is_fixed and (rows == 1 or is_causal):
            return None
        own_NN = self.own_NN
        if own_NN is None:
            own_NN = torch.ones((rows, rows), dtype=torch.bool, device=device).tril()
        first, row_N = self.first_key(window), self.span.rows(rows, device)
        place_K = torch.arange(first, self.span.end(rows), device=device)
        mask_NK = (place_K < start).repeat(rows, 1).index_copy_(1, row_N - first, own_NN)
        if window is not None:
            position_K = place_K.index_copy(0, row_N - first, self.positions_N)
            mask_NK &= position_K > self.positions_N[:, None] - window
        return mask_NK


def tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor | Sequence[Tensor],
    value: Tensor | Sequence[Tensor],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    visible: Visibility | Sequence[Visibility] | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention of N queries over K keys, or of several segments of queries, each over keys of its own.

    Many parameters: transformers passes them by these names.

    Args:
        query: [1, q_heads, N, D]; key, value: [1, kv_heads, K, D], one of each per segment.
        visible: which keys each query sees; of several segments, that of each.
        sliding_window: keys this far back, and further, are hidden.
        softcap: scores s become softcap * tanh(s / softcap).
        s_aux: attention sinks, one logit per query head that takes part in the softmax and has no value.

    Raises:
        UntoldError: the model was not called by its `Target`, or does not pass `visible` on to its attention.
    """
    if visible is None:
        raise UntoldError("this model serves a GraftEngine: call engine.target.release() to use it otherwise")
    settings = (scaling, sliding_window, softcap, s_aux)
    if isinstance(visible, Visibility):
        return _attend(query, key, value, visible, *settings).transpose(1, 2), None  # type: ignore[arg-type]
    queries = query.split([len(one.positions_N) for one in visible], dim=2)
    segments = zip(queries, key, value, visible, strict=True)
    return torch.cat([_attend(*segment, *settings) for segment in segments], dim=2).transpose(1, 2), None


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Visibility,
    scaling: float | None,
    sliding_window: int | None,
    softcap: float | None,
    s_aux: Tensor | None,
) -> Tensor:
    """Attends for one segment, [1, q_heads, N, D]. Grouped query heads become rows, which saves repeating K and V."""
    groups, queries = query.shape[1] // key.shape[1], query.shape[2]
    bias = visible.bias(sliding_window, groups, query)
    start = visible.first_key(sliding_window)
    if start:
        key, value = key[:, :, start:], value[:, :, start:]
    folded = query.reshape(1, key.shape[1], groups * queries, -1)
    if softcap is not None or s_aux is not None:
        out = explicit_attention(folded, key, value, queries, bias, scaling, softcap, s_aux)
    elif bias is None:
        out = F.scaled_dot_product_attention(
            query, key, value, is_causal=queries > 1, scale=scaling, enable_gqa=groups > 1
        )
    else:
        out = F.scaled_dot_product_attention(folded, key, value, attn_mask=bias, scale=scaling)
    return out.reshape(1, query.shape[1], queries, -1)


def as_bias(mask_NK: Tensor, groups: int, like: Tensor) -> Tensor:
    """A boolean mask as an additive bias: 0 where True, else -inf, [groups * N, K].

    Args:
        groups: how often the N rows are repeated, for query heads that share a key head.
        like: gives the dtype and device.
    """
    bias_NK = like.new_zeros(mask_NK.shape).masked_fill_(~mask_NK.to(like.device), -torch.inf)
    return bias_NK.repeat(groups, 1)


def explicit_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    queries: int,
    bias: Tensor | None,
    scaling: float | None,
    softcap: float | None,
    s_aux: Tensor | None,
) -> Tensor:
    """What scaled_dot_product_attention cannot do: capped scores and sinks. query: [1, kv_heads, groups * N, D]."""
    groups, keys = query.shape[2] // queries, key.shape[2]
    scores = query @ key.transpose(2, 3) * (query.shape[3] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if bias is None and queries > 1:
        bias = as_bias(torch.ones((queries, queries), dtype=torch.bool, device=query.device).tril(), groups, query)
    if bias is not None:
        scores = scores + bias
    if s_aux is not None:
        sinks = s_aux.to(scores.dtype).repeat_interleave(queries).view(1, key.shape[1], -1, 1)
        scores = torch.cat((scores, sinks), dim=-1)
    probs = scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype)[..., :keys]
    return probs @ value


AttentionInterface.register(ATTENTION, tree_attention)
