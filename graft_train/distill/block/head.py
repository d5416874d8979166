"""The untrained block head of a target, or one to go on from."""

import torch
from torch import nn
from transformers import PreTrainedModel

from graft_inference.errors import GraftError
from graft_inference.heads.block.config import BlockHeadConfig, default_aux_layer_ids
from graft_inference.heads.block.model import BlockHead
from graft_train.config.head import HeadTrainConfig
from graft_train.data.samples import Sample
from graft_train.distill.rope import head_rope


def block_head_config(model: PreTrainedModel, samples: list[Sample], settings: HeadTrainConfig) -> BlockHeadConfig:
    """The head's shape: the target's, but for what the settings choose.

    Args:
        samples: what the target emits, from which follows which token may be the mask.

    Raises:
        GraftError: a target no head can be made for, or settings it cannot have.
    """
    target, block = model.config.get_text_config(), settings.block
    layers, chosen = target.num_hidden_layers, settings.aux_layer_ids
    if chosen and not set(chosen) <= set(range(layers - 1)):
        raise GraftError(
            f"head.aux_layer_ids={chosen}: the target has layers 0..{layers - 1}, of which a block head reads all but "
            "the last (engines differ in whether that one's output is normed)"
        )
    return BlockHeadConfig(
        hidden_size=target.hidden_size,
        intermediate_size=settings.intermediate_size or target.intermediate_size,
        num_hidden_layers=block.layers,
        num_attention_heads=target.num_attention_heads,
        num_key_value_heads=target.num_key_value_heads,
        head_dim=getattr(target, "head_dim", None) or target.hidden_size // target.num_attention_heads,
        vocab_size=target.vocab_size,
        draft_vocab_size=min(settings.draft_vocab_size, target.vocab_size),
        aux_layer_ids=tuple(chosen) if chosen else default_aux_layer_ids(layers),
        num_target_layers=layers,
        block_size=block.block_size,
        mask_token_id=mask_token(samples, target.vocab_size, block.mask_token_id),
        max_position_embeddings=target.max_position_embeddings,
        causal=block.causal,
        sample_from_anchor=block.sample_from_anchor,
        markov_rank=block.markov_rank,
        rms_norm_eps=getattr(target, "rms_norm_eps", 1e-6),
        rope_parameters=head_rope(model),
    )


def mask_token(samples: list[Sample], vocab_size: int, wanted: int | None, of: str = "head.block.mask_token_id") -> int:
    """The mask token: the wanted one, or the last id that no sample holds.

    Args:
        of: who wants it, for errors.

    Raises:
        GraftError: it lies outside the vocabulary, or samples hold it.
    """
    held_V = torch.zeros(vocab_size, dtype=torch.bool)
    for sample in samples:
        held_V[torch.tensor(sample.ids)] = True
    if wanted is None:
        free = (~held_V).nonzero().flatten()
        if not len(free):
            raise GraftError(f"samples hold all {vocab_size} tokens of the target: none is left to be the mask")
        return int(free[-1])
    if not 0 <= wanted < vocab_size:
        raise GraftError(f"{of}={wanted} lies outside the target's vocabulary of {vocab_size}")
    if held_V[wanted]:
        raise GraftError(f"{of}={wanted} is a token that samples hold; choose one that the target never emits")
    return wanted


def new_block_head(config: BlockHeadConfig) -> BlockHead:
    """A head with random weights, whose Markov bias is nothing at first."""
    head = BlockHead(config)
    for module in head.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
    if head.markov_head is not None:
        nn.init.normal_(head.markov_head.markov_w1.weight, std=0.01)
        nn.init.zeros_(head.markov_head.markov_w2.weight)
    return head
