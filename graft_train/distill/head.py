"""The untrained draft head of a target."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from graft_inference import GraftError
from graft_inference.draft_head import DraftHead, DraftHeadConfig, default_tapped_layers
from graft_train.distill.config import HeadTrainConfig


def head_config(model: PreTrainedModel, settings: HeadTrainConfig) -> DraftHeadConfig:
    """The head's shape: the target's, but for what the settings choose.

    Raises:
        GraftError: a target no head can be made for, or settings it cannot have.
    """
    target = model.config.get_text_config()
    rope = getattr(target, "rope_parameters", None)
    if not rope or "rope_type" not in rope:
        raise GraftError(f"{type(model).__name__} has no single RoPE for all its layers, which a draft head needs")
    tapped = settings.tapped_layers
    return DraftHeadConfig(
        hidden_size=target.hidden_size,
        intermediate_size=settings.intermediate_size or target.intermediate_size,
        num_attention_heads=target.num_attention_heads,
        num_key_value_heads=target.num_key_value_heads,
        head_dim=getattr(target, "head_dim", None) or target.hidden_size // target.num_attention_heads,
        vocab_size=target.vocab_size,
        draft_vocab_size=min(settings.draft_vocab_size, target.vocab_size),
        tapped_layers=tuple(tapped) if tapped else default_tapped_layers(target.num_hidden_layers),
        max_position_embeddings=target.max_position_embeddings,
        rms_norm_eps=target.rms_norm_eps,
        rope_parameters=dict(rope),
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
