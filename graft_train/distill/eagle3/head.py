"""The untrained draft head of a target."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from graft_inference.errors import GraftError
from graft_inference.heads.eagle3.model import DraftHead, DraftHeadConfig, default_aux_layer_ids
from graft_train.config.head import HeadTrainConfig
from graft_train.distill.rope import head_rope


def head_config(model: PreTrainedModel, settings: HeadTrainConfig) -> DraftHeadConfig:
    """The head's shape: the target's, but for what the settings choose.

    Raises:
        GraftError: a target no head can be made for, or settings it cannot have.
    """
    target = model.config.get_text_config()
    layers, chosen = target.num_hidden_layers, settings.aux_layer_ids
    if chosen and not set(chosen) <= set(range(layers)):
        raise GraftError(f"head.aux_layer_ids={chosen}: the target has layers 0..{layers - 1}")
    return DraftHeadConfig(
        hidden_size=target.hidden_size,
        intermediate_size=settings.intermediate_size or target.intermediate_size,
        num_attention_heads=target.num_attention_heads,
        num_key_value_heads=target.num_key_value_heads,
        head_dim=getattr(target, "head_dim", None) or target.hidden_size // target.num_attention_heads,
        vocab_size=target.vocab_size,
        draft_vocab_size=min(settings.draft_vocab_size, target.vocab_size),
        aux_layer_ids=tuple(chosen) if chosen else default_aux_layer_ids(layers),
        max_position_embeddings=target.max_position_embeddings,
        rms_norm_eps=getattr(target, "rms_norm_eps", 1e-6),
        rope_parameters=head_rope(model),
        norm_before_residual=settings.norm_before_residual,
    )


def new_head(config: DraftHeadConfig, token_ids_D: Tensor, lm_head_VH: Tensor) -> DraftHead:
    """A head that proposes `token_ids_D` and starts from the target's own rows for them."""
    head = DraftHead(config)
    for module in head.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
    head.set_draft_vocabulary(token_ids_D)
    with torch.no_grad():
        head.lm_head.weight.copy_(lm_head_VH[token_ids_D.to(lm_head_VH.device)])
    return head
