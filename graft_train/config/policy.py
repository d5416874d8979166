"""Settings of the `calibrate` stage."""

from dataclasses import dataclass, field
from math import inf

from graft_inference.errors import GraftError
from graft_train.config.bounds import check_least

KINDS = ("learned", "paper", "draft_only", "retrieve_only")


@dataclass(slots=True, kw_only=True)
class CalibrateConfig:
    """What the policy is chosen from.

    Attributes:
        kind: what `graft` becomes: `learned`, the paper's checkpoints and thresholds (nodes scaled to the
            best measured width), or the learned policy of one source alone.
        latency_only: measure only the latency table again and choose anew from the traces that are there.
        prompts: calibration prompts traced; none of them was trained on or is evaluated on.
        max_new_tokens: tokens traced per prompt.
        temperature: of the traced continuations; above 0 every node's P(accepted) under the target is traced.
        topk: the head's children per node and nodes per step.
        num_steps: most draft steps of a round; EAGLE-3 at depth 8 runs 9.
        widths: nodes of one verification that may be chosen, the root included; the last is the budget.
        retrieval_depth: longest retrieved path.
        checkpoints: most places where drafting may stop early.
        minutes: most time that calibration takes: two fifths for traces, of fewer prompts where all take longer, one
            for latencies, the rest for the race; overdrawn only by what a choice cannot do without.
        least_rounds: traced positions below which nothing is fitted.
    """

    kind: str = "learned"
    latency_only: bool = False
    prompts: int = 64
    max_new_tokens: int = 256
    temperature: float = 0.0
    topk: int = 10
    num_steps: int = 9
    widths: list[int] = field(default_factory=lambda: [1, 8, 16, 32, 64])
    retrieval_depth: int = 9
    checkpoints: int = 3
    minutes: float = 10.0
    least_rounds: int = 500

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise GraftError(f"policy.kind={self.kind} is unknown; choose one of {', '.join(KINDS)}")
        if not self.widths or min(self.widths) < 1 or max(self.widths) < 2:
            raise GraftError(f"policy.widths={list(self.widths)} must hold widths from 1, one of them at least 2")
        least = {
            "prompts": 1, "max_new_tokens": 2, "topk": 1, "num_steps": 1, "retrieval_depth": 1,
            "checkpoints": 0, "least_rounds": 0,
        }  # fmt: skip
        check_least("policy", self, least)
        if not 0 < self.minutes < inf:
            raise GraftError(f"policy.minutes={self.minutes} must be finite and more than 0")
        if self.temperature < 0:
            raise GraftError(f"policy.temperature={self.temperature}: 0 is greedy, more samples")
