"""How an EAGLE-3 head is made and trained: `make_strategy` is what `distill` calls."""

from transformers import PreTrainedModel

from graft_inference.errors import GraftError
from graft_inference.heads.eagle3.model import DraftHead
from graft_train.config.head import HeadTrainConfig
from graft_train.data.samples import Sample
from graft_train.data.states import PackedTarget
from graft_train.distill.draft_vocabulary import choose_draft_vocabulary, coverage
from graft_train.distill.eagle3.head import head_config, new_head
from graft_train.distill.eagle3.strategy import Eagle3Strategy
from graft_train.published import published_head, share_with


def make_strategy(model: PreTrainedModel, samples: list[Sample], settings: HeadTrainConfig) -> Eagle3Strategy:
    """The strategy of a new head, or of the one that `head.init_from` names.

    Args:
        samples: those it is trained on, whose answers choose the draft vocabulary of a new head.

    Raises:
        GraftError: a head that this target cannot have, or of another target.
    """
    if settings.init_from:
        head = published_head(settings.init_from, model.config.get_text_config()).float()
        if not isinstance(head, DraftHead):
            raise GraftError(f"head.init_from={settings.init_from} drafts blocks: set head.family=block")
        target = PackedTarget(model, head.config.aux_layer_ids)
        share_with(head, target)
        return Eagle3Strategy(head, target, settings, coverage(samples, head.target_ids, head.config.vocab_size))
    shape = head_config(model, settings)
    target = PackedTarget(model, shape.aux_layer_ids)
    vocabulary = choose_draft_vocabulary(samples, shape.vocab_size, shape.draft_vocab_size)
    head = new_head(shape, vocabulary.token_ids_D, target.lm_head_VH)
    return Eagle3Strategy(head, target, settings, vocabulary.coverage)
