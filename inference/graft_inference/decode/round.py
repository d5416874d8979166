"""One round of the decode loop, for one prompt or several: draft, prune, graft, verify, commit, update.

The trees of several prompts lie one behind the other in a single pass of the target, which reads its weights once
for all of them; nothing is padded, and each tree sees its own prompt's cache alone. The prompts that still draft
share the passes of the head in the same way, and every decision is one host read for all prompts that face it.
"""

from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ..heads.eagle3.drafter import Draft, Drafter, begin_all, deepen_all, defer_all
from ..policy.plan import Stage
from ..target.model import Target, TargetOutput
from ..tree import DraftTree, root_tree
from .state import DecodeState
from .verification import Acceptance, Emitted, accept, learn, of_record, to_record


def run_round(target: Target, states: Sequence[DecodeState]) -> list[Emitted]:
    """One pass of the target: what it emits for each prompt."""
    for state in states:
        state.clock.start()
        places, vocab_size = 1 + state.grafter.max_depth, target.config.vocab_size
        state.noise = state.sampler.noise(state.place, places, vocab_size, target.device)
    drafts = draft(states)
    _mark(states, "draft")
    trees = graft(states, drafts)
    depths = [state.grafter.depths[stage.passes] for state, (stage, _) in zip(states, drafts, strict=True)]
    ancestors = [tree.ancestors(depth) for tree, depth in zip(trees, depths, strict=True)]
    _mark(states, "graft")
    outputs = target.verify_all(trees, ancestors, [state.cache for state in states])
    _mark(states, "verify")
    accepted, logprobs = [], []
    for state, tree, ancestors_NN, depth, output in zip(states, trees, ancestors, depths, outputs, strict=True):
        drawn_N, logp_N = state.sampler.draw(
            tree, output.logits_NV, state.noise, depth, state.history_S, state.logprobs is not None
        )
        accepted.append(accept(tree, ancestors_NN, drawn_N, depth))
        logprobs.append(logp_N)
    emitted = commit(states, trees, outputs, accepted, logprobs)
    for state, (stage, _) in zip(states, drafts, strict=True):
        state.stats.rounds += 1
        state.stats.stages[stage.name] += 1
    _mark(states, "commit")
    return emitted


def draft(states: Sequence[DecodeState]) -> list[tuple[Stage, DraftTree]]:
    """Drafts from checkpoint to checkpoint until the head is unsure; the passes after that never run.

    Returns:
        Of each prompt, the stage at which it stopped and every node that the head proposed.
    """
    found = [(state.plan.stages[0], root_tree(state.root_1)) for state in states]
    asked = _asked(states)
    if not asked:
        return found
    fresh = [_fresh(states[index]) for index in asked]
    noises = [states[index].shared_noise for index in asked]
    drafts = dict(zip(asked, begin_all([_drafter(states[index]) for index in asked], fresh, noises), strict=True))
    while True:
        stops = _stops(states, drafts)
        for index, stage in stops.items():
            found[index] = (stage, drafts.pop(index).candidates)
        if not drafts:
            return found
        deeper = deepen_all([_drafter(states[index]) for index in drafts], list(drafts.values()))
        drafts = dict(zip(drafts, deeper, strict=True))


def _asked(states: Sequence[DecodeState]) -> list[int]:
    """Which prompts' heads are to draft. What the others committed waits until theirs is asked again."""
    asked: list[int] = []
    waiting: list[int] = []
    gates = {}
    for index, state in enumerate(states):
        stage, state.retrieved = state.plan.stages[0], None
        if state.drafter is None:
            continue
        if stage.passes == 0 and state.plan.drafts:
            state.retrieved = _retrieve(state, stage)
            if state.retrieved:
                gates[index] = state.grafter.skips_drafting(stage, state.retrieved)
        (asked if state.plan.drafts else waiting).append(index)
    for index, (skips,) in zip(gates, _read(list(gates.values())), strict=True):
        if skips:
            asked.remove(index)
            waiting.append(index)
    defer_all([_drafter(states[index]) for index in waiting], [_fresh(states[index]) for index in waiting])
    return asked


def _stops(states: Sequence[DecodeState], drafts: dict[int, Draft]) -> dict[int, Stage]:
    """Which drafts end after this pass, and at which stage: at the last one, or where the head is unsure."""
    stops, unsure = {}, {}
    for index, one in drafts.items():
        stages = states[index].plan.stages
        for stage in stages:
            if stage.passes == one.passes:
                stops[index] = stage
                if stage is not stages[-1]:
                    unsure[index] = (one.confidence <= stage.threshold)[None]
    for index, (stop,) in zip(unsure, _read(list(unsure.values())), strict=True):
        if not stop:
            del stops[index]
    return stops


def graft(states: Sequence[DecodeState], drafts: Sequence[tuple[Stage, DraftTree]]) -> list[DraftTree]:
    """The best nodes of both sources."""
    trees = []
    for state, (stage, drafted) in zip(states, drafts, strict=True):
        if state.retrieved is None:
            state.retrieved = _retrieve(state, stage)
        trees.append(state.grafter.tree(stage, drafted, state.retrieved))
    return trees


def commit(
    states: Sequence[DecodeState],
    trees: Sequence[DraftTree],
    outputs: Sequence[TargetOutput],
    accepted: Sequence[Acceptance],
    logprobs: Sequence[Tensor | None],
) -> list[Emitted]:
    """Keeps the accepted branches and teaches the matrices; the host read that every round has is here."""
    records = _read([to_record(tree, acceptance) for tree, acceptance in zip(trees, accepted, strict=True)])
    emitted = []
    for state, tree, output, acceptance, logp_N, record in zip(
        states, trees, outputs, accepted, logprobs, records, strict=True
    ):
        tokens, sources = of_record(record)
        _keep_branch(state, tree, output, acceptance, len(tokens), logp_N)
        state.tokens += tokens
        emitted.append((tokens, sources))
    return emitted


def _keep_branch(
    state: DecodeState,
    tree: DraftTree,
    output: TargetOutput,
    acceptance: Acceptance,
    count: int,
    logp_N: Tensor | None,
) -> None:
    path_A = acceptance.path_D[:count]
    state.cache.commit_branch(path_A)
    if state.successors is not None and state.learns:
        if state.plan.learns_accepted:
            state.successors.update(tree.tokens_N[path_A], output.logits_NV[path_A])
        else:
            learn(state.successors, tree, output.logits_NV, acceptance)
    state.fresh_tokens_A = acceptance.emitted_D[:count]
    state.fresh_aux_AE = output.aux_NE[path_A]
    state.root_1 = state.fresh_tokens_A[-1:]
    state.place += count
    state.read(state.fresh_tokens_A)
    if state.history_S is not None:
        state.history_S = torch.cat((state.history_S, state.fresh_tokens_A))
    if state.logprobs is not None and logp_N is not None:
        state.logprobs.append(logp_N[path_A])


def _read(records: list[Tensor]) -> list[list[Any]]:
    """Records of one dimension, in one host read; none where there is no record."""
    if not records:
        return []
    values = iter((records[0] if len(records) == 1 else torch.cat(records)).tolist())
    return [list(islice(values, len(record))) for record in records]


def _retrieve(state: DecodeState, stage: Stage) -> list[DraftTree]:
    source = state.ngrams or state.successors
    return state.grafter.retrieve(stage, source, state.root_1, state.echo, state.shared_noise)


def _fresh(state: DecodeState) -> tuple[Tensor, Tensor]:
    return state.fresh_tokens_A, state.fresh_aux_AE


def _drafter(state: DecodeState) -> Drafter:
    assert state.drafter is not None
    return state.drafter


def _mark(states: Sequence[DecodeState], phase: str) -> None:
    for state in states:
        state.clock.mark(phase)
