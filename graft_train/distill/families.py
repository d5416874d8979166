"""The families of heads that can be trained: one line each."""

from collections.abc import Callable

from transformers import PreTrainedModel

from graft_inference.heads.block.config import default_aux_layer_ids as block_layers
from graft_inference.heads.eagle3.model import default_aux_layer_ids as eagle3_layers
from graft_train.config.head import HeadTrainConfig
from graft_train.data.samples import Sample
from graft_train.distill import block, eagle3
from graft_train.distill.strategy import Strategy

FAMILIES: dict[str, Callable[[PreTrainedModel, list[Sample], HeadTrainConfig], Strategy]] = {
    "eagle3": eagle3.make_strategy,
    "block": block.make_strategy,
}
"""By `head.family`: (target, samples to train on, settings) -> the strategy of a head of this family."""


def aux_layers(settings: HeadTrainConfig, num_layers: int) -> tuple[int, ...]:
    """The layers of a target that feed a new head."""
    if settings.aux_layer_ids:
        return tuple(settings.aux_layer_ids)
    return block_layers(num_layers) if settings.family == "block" else eagle3_layers(num_layers)
