"""The families of heads that can be trained: one line each."""

from collections.abc import Callable

from transformers import PreTrainedModel

from graft_train.config.head import HeadTrainConfig
from graft_train.data.samples import Sample
from graft_train.distill import block, eagle3
from graft_train.distill.strategy import Strategy

FAMILIES: dict[str, Callable[[PreTrainedModel, list[Sample], HeadTrainConfig], Strategy]] = {
    "eagle3": eagle3.make_strategy,
    "block": block.make_strategy,
}
"""By `head.family`: (target, samples to train on, settings) -> the strategy of a head of this family."""
