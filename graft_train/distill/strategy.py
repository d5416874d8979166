"""What a family of heads has of its own when it is trained; all else in `distill` knows heads through this alone."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from graft_inference.policy.plan import Plan
from graft_train.data.states import PackedTarget, TargetStates
from graft_train.distill.batches import PackedBatch


@dataclass
class Prepared:
    """A micro-batch with the target's states, and where the head is trained in it.

    Attributes:
        trained_K: positions in the loss, by draft step.
    """

    batch: PackedBatch
    states: TargetStates
    trained_K: Tensor


@dataclass
class Cost:
    """What one micro-batch costs, from shapes alone.

    Attributes:
        activations: values that the head's passes keep for the backward pass.
        loss: values that the loss holds at its peak, in fp32.
        flops: arithmetic operations of the head's passes and its loss, forward and backward.
    """

    activations: float
    loss: float
    flops: float


class Strategy(nn.Module, ABC):
    """Turns target states into a loss and its metrics, for one family of heads.

    A module, so that data-parallel wrappers see one forward. K counts the draft steps that loss and metrics tell
    apart: passes of a head that drafts one by one, places of a block that is drafted at once.

    Args:
        head: what is trained. Its parameters and buffers are the checkpoint's.
        target: whose states it reads; not a part of this module.
        steps: K.
        coverage: share of the answers' tokens that the head can propose.
    """

    def __init__(self, head: nn.Module, target: PackedTarget, steps: int, coverage: float) -> None:
        super().__init__()
        self.head: Any = head
        self.target = target
        self.steps = steps
        self.coverage = coverage

    @abstractmethod
    def prepare(self, batch: PackedBatch, states: TargetStates, seed: int) -> Prepared:
        """Decides where the head is trained, before anything of the step is computed.

        Args:
            seed: of whatever is drawn for this micro-batch.
        """

    @abstractmethod
    def coefficients(self, trained_K: Tensor) -> Tensor:
        """What a position of each draft step weighs in the loss, [K].

        Args:
            trained_K: positions in the loss of the whole optimizer step, over all micro-batches and processes.
        """

    @abstractmethod
    def forward(self, prepared: Prepared, embedding_SH: Tensor, coefficient_K: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of a micro-batch, 0-d, and `StepSums.stack()` of it, [6, K].

        Args:
            embedding_SH: the target's embeddings of the batch's tokens.
        """

    @abstractmethod
    def cost(self, tokens: int, answered: float) -> Cost:
        """Of a micro-batch of so many tokens, of which this share is answers."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What a checkpoint must share with the head that goes on from it: shape and draft vocabulary."""

    @abstractmethod
    def measured_plan(self) -> Plan:
        """The plan with which the engine measures the head's acceptance length."""

    @abstractmethod
    def served_head(self) -> Any:
        """A copy of the head as the engine takes it, on the CPU. All processes call it together."""

    @abstractmethod
    def save(self, out: Path) -> None:
        """Writes the head's checkpoint into a directory."""
