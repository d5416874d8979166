"""A head that drafts a whole block in one pass: the backbone of DFlash and DSpark.

Its input in a round is a block of B *slots*: the last accepted token (the *anchor*, at position p) and B - 1 mask
tokens, at positions p..p+B-1. They attend to the *context*, which is the target's aux hidden states of all tokens
before the anchor, and to each other. Every layer projects the same context, so its keys and values are computed once
per accepted token, and cached.

There are two layouts of the slots. Fill-in (DFlash): slot k predicts the token at its own position p+k, and slot 0
predicts nothing. Next-token (DSpark): slot k predicts the token after it, at p+k+1. In both, draft k = 1, 2, ... is the
token at p+k. Embeddings and lm_head are the target's, unless a checkpoint brings its own; a reduced draft vocabulary
always brings the lm_head's rows of its own.

Shape suffixes: B batch, T context tokens, P slots of a block, K drafts of a block (in attention: key/value heads),
L layers, Q query heads, D head size (of logits: draft vocabulary), H hidden size, E aux hidden states concatenated.
"""

from collections.abc import Callable, Collection
from typing import Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import GraftError
from ..base import GatedMLP, HeadModule, turned
from .config import BlockHeadConfig

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, query_BQPD, key_BKPD, value_BKPD) of the block -> attended BQPD; owns context, mask and scale."""
Rope = tuple[Tensor, Tensor]


class BlockAttention(nn.Module):
    """Qwen3's attention, with the same projections of keys and values for context and block."""

    def __init__(self, config: BlockHeadConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        q_width, kv_width = (
            heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads)
        )
        self.q_proj = nn.Linear(config.hidden_size, q_width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.o_proj = nn.Linear(q_width, config.hidden_size, bias=False)
        self.q_norm = nn.RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = nn.RMSNorm(config.head_dim, config.rms_norm_eps)

    def key_value(self, states_BTH: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        """Keys, normed and turned, and values. [B, K, T, D] each"""
        key_BKTD, value_BKTD = self.unturned_key_value(states_BTH)
        return turned(key_BKTD, rope), value_BKTD

    def forward(self, states_BPH: Tensor, rope: Rope, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        query_BQPD = turned(self.unturned_query(states_BPH), rope)
        return self.joined(attend(query_BQPD, *self.key_value(states_BPH, rope)))

    def unturned_query(self, states_BPH: Tensor) -> Tensor:
        """Normed, before RoPE. [B, Q, P, D]"""
        return self.q_norm(self._heads(self.q_proj(states_BPH)))

    def unturned_key_value(self, states_BTH: Tensor) -> tuple[Tensor, Tensor]:
        """Keys, normed, before RoPE, and values. [B, K, T, D] each"""
        return self.k_norm(self._heads(self.k_proj(states_BTH))), self._heads(self.v_proj(states_BTH))

    def joined(self, attended_BQPD: Tensor) -> Tensor:
        return self.o_proj(attended_BQPD.transpose(1, 2).flatten(2))

    def _heads(self, projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class BlockLayer(nn.Module):
    """One decoder layer; module names are the checkpoint's."""

    def __init__(self, config: BlockHeadConfig) -> None:
        super().__init__()
        self.self_attn = BlockAttention(config)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_BPH: Tensor, rope: Rope, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        return self.behind(self.self_attn(self.input_layernorm(hidden_BPH), rope, attend), hidden_BPH)

    def behind(self, attended_BPH: Tensor, hidden_BPH: Tensor) -> Tensor:
        """The layer behind its attention."""
        hidden_BPH = hidden_BPH + attended_BPH
        return hidden_BPH + self.mlp(self.post_attention_layernorm(hidden_BPH))


class MarkovHead(nn.Module):
    """DSpark's vanilla bias of a draft by the token before it: W2 W1[token]."""

    def __init__(self, config: BlockHeadConfig) -> None:
        super().__init__()
        self.markov_w1 = nn.Embedding(config.vocab_size, config.markov_rank)
        self.markov_w2 = nn.Linear(config.markov_rank, config.draft_vocab_size, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.markov_w2(self.markov_w1(tokens))


class BlockHead(HeadModule):
    """A block head, with the tensors of a native checkpoint.

    `lm_head_VH` below is the target's lm_head; a head that has its own does not read it.

    Args:
        own: of "embed_tokens" and "lm_head" those that the checkpoint brings. Ours bring none but the rows of a reduced
            draft vocabulary.
    """

    def __init__(self, config: BlockHeadConfig, own: Collection[str] = ()) -> None:
        super().__init__(config.rotary(), config.vocab_size, config.draft_vocab_size)
        self.config = config
        self.fc = nn.Linear(len(config.aux_layer_ids) * config.hidden_size, config.hidden_size, bias=False)
        self.hidden_norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.layers = nn.ModuleList(BlockLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.markov_head = MarkovHead(config) if config.markov_rank else None
        self.embed_tokens, self.lm_head = None, None
        if "embed_tokens" in own:
            self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if "lm_head" in own or config.draft_vocab_size < config.vocab_size:
            self.lm_head = nn.Linear(config.hidden_size, config.draft_vocab_size, bias=False)

    @classmethod
    def of_tensors(cls, config: BlockHeadConfig, tensors: dict[str, Tensor]) -> Self:
        """The head of a checkpoint, in its dtype, on the CPU: every tensor known, none missing, all finite.

        It keeps the tensors themselves, and makes nothing of a size that they do not have.

        Args:
            tensors: those of `state_dict()`; t2d, which follows from d2t, and what the target has, may be missing.

        Raises:
            GraftError: names the tensors that are missing, unknown, misshapen or not finite, or of another dtype.
        """
        with torch.device("meta"):
            head = cls(config, [name for name in ("embed_tokens", "lm_head") if f"{name}.weight" in tensors])
        head.assign(tensors)
        return head.to(tensors["fc.weight"].dtype)

    def read_context(self, aux_BTE: Tensor, positions_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of context tokens, of all layers, which are computed once and may be kept.

        Args:
            aux_BTE: the target's aux hidden states of tokens before the anchor, [B, T, layers * H].
            positions_BT: of these tokens.

        Returns:
            [L, B, K, T, D] each.
        """
        context_BTH = self.hidden_norm(self.fc(aux_BTE))
        rope = self.rotary_emb(context_BTH, positions_BT)
        pairs = [cast(BlockLayer, layer).self_attn.key_value(context_BTH, rope) for layer in self.layers]
        return torch.stack([key for key, _ in pairs]), torch.stack([value for _, value in pairs])

    def forward(self, embedding_BPH: Tensor, positions_BP: Tensor, attend: Attend) -> Tensor:
        """One pass over the slots of a block; returns the input of lm_head, [B, P, H].

        Args:
            embedding_BPH: the target's embeddings of the anchor and of P - 1 mask tokens.
            positions_BP: the anchor's position and those after it.
        """
        rope = self.rotary_emb(embedding_BPH, positions_BP)
        hidden_BPH = embedding_BPH
        for index, layer in enumerate(self.layers):

            def of_layer(query: Tensor, key: Tensor, value: Tensor, index: int = index) -> Tensor:
                return attend(index, query, key, value)

            hidden_BPH = layer(hidden_BPH, rope, of_layer)
        return self.norm(hidden_BPH)

    def draft_logits(
        self, embedding_BPH: Tensor, keys_LBKTD: Tensor, values_LBKTD: Tensor, start_B: Tensor, lm_head_VH: Tensor
    ) -> Tensor:
        """Logits of all drafts of a block after a kept context, before any Markov bias. [B, K, D]

        Args:
            embedding_BPH: the target's embeddings of the anchor and of P - 1 mask tokens.
            keys_LBKTD, values_LBKTD: of `read_context`, of all tokens before the anchor.
            start_B: the anchor's position.

        Raises:
            GraftError: a block longer than trained, or a shorter one of a head whose slots see those after them.
        """
        slots, trained = embedding_BPH.shape[1], self.config.block_size
        if slots > trained or (slots < trained and not self.config.causal):
            allowed = f"2 to {trained}" if self.config.causal else f"{trained}"
            raise GraftError(f"a block of {slots} slots was asked for, but the head was trained for {allowed}")
        positions_BP = start_B[:, None] + torch.arange(slots, device=start_B.device)

        def attend(layer: int, query_BQPD: Tensor, key_BKPD: Tensor, value_BKPD: Tensor) -> Tensor:
            key_BKSD = torch.cat([keys_LBKTD[layer], key_BKPD], dim=2)
            value_BKSD = torch.cat([values_LBKTD[layer], value_BKPD], dim=2)
            mask_PS = self.config.view(layer).mask(keys_LBKTD.shape[3], slots, start_B.device)
            return F.scaled_dot_product_attention(query_BQPD, key_BKSD, value_BKSD, attn_mask=mask_PS, enable_gqa=True)

        hidden_BPH = self(embedding_BPH, positions_BP, attend)[:, self.config.first_slot :]
        return F.linear(hidden_BPH, lm_head_VH if self.lm_head is None else self.lm_head.weight)

    def markov_bias(self, tokens: Tensor) -> Tensor:
        """DSpark's bias: what the token before a draft adds to the draft's logits, [..., draft vocabulary].

        Args:
            tokens: target ids, of any shape; for draft 1 the anchor.

        Raises:
            GraftError: the head has no Markov head.
        """
        if self.markov_head is None:
            raise GraftError("this head has markov_rank=0: its drafts do not depend on the token before")
        return self.markov_head(tokens)
