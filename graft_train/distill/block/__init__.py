"""How a block head is made and trained: `make_strategy` is what `distill` calls."""

import torch
from transformers import PreTrainedModel

from graft_inference.errors import GraftError
from graft_inference.heads.block.model import BlockHead
from graft_train.config.head import HeadTrainConfig
from graft_train.data.samples import Sample
from graft_train.data.states import PackedTarget
from graft_train.distill.block.head import block_head_config, mask_token, new_block_head
from graft_train.distill.block.strategy import BlockStrategy
from graft_train.distill.draft_vocabulary import choose_draft_vocabulary, coverage
from graft_train.published import published_head, share_with


def make_strategy(model: PreTrainedModel, samples: list[Sample], settings: HeadTrainConfig) -> BlockStrategy:
    """The strategy of a new head, or of the one that `head.init_from` names.

    Args:
        samples: those it is trained on, whose answers choose the draft vocabulary of a new head.

    Raises:
        GraftError: a head that this target cannot have, or of another target; a mask token that samples hold.
    """
    if settings.init_from:
        head = published_head(settings.init_from, model.config.get_text_config()).float()
        if not isinstance(head, BlockHead):
            raise GraftError(f"head.init_from={settings.init_from} is an EAGLE-3 head: set head.family=eagle3")
        mask_token(samples, head.config.vocab_size, head.config.mask_token_id)
        share = coverage(samples, head.target_ids, head.config.vocab_size)
        target = PackedTarget(model, head.config.aux_layer_ids)
        share_with(head, target)
        return BlockStrategy(head, target, settings, share)
    shape = block_head_config(model, samples, settings)
    target, head = PackedTarget(model, shape.aux_layer_ids), new_block_head(shape)
    vocabulary = choose_draft_vocabulary(samples, shape.vocab_size, shape.draft_vocab_size)
    head.set_draft_vocabulary(vocabulary.token_ids_D)
    if head.lm_head is not None:
        lm_head_VH = target.lm_head_VH
        with torch.no_grad():
            head.lm_head.weight.copy_(lm_head_VH[vocabulary.token_ids_D.to(lm_head_VH.device)])
    return BlockStrategy(head, target, settings, vocabulary.coverage)
