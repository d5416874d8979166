"""A plan for each method, as a bundle holds them in `graft.json`."""

from dataclasses import dataclass, field
from typing import Any, Self

from ..errors import GraftError
from ..retrieval.prompt_lookup import LONGEST, PromptLookup
from ..template import chain, depth_template
from ..tree import drafted_nodes
from .acceptance import AcceptanceModel, SourceModel
from .plan import AUTOREGRESSIVE, Checkpoint, Plan, QuotaCheckpoint, QuotaPlan, ScoredPlan

PLANNED = ("graft", "eagle3", "retrieve")
METHODS = (*PLANNED, "autoregressive")
LOOKED_UP = 7
"""Draft tokens of a round of prompt lookup alone. On a CPU a pass over 8 nodes takes a third longer than over 1."""


@dataclass(frozen=True)
class Policy:
    """The plan of each method that needs one, and what the plans were calibrated on.

    Attributes:
        graft: the plan of head and sources.
        eagle3: the plan of the head alone, always to its full depth.
        retrieve: the plan of the sources alone.
        measured_on: the device, versions and data that the plans were calibrated on; for people to read.
    """

    graft: Plan
    eagle3: Plan
    retrieve: Plan
    measured_on: dict[str, Any] = field(default_factory=dict)

    def plan(self, method: str) -> Plan:
        """The plan of one of METHODS."""
        if method not in METHODS:
            raise GraftError(f"unknown method {method!r}: choose one of {', '.join(METHODS)}")
        return AUTOREGRESSIVE if method == "autoregressive" else getattr(self, method)

    def to_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name).to_dict() for name in PLANNED} | {"measured_on": self.measured_on}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        known = {*PLANNED, "measured_on"}
        if set(values) != known:
            raise GraftError(f"graft.json must hold exactly {sorted(known)}, not {sorted(values)}")
        plans = {name: Plan.from_dict(values[name]) for name in PLANNED}
        measured_on = values["measured_on"]
        if not isinstance(measured_on, dict) or not isinstance(measured_on.get("device"), dict | None):
            raise GraftError(f"measured_on={measured_on!r} must be an object, and its device one or null")
        return cls(**plans, measured_on=measured_on)


def paper_policy(topk: int = 10, num_draft_tokens: int = 64, num_steps: int = 9, max_rank: int = 7) -> Policy:
    """The paper's settings for Qwen3-8B (thresholds in the middle of its ranges).

    The paper gives only how many retrieved nodes stand at each depth. The paths are ours: the rank-0 chain runs to the
    full depth, and lower ranks get fewer descendants. For fewer nodes than 64 the shares of head and matrix are scaled
    down, and a template is cut off at its end.

    Args:
        topk: children that the head proposes per node, and nodes that it expands per step.
        num_draft_tokens: nodes of each tree, the root included.
        num_steps: draft steps of the last checkpoint. Checkpoints that would come after it are left out.
        max_rank: greatest successor rank that the matrix keeps.
    """
    counts = {
        1: (0.135, 8, (8, 10, 8, 6, 5, 4, 4, 4, 3)),
        2: (0.14, 24, (6, 7, 5, 4, 4, 3, 3, 2, 2)),
        6: (0.485, 40, (4, 3, 3, 2, 2, 2, 2, 1, 1)),
    }
    room = min(num_draft_tokens - 1, 60)
    checkpoints = []
    for steps, (threshold, drafted, depths) in counts.items():
        template = depth_template(depths, max_rank)
        kept = round(drafted * room / 60)
        retrieved = min(room - kept, len(template))
        if steps < num_steps:
            kept = min(kept, drafted_nodes(topk, steps))
            checkpoints.append(QuotaCheckpoint(steps, threshold, kept, retrieved, template))
    full = QuotaCheckpoint(num_steps, drafted=min(room, drafted_nodes(topk, num_steps)))
    template = depth_template(counts[1][2], max_rank)
    retrieved = min(num_draft_tokens - 1, round(52 * room / 60), len(template))
    return Policy(
        graft=QuotaPlan((*checkpoints, full), topk),
        eagle3=QuotaPlan((full,), topk),
        retrieve=QuotaPlan((QuotaCheckpoint(0, 0.0, 0, retrieved, template),), topk),
        measured_on={"source": "arXiv 2605.20104, not calibrated on this device"},
    )


def lookup_policy() -> Policy:
    """Prompt lookup alone (Saxena 2023), for a target without a head. It needs neither training nor calibration.

    `eagle3` is the paper's plan, which an engine without a head refuses by name.
    """
    # There is one chain and no other candidate, so its scores decide nothing.
    lookup = SourceModel(PromptLookup.name, chain(LOOKED_UP), (), ((0.0,) * LOOKED_UP,) * LONGEST, (0.0,))
    plan = ScoredPlan((Checkpoint(0, num_draft_tokens=1 + LOOKED_UP),), acceptance=AcceptanceModel(sources=(lookup,)))
    return Policy(plan, paper_policy().eagle3, plan, {"source": "prompt lookup, not calibrated"})
