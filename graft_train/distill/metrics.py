"""What is counted while a head trains, by draft step, and what is logged of it."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class StepSums:
    """Sums over the positions of one micro-batch, per draft step; micro-batches add up.

    Attributes:
        loss_K: divergence over `trained_K` positions.
        matched_K: positions where the head's choice is the target's, of `started_K`. A choice that the
            draft vocabulary lacks cannot match.
        chained_K: positions where this step and all earlier ones of the same draft match, of `reached_K`
            where all earlier ones do.
    """

    loss_K: Tensor
    trained_K: Tensor
    matched_K: Tensor
    chained_K: Tensor
    reached_K: Tensor
    started_K: Tensor

    def stack(self) -> Tensor:
        sums = (self.loss_K, self.trained_K, self.matched_K, self.chained_K, self.reached_K, self.started_K)
        return torch.stack(sums).double()

    @classmethod
    def unstack(cls, sums_6K: Tensor) -> "StepSums":
        return cls(*sums_6K)

    def metrics(self) -> "StepMetrics":
        chain_K = self.chained_K / self.started_K.clamp(min=1)
        return StepMetrics(
            loss=(self.loss_K / self.trained_K.clamp(min=1)).tolist(),
            acceptance=(self.matched_K / self.started_K.clamp(min=1)).tolist(),
            conditional_acceptance=(self.chained_K / self.reached_K.clamp(min=1)).tolist(),
            acceptance_length=1 + chain_K.sum().item(),
        )


@dataclass
class StepMetrics:
    """Attributes:
    loss: per trained position, by draft step; its unit is the loss's.
    acceptance: share of positions where the head's choice is the target's, by draft step.
    conditional_acceptance: the same, of positions where all earlier steps of the draft match.
    acceptance_length: estimated acceptance length of a greedy chain of K drafts, the bonus token included.
    """

    loss: list[float]
    acceptance: list[float]
    conditional_acceptance: list[float]
    acceptance_length: float
