"""How a block head is made and trained: `make_strategy` is what `distill` calls."""

from dataclasses import replace

import torch
from transformers import PreTrainedModel

from graft_inference.errors import GraftError
from graft_inference.heads.block.model import BlockHead
from graft_inference.heads.eagle3.model import DraftHead
from graft_train.config.head import HeadTrainConfig
from graft_train.data.samples import Sample
from graft_train.data.states import PackedTarget
from graft_train.distill.block.head import block_head_config, mask_token, new_block_head
from graft_train.distill.block.strategy import BlockStrategy
from graft_train.distill.draft_vocabulary import choose_draft_vocabulary, coverage
from graft_train.published import published_head, share_with


def make_strategy(model: PreTrainedModel, samples: list[Sample], settings: HeadTrainConfig) -> BlockStrategy:
    """The strategy of a new head, or of the one that `head.init_from` names.

    Of an EAGLE-3 head a new one takes the layers that it reads and their projection to one state, `fc`.

    Args:
        samples: those it is trained on, whose answers choose the draft vocabulary of a new head.

    Raises:
        GraftError: a head that this target cannot have, or of another target; a mask token that samples hold.
    """
    published = None
    if settings.init_from:
        published = published_head(settings.init_from, model.config.get_text_config()).float()
    if isinstance(published, BlockHead):
        of = f"the mask_token_id of head.init_from={settings.init_from}"
        mask_token(samples, published.config.vocab_size, published.config.mask_token_id, of)
        share = coverage(samples, published.target_ids, published.config.vocab_size)
        target = PackedTarget(model, published.config.aux_layer_ids)
        share_with(published, target)
        return BlockStrategy(published, target, settings, share)
    shape = block_head_config(model, samples, settings if published is None else _reading_as(published, settings))
    target, head = PackedTarget(model, shape.aux_layer_ids), new_block_head(shape)
    vocabulary = choose_draft_vocabulary(samples, shape.vocab_size, shape.draft_vocab_size)
    head.set_draft_vocabulary(vocabulary.token_ids_D)
    with torch.no_grad():
        if head.lm_head is not None:
            lm_head_VH = target.lm_head_VH
            head.lm_head.weight.copy_(lm_head_VH[vocabulary.token_ids_D.to(lm_head_VH.device)])
        if published is not None:
            head.fc.weight.copy_(published.fc.weight)
    return BlockStrategy(head, target, settings, vocabulary.coverage)


def _reading_as(published: DraftHead, settings: HeadTrainConfig) -> HeadTrainConfig:
    """The settings, with the layers that an EAGLE-3 head reads, whose projection the new head begins with."""
    layers = list(published.config.aux_layer_ids)
    if settings.aux_layer_ids not in (None, layers):
        raise GraftError(
            f"head.aux_layer_ids={settings.aux_layer_ids}, but the EAGLE-3 head of head.init_from reads {layers}: "
            "leave it null"
        )
    return replace(settings, aux_layer_ids=layers)
