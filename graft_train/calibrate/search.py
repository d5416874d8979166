"""The plan with the most tokens per second, by replay of traces under measured latencies.

Tokens per second is a ratio of sums. Dinkelbach: at the best ratio r, the best plan is the one whose rounds
earn the most tokens - r * time; a better plan gives a better r, and so on until it stands still.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from graft_inference import AcceptanceModel, Checkpoint, Plan, QuotaCheckpoint, QuotaPlan, ScoredPlan, paper_policy
from graft_inference.tree import drafted_nodes
from graft_train.calibrate.replay import Replay

THRESHOLDS = 40
SAME = 1e-5
"""Measures that differ by less are one."""
STARTS = 8
"""Trajectories from so many offsets weigh the positions: one alone would visit too few."""


@dataclass(frozen=True)
class Allowed:
    """What a plan may use.

    Attributes:
        num_draft_tokens: nodes of a verification.
        checkpoints: most places where drafting may stop early.
        retrieve_first: may leave out drafting.
        kind: of the plan: trees or chains.
    """

    num_draft_tokens: tuple[int, ...]
    checkpoints: int = 3
    retrieve_first: bool = True
    kind: type[ScoredPlan] = ScoredPlan


def best_eagle3(replay: Replay, num_draft_tokens: list[int]) -> Plan:
    """The best tree of drafted nodes alone: its draft steps and nodes are tuned as well as Graft's."""
    plans = [
        QuotaPlan((QuotaCheckpoint(steps, drafted=nodes - 1),), replay.topk, shares_noise=replay.shares_noise)
        for steps in range(1, replay.num_steps + 1)
        for nodes in num_draft_tokens
        if 1 < nodes <= 1 + _most_drafted(replay, steps)
    ]
    return _fastest(replay, plans)


def best_paper(replay: Replay, num_draft_tokens: list[int], most_rank: int) -> Plan:
    """The paper's checkpoints and thresholds, its nodes scaled to the tree size that suits this device best."""
    plans = [
        paper_policy(replay.topk, nodes, replay.num_steps, most_rank).graft for nodes in num_draft_tokens if nodes > 1
    ]
    return _fastest(replay, plans)


def best_learned(replay: Replay, model: AcceptanceModel, allowed: Allowed) -> Plan:
    """The best competing plan: where drafting stops, at what confidence, and how wide a tree is.

    Every number of steps may be the last. For each, the checkpoints before it are found from the last to the
    first (optimal stopping): a round stops at a checkpoint if what its tree is worth there exceeds what
    going on is worth, on average over all positions with as little confidence.
    """
    lasts = range(0, replay.num_steps + 1) if model.drafted else [0]
    found = (_converged(replay, part, allowed, last) for part in _sources(model) for last in lasts)
    plans = [plan for plan in found if plan]
    if model.drafted and model.sources:
        # One node, and nothing asked: where no candidate is worth its place.
        plans.append(_plan(replay, AcceptanceModel(), (Checkpoint(0),), allowed.kind))
    return _fastest(replay, plans)


def _sources(model: AcceptanceModel) -> list[AcceptanceModel]:
    """All sources together, and without each of them: one that adds too little costs its look-up."""
    if len(model.sources) < 2:
        return [model]
    fewer = [replace(model, sources=tuple(one for one in model.sources if one is not out)) for out in model.sources]
    return [model, *fewer]


def _converged(replay: Replay, model: AcceptanceModel, allowed: Allowed, last: int) -> Plan | None:
    num_draft_tokens = _possible(replay, model, allowed, last)
    if not num_draft_tokens:
        return None
    single = [(Checkpoint(last, num_draft_tokens=nodes),) for nodes in num_draft_tokens]
    plan: Plan = _fastest(replay, [_plan(replay, model, checkpoints, allowed.kind) for checkpoints in single])
    speed = replay.run(plan)[0]
    for _ in range(4):
        better = _improved(replay, model, allowed, last, plan, speed / 1e3)
        better = _simplified(replay, better, allowed.checkpoints)
        better_speed = replay.run(better)[0]
        if better_speed <= speed * 1.001:
            break
        plan, speed = better, better_speed
    return plan


def _improved(replay: Replay, model: AcceptanceModel, allowed: Allowed, last: int, plan: Plan, rate: float) -> Plan:
    """The plan that earns the most tokens - rate * ms, where the rounds of `plan` begin."""
    outcome = replay.outcome(plan)
    weight_T = np.bincount(
        np.concatenate([replay.visits(outcome, first) for first in range(STARTS)]), minlength=len(replay.traces)
    ).astype(float)
    stop_T = np.ones(len(weight_T), dtype=bool)
    checkpoints: list[Checkpoint] = []
    value_T = np.zeros(len(weight_T))
    first = 0 if last == 0 or (allowed.retrieve_first and model.sources) else 1
    for steps in range(last, first - 1, -1):
        measure_T = replay.promise(model) if steps == 0 else -replay.confidence_TP[:, steps - 1]
        if steps == last:
            one, value_T = _best_checkpoint(replay, model, allowed, steps, rate, weight_T)
            checkpoints = [one]
            continue
        if not _possible(replay, model, allowed, steps):
            continue  # so early a tree has fewer nodes than any size
        found = None
        for _ in range(2):  # the tree size that suits the rounds that stop here, then who stops, and again
            one, here_T = _best_checkpoint(replay, model, allowed, steps, rate, weight_T * stop_T)
            found = _threshold(measure_T, weight_T * (here_T - value_T))
            if found is None:
                break
            stop_T = measure_T > found
        if found is not None:
            checkpoints.insert(0, replace(one, threshold=found if steps == 0 else -found))
            value_T = np.where(stop_T, here_T, value_T)
        stop_T = np.ones_like(stop_T)
    return _plan(replay, model, tuple(checkpoints), allowed.kind)


def _threshold(measure_T: np.ndarray, gain_T: np.ndarray) -> float | None:
    """The value such that stopping wherever the measure exceeds it gains most; None if none gains.

    Equal measures stop together, and the value lies halfway to the next. Prompt lookup promises one of few sums, whose
    last bits depend on the order in which they are added up.
    """
    order = np.argsort(-measure_T, kind="stable")
    falling_T, sums_T = measure_T[order], np.cumsum(gain_T[order])
    ends = np.flatnonzero(falling_T[:-1] - falling_T[1:] > SAME)
    if not len(ends):
        return None
    ends = ends[np.unique(np.linspace(0, len(ends) - 1, THRESHOLDS).astype(int))]
    best = ends[np.argmax(sums_T[ends])]
    return float(falling_T[best] + falling_T[best + 1]) / 2 if sums_T[best] > 0 else None


def _best_checkpoint(
    replay: Replay, model: AcceptanceModel, allowed: Allowed, steps: int, rate: float, weight_T: np.ndarray
) -> tuple[Checkpoint, np.ndarray]:
    """The checkpoint of so many steps worth most to these positions, and what it is worth at each."""
    checkpoints = [Checkpoint(steps, num_draft_tokens=nodes) for nodes in _possible(replay, model, allowed, steps)]
    worth = []
    for one in checkpoints:
        outcome = replay.outcome(_plan(replay, model, (one,), allowed.kind))
        worth.append(outcome.tokens_T - rate * outcome.ms_T)
    best = int(np.argmax([value_T @ weight_T for value_T in worth]))
    return checkpoints[best], worth[best]


def _simplified(replay: Replay, plan: Plan, checkpoints: int) -> Plan:
    """Without checkpoints that gain nothing by themselves, and with at most so many."""
    while len(plan.checkpoints) > 1:
        shorter = [
            replace(plan, checkpoints=(*plan.checkpoints[:index], *plan.checkpoints[index + 1 :]))
            for index in range(len(plan.checkpoints) - 1)
        ]
        candidate = _fastest(replay, shorter)
        early = sum(checkpoint.steps > 0 for checkpoint in plan.checkpoints[:-1])
        if early <= checkpoints and replay.run(candidate)[0] * 1.001 < replay.run(plan)[0]:
            break
        plan = candidate
    return plan


def _possible(replay: Replay, model: AcceptanceModel, allowed: Allowed, steps: int) -> list[int]:
    drafted = _most_drafted(replay, steps) if model.drafted else 0
    return [nodes for nodes in allowed.num_draft_tokens if 1 < nodes <= 1 + drafted + model.candidates]


def _most_drafted(replay: Replay, steps: int) -> int:
    return drafted_nodes(replay.topk, steps)


def _plan(
    replay: Replay, model: AcceptanceModel, checkpoints: tuple[Checkpoint, ...], kind: type[ScoredPlan]
) -> ScoredPlan:
    return kind(checkpoints, replay.topk, learns_accepted=True, shares_noise=replay.shares_noise, acceptance=model)


def _fastest(replay: Replay, plans: Iterable[Plan]) -> Plan:
    return max(plans, key=lambda plan: replay.run(plan)[0])
