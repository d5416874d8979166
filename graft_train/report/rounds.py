"""Rounds of a few traced answers, as the bundle's plans make them: replayed, with the trees that are served.

The traces hold all that a round looks at, so that the runtime's own tree builders make the trees. No model runs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from graft_inference import Plan, QuotaPlan, ScoredPlan
from graft_inference.noise import Noise
from graft_inference.policy.tree_builder import builder_of
from graft_inference.proposer import Proposal, TokenSource
from graft_inference.retrieval.sources import name_of
from graft_inference.template import RankPaths, Template
from graft_inference.tree import DraftTree, Source, drafted_tree
from graft_train.calibrate.latency import Latency
from graft_train.calibrate.replay import Outcome, Replay
from graft_train.calibrate.texts import TracedText
from graft_train.calibrate.traces import SourceTraces, Traces, on_path
from graft_train.chat import NAMES


@dataclass
class Made:
    """What a plan makes of one position.

    Attributes:
        tree: that is verified.
        accepted_N: which of its nodes the target accepts, the root included.
        emitted: tokens that the round adds.
        why: where drafting stopped, in words.
        ms: by phase, from the latency table.
    """

    tree: DraftTree
    accepted_N: Tensor
    emitted: int
    why: str
    ms: dict[str, float]


class PlanRounds:
    """All rounds of one plan over traced positions.

    Args:
        replay: over the traces that the plan would meet.
    """

    def __init__(self, plan: Plan, replay: Replay) -> None:
        self.plan, self.replay = plan, replay
        self.outcome: Outcome = replay.outcome(plan)
        self._builder = builder_of(plan, torch.device("cpu"))

    def at(self, position: int, root: int) -> Made:
        """The round whose root is the token before this traced position.

        Args:
            root: its token id.
        """
        traces, plan = self.replay.traces, self.plan
        checkpoint = plan.checkpoints[int(self.outcome.checkpoint_T[position])]
        root_1 = torch.tensor([root])
        drafted = traced_tree(traces, position, root_1, checkpoint.steps)
        templates = _templates(plan, checkpoint)
        sources: dict[str, TokenSource] = {
            name: _Traced(traces.sources[name], position, paths) for name, paths in templates.items()
        }
        tree = self._builder.build(checkpoint, drafted, self._builder.retrieve(checkpoint, sources, root_1, None))
        phases = self.replay.latency.phases_ms(plan, checkpoint, self.replay.context_T[position : position + 1])
        return Made(
            tree=tree,
            accepted_N=on_path(tree, F.pad(traces.truth_TD[position].long(), (0, self._builder.max_depth), value=-1)),
            emitted=int(self.outcome.tokens_T[position]),
            why=self._why(position, checkpoint),
            ms={phase: float(ms if phase != "verify" else ms[0]) for phase, ms in phases.items()},
        )

    def _why(self, position: int, stopped: Any) -> str:
        """What was asked at each checkpoint up to the one where drafting stopped."""
        said = []
        for checkpoint in self.plan.checkpoints[: self.plan.checkpoints.index(stopped) + 1]:
            is_last = checkpoint is self.plan.checkpoints[-1]
            if not checkpoint.steps:
                said.append("This plan drafts nothing." if is_last else self._promised(position, checkpoint))
                continue
            steps = f"{checkpoint.steps} draft step{'s' if checkpoint.steps > 1 else ''}"
            sure = f"the head was {self.replay.confidence_TP[position, checkpoint.steps - 1]:.0%} sure"
            if is_last:
                said.append(f"After {steps}, the plan's most, {sure}.")
            else:
                is_stop = checkpoint is stopped
                rule = "at most" if is_stop else "more than"
                ends = "drafting stopped" if is_stop else "drafting went on"
                said.append(f"After {steps} {sure}, {rule} {checkpoint.threshold:.0%}: {ends}.")
        return " ".join(said)

    def _promised(self, position: int, checkpoint: Any) -> str:
        assert isinstance(self.plan, ScoredPlan)
        promise = self.replay.promise(self.plan.acceptance)[position]
        skips = promise > checkpoint.threshold
        rule, ends = ("over", "the head was not asked") if skips else ("not over", "the head was asked")
        return f"Retrieval promised {promise:.2f} tokens, {rule} {checkpoint.threshold:.2f}: {ends}."


def shown_rounds(
    plans: dict[str, Plan],
    latency: Latency,
    traces: dict[bool, Traces],
    answers: Sequence[TracedText],
    spelled: dict[int, str],
) -> list[dict[str, Any]]:
    """The answers, as JSON values: their tokens with sources and rounds, and of every round of the plan `graft` what
    each method makes of its root.

    Args:
        plans: of each method.
        traces: by whether the noise of draws is told.
    """
    numbers = torch.tensor([answer.number for answer in answers])
    most = max(plan.num_draft_tokens for plan in plans.values())
    # What the plans make of the other prompts is in no answer.
    shown = {told: rows_of(one, torch.isin(one.prompt_T, numbers)) for told, one in traces.items()}
    replays = {told: Replay(one, latency, most, told) for told, one in shown.items()}
    rounds = {name: PlanRounds(plan, replays.get(plan.shares_noise, replays[False])) for name, plan in plans.items()}
    return [_shown(rounds, answer, spelled) for answer in answers]


def rows_of(traces: Traces, kept_T: Tensor) -> Traces:
    """The traces of these positions."""
    whole = {"sources", "depths_C"}
    columns = {one.name: getattr(traces, one.name)[kept_T] for one in fields(Traces) if one.name not in whole}
    sources = {}
    for name, source in traces.sources.items():
        own = {one.name: getattr(source, one.name)[kept_T] for one in fields(SourceTraces) if one.name != "template_RL"}
        sources[name] = replace(source, **own)
    return replace(traces, **columns, sources=sources)


def traced_tree(traces: Traces, position: int, root_1: Tensor, steps: int) -> DraftTree:
    """The root and what the head proposed below it in so many steps."""
    count = int((traces.depths_C <= steps).sum())
    parents_C = 1 + traces.parents_TC[position, :count].long()
    return drafted_tree(root_1, traces.tokens_TC[position, :count], parents_C, traces.logp_TC[position, :count], steps)


class _Traced(TokenSource):
    """A source that proposes what was traced at one position."""

    def __init__(self, traced: SourceTraces, position: int, paths: RankPaths) -> None:
        rows = {path: row for row, path in enumerate(traced.template)}
        found = [rows.get(path, -1) for path in paths]
        row_R = torch.tensor(found, dtype=torch.long)
        self.tokens_R = torch.where(row_R >= 0, traced.tokens_TR[position].long()[row_R], -1)
        self.logp_R = torch.where(row_R >= 0, traced.logp_TR[position][row_R], 0.0)
        self.evidence_1 = traced.evidence_T[position : position + 1]

    def propose(self, root_1: Tensor, template: Template, noise: Noise | None) -> Proposal:
        tree = template.tree(torch.cat((root_1, self.tokens_R)), None)
        tree.logp_N[1:] = self.logp_R
        return Proposal(tree, self.evidence_1)


def _templates(plan: Plan, checkpoint: Any) -> dict[str, RankPaths]:
    """The rank paths that each source is asked for at a checkpoint."""
    if isinstance(plan, QuotaPlan):
        return dict.fromkeys(plan.sources, checkpoint.template)
    assert isinstance(plan, ScoredPlan)
    return {model.name: model.template for model in plan.acceptance.sources if model.template}


def _shown(rounds: dict[str, PlanRounds], answer: TracedText, spelled: dict[int, str]) -> dict[str, Any]:
    graft = rounds["graft"]
    start = int((graft.replay.traces.prompt_T < answer.number).sum())
    tokens: list[list[Any]] = [[answer.pieces[0], "target", None]]
    shown: list[dict[str, Any]] = []
    place = 0
    while place < len(answer.tokens) - 1:
        made = {name: one.at(start + place, answer.tokens[place]) for name, one in rounds.items()}
        ours = made["graft"]
        emitted = min(ours.emitted, len(answer.tokens) - 1 - place)
        sources = [*_accepted_sources(ours), "target"][:emitted]
        for piece, source in zip(answer.pieces[place + 1 :], sources, strict=False):
            tokens.append([piece, source, len(shown)])
        of_methods = {name: _values(one, spelled) for name, one in made.items()}
        shown.append({"root": answer.pieces[place], "place": place, "made": of_methods})
        place += emitted
    return {"prompt": answer.prompt, "tokens": tokens, "rounds": shown}


def _accepted_sources(made: Made) -> list[str]:
    """Who proposed the accepted nodes, by depth."""
    rows = made.accepted_N.nonzero()[1:, 0]
    rows = rows[made.tree.depths_N[rows].argsort()]
    return [NAMES[name_of(int(number))] for number in made.tree.sources_N[rows]]


def _values(made: Made, spelled: dict[int, str]) -> dict[str, Any]:
    """As JSON values; a node is text, parent, source, score in thousandths, whether it was accepted."""
    tree = made.tree
    real = [row for row, source in enumerate(tree.sources_N.tolist()) if source != Source.EMPTY]
    place = {row: index for index, row in enumerate(real)}
    columns = zip(tree.tokens_N, tree.parents_N, tree.sources_N, tree.logp_N.exp(), made.accepted_N, strict=True)
    rows = [[one.item() for one in row] for row in columns]
    nodes = [
        [spelled.get(token, ""), place[parent], NAMES[name_of(source)], round(1000 * score), int(accepted)]
        for token, parent, source, score, accepted in (rows[row] for row in real[1:])
    ]
    ms = {phase: round(time, 3) for phase, time in made.ms.items()}
    return {"why": made.why, "emitted": made.emitted, "ms": ms, "nodes": nodes}
