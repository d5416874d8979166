"""Rounds against plain decoding, with a target and a head in plain Python: what is emitted, told, kept and noted."""

from collections import Counter
from copy import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
)

from graft_inference import Checkpoint, GraftError
from graft_inference.decode.round import commit, judge, keep, run_round
from graft_inference.decode.sampling import Sampler
from graft_inference.policy.fallback import fallback_plans
from graft_inference.policy.plan import AUTOREGRESSIVE, ChainPlan
from graft_inference.policy.tree_builder import builder_of
from graft_inference.speculator import Speculation, Speculator, is_unsure, read_records, retrieve

from .plain_rounds import PlainHead, PlainTarget, matrix, plain_text, seen_at, started
from .tiny import learned_plan, tiny_policy
from .trees import CPU, VOCAB

CHAIN = ChainPlan(
    (Checkpoint(1, 0.6, num_draft_tokens=3), Checkpoint(3, num_draft_tokens=6)),
    acceptance=replace(learned_plan().acceptance, drafted=learned_plan().acceptance.drafted[:3]),
)
ALWAYS_SKIPS = replace(learned_plan(0.3, gate=-1.0), learns_accepted=False)
PLANS = {
    "quotas": tiny_policy(0.3).graft,
    "the head alone": tiny_policy().eagle3,
    "retrieved alone": tiny_policy().retrieve,
    "scores": learned_plan(0.3),
    "told the noise": replace(learned_plan(0.3), shares_noise=True),
    "without the head": ALWAYS_SKIPS,
    "a chain": CHAIN,
    "plain": AUTOREGRESSIVE,
}
SAMPLERS = {
    "greedy": lambda seed: Sampler.of(0, seed),
    "a temperature": lambda seed: Sampler.of(0.7, seed),
    "the likeliest": lambda seed: Sampler(LogitsProcessorList([TopKLogitsWarper(2)]), False, seed),
    "a penalty": lambda seed: Sampler(
        LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.3), TemperatureLogitsWarper(0.8)]), False, seed
    ),
}
LEVELS = st.lists(st.sampled_from([0, 0, 1, 2, 3]), min_size=1, max_size=5)
PROMPTS = st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=9), min_size=1, max_size=3)


def where_it_stops(plan, confidence: list[float], skips: bool):
    """The checkpoint at which a request's drafting stops, by the confidence after each of its steps."""
    if not plan.drafts or skips:
        return plan.checkpoints[0]
    drafting = [one for one in plan.checkpoints if one.steps]
    return next((one for one in drafting[:-1] if confidence[one.steps - 1] <= one.threshold), drafting[-1])


def promises_enough(speculation: Speculation) -> bool:
    """Whether one source alone promises more tokens than the plan's first checkpoint asks for."""
    builder, first = speculation.builder, speculation.builder.plan.checkpoints[0]
    if first.steps or not builder.plan.drafts:
        return False
    trees = builder.retrieve(first, speculation.sources, speculation.root_1, speculation.shared_noise)
    return max(float(tree.logp_N.exp().sum()) for tree in trees) > first.threshold


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@settings(max_examples=settings.default.max_examples // 2)
@given(PROMPTS, st.sampled_from(list(SAMPLERS)), st.integers(0, 2**32), st.booleans(), LEVELS)
def test_rounds_emit_plain_decodings_text_and_tell_everyone_of_it(plan, prompts, name, seed, noted, levels):
    """Of prompts that are decoded together, with plans that change as the fallback changes them.

    Args:
        noted: whether log-probabilities and auxiliary states are kept.
        levels: places of the plans to fall back to, round after round. Of three prompts the first one has no plan.
    """
    target, head, count = PlainTarget(), PlainHead(plan.topk), 10
    speculator = Speculator(head if plan.drafts else None)
    samplers = [SAMPLERS[name](seed + index) for index in range(len(prompts))]
    plans = [plan] * len(prompts) if len(prompts) < 3 else [AUTOREGRESSIVE, *[plan] * (len(prompts) - 1)]
    states = [started(*one, noted) for one in zip(plans, [head] * 3, prompts, samplers, strict=False)]
    rounds = 0
    while min(state.place for state in states) < count:
        level = list(fallback_plans(plan).values())[levels[rounds % len(levels)] % len(fallback_plans(plan))]
        for state, own in zip(states, plans, strict=True):
            state.speculation.builder = builder_of(level if own is plan else own, CPU)
        rounds += 1
        assert rounds <= count, "each emits a token"
        check_round(target, speculator, states)
    for state, own, prompt, one in zip(states, plans, prompts, samplers, strict=True):
        tokens, logps = plain_text(one, prompt, state.place)
        text = (*prompt, *tokens)
        assert state.tokens == tokens
        assert tuple(state.cache.text) == text[:-1], "all but the last token are committed"
        assert state.stats.rounds == rounds
        assert state.clock.phases == ["start", "draft", "graft", "verify", "commit"] * rounds
        assert int(state.speculation.root_1) == text[-1]
        if state.history_S is not None:
            assert tuple(state.history_S.tolist()) == text
        if noted:
            assert torch.cat(state.logprobs).tolist() == pytest.approx(logps, abs=1e-4)
            read = [seen_at(text[:length]) for length in range(len(prompt) + 1, len(text))]
            assert torch.cat(state.aux).tolist() == read
        if part := state.speculation.head:
            assert tuple(part.text) == text[: len(part.text)]
            assert len(part.text) + len(state.speculation.fresh_tokens_A) == len(text) - 1
        if lookup := state.speculation.sources.get("lookup"):
            assert tuple(token for token in lookup.text_S.tolist() if token >= 0) == text
        if (source := state.speculation.sources.get("matrix")) and own.learns_accepted:
            read = Counter(text[len(prompt) : -1])
            assert source.matrix.learned_V.tolist() == [read[token] for token in range(VOCAB)]


def check_round(target, speculator, states):
    """Runs one, and sees what it emits, and where drafting stopped, and that no step ran behind that."""
    before = [(len(state.tokens), state.stats.checkpoints.copy()) for state in states]
    for state in states:
        state.speculation.noise = copy(state.sampler).noise(state.place, 9, VOCAB, CPU)
    skips = [promises_enough(state.speculation) for state in states]
    emitted = run_round(target, speculator, states)
    for state, (tokens, sources), (place, checkpoints), skip in zip(states, emitted, before, skips, strict=True):
        plan, part = state.speculation.builder.plan, state.speculation.head
        drafts = plan.drafts and not skip
        assert state.tokens[place:] == tokens
        assert len(sources) == len(tokens)
        assert sources[-1] == "bonus"
        assert set(sources[:-1]) <= {*plan.sources, *(["drafted"] if drafts else [])}
        stopped = where_it_stops(plan, part.confidence if part else [], skip)
        assert state.stats.checkpoints - checkpoints == Counter([stopped.name])
        if drafts:
            assert len(part.confidence) == stopped.steps
            assert (part.noise is not None) == (plan.shares_noise and not state.sampler.greedy)


@pytest.mark.parametrize("learns_accepted", [True, False])
def test_a_plan_says_whether_rejected_nodes_teach(learns_accepted):
    plan, taught = replace(PLANS["quotas"], learns_accepted=learns_accepted), []
    target, head = PlainTarget(), PlainHead(plan.topk)
    state = started(plan, head, [2, 0, 1, 2, 0], Sampler.of(0, 0), False)
    chosen = Speculator(head).build([state.speculation], Speculator(head).draft([state.speculation]))
    ((checkpoint, tree),) = chosen
    ancestors_NN = tree.ancestors(state.speculation.builder.depths[checkpoint.steps])
    (output,) = target.verify_all([tree], [ancestors_NN], [state.cache])
    verified = judge(state, tree, output, ancestors_NN, state.speculation.builder.depths[checkpoint.steps])
    source = SimpleNamespace(
        learns=True,
        learn=lambda tokens_M, logits_MV, weight_M: taught.extend(tokens_M.tolist()),
        extend=lambda *_: None,
    )
    state.speculation.sources = {"matrix": source}
    count = int(verified.acceptance.count)
    keep(state, verified, count)
    assert count < len(tree)
    assert len(taught) == (count if learns_accepted else len(tree))


@pytest.mark.parametrize("plan", [PLANS["scores"], PLANS["told the noise"]], ids=["scores", "told the noise"])
def test_sources_are_told_the_noise_where_the_plan_shares_it(plan, monkeypatch):
    request = started(plan, PlainHead(plan.topk), [2, 0, 1, 2, 0], Sampler.of(0.7, 0), False).speculation
    request.noise, told = Sampler.of(0.7, 0).noise(5, 9, VOCAB, CPU), []
    propose = request.sources["matrix"].propose
    monkeypatch.setattr(request.sources["matrix"], "propose", lambda *asked: told.append(asked[2]) or propose(*asked))
    retrieve(request, plan.checkpoints[0])
    assert [noise is request.noise for noise in told] == [plan.shares_noise]


@pytest.mark.parametrize(("gate", "asked"), [(1e9, True), (-1.0, False)])
def test_the_head_is_asked_unless_sources_promise_more_than_the_first_checkpoint_wants(gate, asked):
    """Whatever later checkpoints want."""
    plan = learned_plan(-gate, gate)
    head = PlainHead(plan.topk)
    request = started(plan, head, [2, 0, 1, 2, 0], Sampler.of(0, 0), False).speculation
    ((checkpoint, _),) = Speculator(head).draft([request])
    assert (checkpoint.steps > 0) == asked


@pytest.mark.parametrize("plan", [PLANS["scores"], PLANS["quotas"]], ids=["scores", "quotas"])
@given(st.integers(0, 2**32))
def test_a_round_of_fixed_shapes_tells_the_same(plan, seed):
    """What a captured round does, whose host does not know how many tokens were accepted."""
    found = []
    for fixed in (False, True):
        target, head = PlainTarget(), PlainHead(plan.topk)
        state = started(plan, head, [2, 0, 1, 2, 0], Sampler.of(0.7, seed), True)
        request, speculator = state.speculation, Speculator(head)
        request.noise = state.sampler.noise(state.place, 9, VOCAB, CPU)
        chosen = speculator.build([request], speculator.draft([request]))
        ((checkpoint, tree),) = chosen
        depth = request.builder.depths[checkpoint.steps]
        (output,) = target.verify_all([tree], [tree.ancestors(depth)], [state.cache])
        verified = judge(state, tree, output, tree.ancestors(depth), depth)
        count = int(verified.acceptance.count)
        if fixed:
            told, root_1 = [], request.root_1
            request.head.fixed = SimpleNamespace(append=lambda *all, told=told: told.extend(all))
            logp_A = keep(state, verified, None)[:count]
            assert request.root_1 is root_1, "a graph reads it where it is"
            emitted_A, aux_AE, count_1 = told
            assert count_1.tolist() == [count]
            fresh = emitted_A[:count], aux_AE[:count]
            assert len(emitted_A) == len(aux_AE) == depth + 1
        else:
            logp_A, fresh = keep(state, verified, count), request.fresh
            fresh = request.fresh
        sources = [[one[one >= 0] for one in source.tensors] for source in request.sources.values()]
        found.append((logp_A, *fresh, request.root_1, state.cache.branch[:count], sources))
    known, unknown = found
    torch.testing.assert_close(known, unknown)


def test_a_round_of_nothing_but_the_root_keeps_no_log_probabilities_unless_they_are_wanted():
    for logprobs in (False, True):
        state = started(AUTOREGRESSIVE, PlainHead(1), [1], Sampler.of(0, 0), logprobs)
        (checkpoint, tree) = chosen = Speculator(None).draft([state.speculation])[0]
        (output,) = PlainTarget().verify_all([tree], [tree.ancestors(0)], [state.cache])
        verified = judge(state, tree, output, tree.ancestors(0), 0)
        (emitted,) = commit([state], [chosen], [verified])
        assert emitted == ([int(output.logits_NV[0].argmax())], ["bonus"])
        assert len(state.logprobs or []) == 2 * logprobs
        assert (verified.logp_N is not None) == logprobs
        assert checkpoint.name == "none"


@pytest.mark.parametrize(("confidence", "stops"), [(0.25, True), (0.5, True), (0.75, False)])
def test_drafting_stops_at_a_confidence_of_at_most_the_threshold(confidence, stops):
    draft = SimpleNamespace(confidence=torch.tensor(confidence))
    assert is_unsure(draft, Checkpoint(1, 0.5)).tolist() == [stops]


def test_a_plan_that_drafts_needs_a_head():
    state = started(tiny_policy().eagle3, PlainHead(3), [1, 2], Sampler.of(0, 0), False)
    with pytest.raises(GraftError, match="no draft head, and the plan drafts"):
        Speculator(None).draft([state.speculation])


def test_a_prompt_teaches_the_sources_that_learn():
    one = started(PLANS["scores"], PlainHead(3), [1], Sampler.of(0, 0), False).speculation
    assert one.learns
    logits_SV = torch.eye(VOCAB)[:2]
    one.read(torch.tensor([3, 4]), logits_SV)
    learned = one.sources["matrix"].matrix
    assert learned.learned_V.tolist() == [0, 0, 0, 1, 1]
    assert learned.ids_VK[3, 0] == 0
    one.sources["matrix"].learns = False
    assert not one.learns
    one.read(torch.tensor([3, 4]), logits_SV)
    assert learned.learned_V.tolist() == [0, 0, 0, 1, 1]
    assert torch.equal(matrix().ids_VK[:3], learned.ids_VK[:3])


def test_records_are_read_at_once_and_parted_again():
    records = [torch.tensor([3, 1]), torch.tensor([4]), torch.tensor([1, 5, 9])]
    assert read_records(records) == [[3, 1], [4], [1, 5, 9]]
    assert read_records(records[:1]) == [[3, 1]]
    assert read_records([]) == []
