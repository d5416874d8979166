"""What the frozen target makes of a packed batch: the states that feed a draft head, and those that teach it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, PreTrainedModel

from graft_inference.errors import GraftError
from graft_inference.target.attention import as_bias, explicit_attention
from graft_inference.target.model import Target
from graft_train.config.target import DTYPES
from graft_train.data.sharded import is_shared, whole

CHUNK = 2048
"""Positions whose logits over the whole vocabulary exist at a time."""

FLOATS = {getattr(torch, name) for name in DTYPES}
ATTENTION = "graft_documents"


def document_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    document_lengths: list[int] | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each document of a packed batch, registered with transformers as `graft_documents`.

    Many parameters: transformers passes them by these names.

    Args:
        query: [1, q_heads, S, D]; key, value: [1, kv_heads, S, D].
        sliding_window: tokens a query sees, itself included.
        softcap: scores are capped smoothly at it (Gemma 2).
        s_aux: a score per head that takes part in the softmax but has no value (GPT-OSS).
        document_lengths: None for one document.
    """
    lengths = document_lengths or [query.shape[2]]
    plain = softcap is None and s_aux is None
    groups, out = query.shape[1] // key.shape[1], []
    if plain and groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    split = (tensor.split(lengths, dim=2) for tensor in (query, key, value))
    for query_BQLD, key_BKLD, value_BKLD in zip(*split, strict=True):
        length = query_BQLD.shape[2]
        window = sliding_window if sliding_window and sliding_window < length else None
        mask_LL = None if window is None else _windowed(length, window, query.device)
        if plain:
            causal = mask_LL is None
            attended = F.scaled_dot_product_attention(
                query_BQLD, key_BKLD, value_BKLD, mask_LL, is_causal=causal, scale=scaling
            )
        else:
            folded_BKLD = query_BQLD.reshape(*key_BKLD.shape[:2], groups * length, -1)
            bias = None if mask_LL is None else as_bias(mask_LL, groups, query)
            attended = explicit_attention(folded_BKLD, key_BKLD, value_BKLD, length, bias, scaling, softcap, s_aux)
        out.append(attended.view_as(query_BQLD))
    return torch.cat(out, dim=2).transpose(1, 2), None


def _windowed(length: int, window: int, device: torch.device) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool, device=device).tril().triu(1 - window)


AttentionInterface.register(ATTENTION, document_attention)


@dataclass
class TargetStates:
    """What a target makes of S tokens. Either the final states or the M best logits of each say what it predicts.

    Attributes:
        aux_SE: outputs of the aux layers, concatenated, before any final norm.
        choice_S: the target's likeliest next token, over its whole vocabulary, int64.
        final_SH: what the target's lm_head reads, after the final norm.
        top_ids_SM, top_logits_SM: the likeliest tokens, best first, and their logits less the best one's.
    """

    aux_SE: Tensor
    choice_S: Tensor
    final_SH: Tensor | None = None
    top_ids_SM: Tensor | None = None
    top_logits_SM: Tensor | None = None

    def map(self, change: Callable[[Tensor], Tensor]) -> "TargetStates":
        return TargetStates(**{name: change(tensor) for name, tensor in vars(self).items() if tensor is not None})

    def to(self, device: torch.device) -> "TargetStates":
        return self.map(lambda tensor: tensor.to(device))

    def slice(self, start: int, end: int) -> "TargetStates":
        """A copy, for a view would keep the whole batch alive."""
        return self.map(lambda tensor: tensor[start:end].clone())

    @classmethod
    def cat(cls, states: list["TargetStates"]) -> "TargetStates":
        names = [name for name, tensor in vars(states[0]).items() if tensor is not None]
        return cls(**{name: torch.cat([getattr(one, name) for one in states]) for name in names})


def states_of(aux_SE: Tensor, final_SH: Tensor, logits: Iterator[Tensor], top: int | None) -> TargetStates:
    """States of S tokens, with what the target predicts of them.

    Args:
        logits: over the whole vocabulary, [C, V], some tokens after the other.
        top: so many best logits in place of the final states.
    """
    device = final_SH.device
    if top is None:
        choices = [logits_CV.argmax(dim=-1) for logits_CV in logits]
        return TargetStates(aux_SE, torch.cat(choices).to(device), final_SH)
    best = [logits_CV.float().topk(top, dim=-1) for logits_CV in logits]
    ids_SM = torch.cat([one.indices for one in best]).to(device)
    logits_SM = torch.cat([one.values - one.values[:, :1] for one in best]).to(device)
    return TargetStates(aux_SE, ids_SM[:, 0], top_ids_SM=ids_SM, top_logits_SM=logits_SM)


class PackedTarget(Target):
    """The target as training reads it: packed batches whose documents do not see one another, without a cache.

    Which families work, the aux layers' outputs and giving the model back are `Target`'s. The attention differs:
    serving attends over caches of its own, which training would write and never read again.

    Raises:
        GraftError: what `Target` refuses; or logits that are not simply `final state @ lm_head rows`, from which
            a teacher over a draft vocabulary could be made.
    """

    attention_name = ATTENTION

    def __init__(self, model: PreTrainedModel, aux_layer_ids: tuple[int, ...]) -> None:
        super().__init__(model, aux_layer_ids)
        self.is_shared = is_shared(model)
        self._lm_head: Any = model.get_output_embeddings()
        try:
            self._check_logits()
        except GraftError:
            self.release()
            raise
        # Each process embeds the tokens of its own batches, which is no work that all could do together.
        ids_V = torch.arange(self.config.vocab_size, device=model.device)
        self._embeddings_VH = super().embed(ids_V[None])[0] if self.is_shared else None

    @property
    def lm_head_VH(self) -> Tensor:
        """lm_head's rows. Of a target that is shared out all processes must ask together.

        Where they are not at hand as they are (shared out, offloaded, quantised), they are what lm_head makes of
        the identity.
        """
        weight, size = self._lm_head.weight, self.config.hidden_size
        if type(weight) is nn.Parameter and weight.dtype in FLOATS and not (self.is_shared or weight.is_meta):
            return weight
        identity_HH = torch.eye(size, dtype=self.model.dtype, device=self.model.device)
        return torch.cat(list(self._project(identity_HH)), dim=0).T.contiguous()

    @torch.no_grad()
    def states(self, tokens_S: Tensor, lengths: list[int], top: int | None = None) -> TargetStates:
        """Reads documents of these lengths that lie one behind the other; none sees another.

        Args:
            top: so many best logits in place of the final states.
        """
        positions_S = torch.cat([torch.arange(length) for length in lengths]).to(tokens_S.device)
        output = self.model.get_decoder()(
            input_ids=tokens_S[None], position_ids=positions_S[None], use_cache=False, document_lengths=lengths
        )
        # A target spread over several devices ends on another one than it began on.
        device = tokens_S.device
        final_SH = output.last_hidden_state[0].to(device)
        aux_SE = self._aux_states(tokens_S, final_SH.dtype)
        self._kept.clear()
        return states_of(aux_SE, final_SH, self._project(final_SH), top)

    def embed(self, tokens: Tensor) -> Tensor:
        """The target's embeddings of tokens of any shape, [..., H]; see `Target.embed`."""
        if self._embeddings_VH is not None:
            return self._embeddings_VH[tokens]
        return super().embed(tokens)

    def run_idly(self, times: int) -> None:
        """Runs over nothing in particular, for other processes that still have something to read."""
        for _ in range(times):
            self.states(torch.zeros(1, dtype=torch.long, device=self.model.device), [1])

    def _project(self, final_SH: Tensor) -> Iterator[Tensor]:
        """Logits over the whole vocabulary, some positions at a time."""
        with whole(self._lm_head.parameters()):
            for chunk_CH in final_SH.split(CHUNK):
                yield self._lm_head(chunk_CH[None])[0]

    @torch.no_grad()
    def _check_logits(self) -> None:
        tokens_BS = torch.arange(4, device=self.model.device)[None]
        expected_BSV = self.model(input_ids=tokens_BS, use_cache=False).logits.float()
        final_BSH = self.model.get_decoder()(input_ids=tokens_BS, use_cache=False).last_hidden_state
        lm_head_VH = self.lm_head_VH
        logits_BSV = (final_BSH.to(lm_head_VH.device) @ lm_head_VH.T).float().to(expected_BSV.device)
        tolerance = 0.02 * expected_BSV.abs().max().item()
        if not torch.allclose(logits_BSV, expected_BSV, atol=tolerance, rtol=0):
            raise GraftError(
                f"{type(self.model).__name__} changes its logits after lm_head (a cap, a scale or a bias), "
                "which distillation does not support yet"
            )
