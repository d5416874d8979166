"""Settings of the `calibrate` stage."""

from dataclasses import dataclass, field
from math import inf

from graft_inference.errors import GraftError
from graft_inference.policy.plan import MAX_CANDIDATES
from graft_inference.tree import MAX_NODES, drafted_nodes
from graft_train.config.bounds import check_least

KINDS = ("learned", "paper", "draft_only", "retrieve_only", "chain")


@dataclass(slots=True, kw_only=True)
class CalibrateConfig:
    """What the policy is chosen from.

    Attributes:
        kind: what `graft` becomes: `learned`; `paper`, the paper's checkpoints and thresholds with as many nodes as pay
            on this device; or the learned plan of the head alone (`draft_only`) or of the sources alone
            (`retrieve_only`); or `chain`, the best plan without branches, for engines that verify chains (vLLM).
        latency_only: measure the latency table again, and choose anew from the traces that are there.
        latency_from: a file of latencies in another engine (graft_inference.integrations.vllm_latency), by which to
            choose anew from the traces that are there.
        prompts: calibration prompts that are traced. They are neither trained on nor evaluated on.
        max_new_tokens: tokens traced of each prompt.
        temperature: of the traced continuations. Above 0 the traces hold every node's P(accepted) under the target.
        topk: children that the head proposes for a node, and nodes that it expands in a draft step.
        num_steps: most draft steps of a round; EAGLE-3 at depth 8 runs 9.
        num_draft_tokens: how many nodes a verification may have, the root included. The last one bounds every tree.
        retrieval_depth: longest path of retrieved nodes.
        checkpoints: most checkpoints at which drafting may stop early.
        minutes: most time that calibration takes. Two fifths go to the traces, of fewer prompts where all would take
            longer; one fifth goes to the latencies, and the rest to the race. Only what a choice cannot do without may
            take longer.
        least_rounds: fewest traced positions that a policy is learned from.
    """

    kind: str = "learned"
    latency_only: bool = False
    latency_from: str | None = None
    prompts: int = 64
    max_new_tokens: int = 256
    temperature: float = 0.0
    topk: int = 10
    num_steps: int = 9
    num_draft_tokens: list[int] = field(default_factory=lambda: [1, 8, 16, 32, 64])
    retrieval_depth: int = 9
    checkpoints: int = 3
    minutes: float = 10.0
    least_rounds: int = 500

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise GraftError(f"policy.kind={self.kind} is unknown; choose one of {', '.join(KINDS)}")
        if self.kind == "chain" and self.topk != 1:
            raise GraftError(f"policy.kind=chain drafts one token after the other: policy.topk={self.topk} must be 1")
        if not self.num_draft_tokens or min(self.num_draft_tokens) < 1 or max(self.num_draft_tokens) < 2:
            raise GraftError(
                f"policy.num_draft_tokens={list(self.num_draft_tokens)} must hold numbers of nodes from 1, one of them "
                "at least 2"
            )
        least = {
            "prompts": 1, "max_new_tokens": 2, "topk": 1, "num_steps": 1, "retrieval_depth": 1,
            "checkpoints": 0, "least_rounds": 0,
        }  # fmt: skip
        check_least("policy", self, least)
        for name, value in {
            "num_draft_tokens": max(self.num_draft_tokens),
            "retrieval_depth": self.retrieval_depth,
        }.items():
            if value > MAX_NODES:
                raise GraftError(
                    f"policy.{name} goes up to {value}, and a tree has {MAX_NODES} nodes at most: lower it"
                )
        candidates = drafted_nodes(self.topk, self.num_steps)
        if candidates > MAX_CANDIDATES or self.num_steps > MAX_NODES:
            raise GraftError(
                f"policy.topk={self.topk} and policy.num_steps={self.num_steps} propose {candidates} nodes a round, "
                f"over {MAX_CANDIDATES}, or more than {MAX_NODES} steps: lower either"
            )
        if not 0 < self.minutes < inf:
            raise GraftError(f"policy.minutes={self.minutes} must be finite and more than 0")
        if self.temperature < 0:
            raise GraftError(f"policy.temperature={self.temperature}: 0 is greedy, more samples")
