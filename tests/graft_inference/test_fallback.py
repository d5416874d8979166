"""In a world whose rounds take a known time, the fallback loses little where nothing pays and wins where it does."""

import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graft_inference import GraftEngine, paper_policy
from graft_inference.heads.draft import DEFERRED
from graft_inference.heads.eagle3.drafter import Eagle3Proposer
from graft_inference.policy.fallback import LOSS_BUDGET, PLAIN_EVERY, SHARE, Fallback, fallback_plans
from graft_inference.policy.plan import AUTOREGRESSIVE
from graft_inference.stats import PhaseClock
from graft_inference.target.model import Target

from .test_engine import SMALL, greedy_reference, prompt, small_engine
from .tiny import learned_plan, learned_policy, tiny_engine, tiny_head, tiny_model, tiny_policy

NAMES = ("plan", "narrowed", "retrieval alone", "autoregressive")
AR = 1.0  # milliseconds, say


class World:
    """Rounds of every plan: what they cost, in autoregressive rounds, and how many tokens they emit on average."""

    def __init__(self, *levels: tuple[float, float], seed: int = 0, hiccups: float = 0.0, weather: float = 1.0) -> None:
        self.levels = [*levels, (1.0, 1.0)]
        self.draw = random.Random(seed)
        self.hiccups, self.weather = hiccups, weather
        self.fallback = Fallback(NAMES[: len(levels)] + NAMES[-1:])
        self.seconds = 0.0
        self.reasons: Counter[str] = Counter()

    def run(self, tokens: int, context: int = 100) -> float:
        """Time over the autoregressive one for so many tokens more."""
        started, emitted = self.seconds, 0
        while emitted < tokens:
            place, reason = self.fallback.choose(context + emitted)
            cost, acceptance_length = self.levels[place]
            count = 1
            # Geometric, with this mean.
            while acceptance_length > 1 and self.draw.random() < 1 - 1 / acceptance_length:
                count += 1
            slow = self.weather if int(self.seconds // 40) % 2 else 1.0
            seconds = cost * slow * AR * self.draw.uniform(0.95, 1.05)
            self.fallback.record(seconds + 30 * AR * (self.draw.random() < self.hiccups), count)
            self.seconds += seconds
            emitted += count
            self.reasons[reason] += 1
        return (self.seconds - started) / (emitted * AR)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("costs", [(3.0, 2.0, 1.4), (1.2, 1.15, 1.1), (8.0, 5.0, 3.0)])
def test_what_never_pays_costs_less_than_five_per_cent(costs, seed):
    world = World(*((cost, 1.0) for cost in costs), seed=seed)
    assert world.run(4000) < 1.05
    assert world.run(4000) < 1.03
    assert world.reasons["autoregressive, nothing else pays"] > 6500
    assert all(world.reasons[name] for name in NAMES[:3])


@given(
    st.lists(st.floats(0.5, 9.0), min_size=1, max_size=3),
    st.lists(st.tuples(st.floats(1.0, 1.9), st.integers(1, 6)), min_size=1, max_size=40),
    st.integers(1, 4000),
)
def test_at_no_time_is_more_lost_than_the_purse_allows(costs, rounds, context):
    """Whatever rounds cost and emit; they go round and round, up to twice as dear as their plan's cheapest."""
    fallback = Fallback(NAMES[: len(costs)] + NAMES[-1:])
    seconds, first = 0.0, dict.fromkeys(range(len(costs)), 0.0)
    for number in range(400):
        place, _ = fallback.choose(context + fallback.emitted)
        more, tokens = rounds[number % len(rounds)]
        cost = 1.0 if place == len(costs) else costs[place] * more
        if place < len(costs):
            first[place] = first[place] or cost
        tokens = 1 if place == len(costs) else tokens
        fallback.record(cost, tokens)
        seconds += cost
        allowed = (1 + SHARE) * fallback.emitted + LOSS_BUDGET + sum(first.values()) + 1.9 * max(costs)
        assert seconds <= allowed + 1e-6


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("cost", "acceptance_length"), [(1.5, 3.0), (3.0, 8.0), (1.2, 1.8)])
def test_what_pays_stays_and_is_hardly_slowed_down(cost, acceptance_length, seed):
    world = World((cost, acceptance_length), (1.1, 1.3), (1.3, 1.5), seed=seed)
    world.run(500)  # the first plain rounds
    world.reasons.clear()
    emitted = 6000
    seconds = world.run(emitted, context=600) * emitted
    rounds, plain = sum(world.reasons.values()), world.reasons["autoregressive, measured"]
    assert world.reasons["plan"] == rounds - plain
    assert rounds // PLAIN_EVERY <= plain <= rounds // PLAIN_EVERY + 8
    # What a plain round takes longer than speculation takes for its one token.
    assert plain * (1 - cost / acceptance_length) * AR < 0.02 * seconds


@pytest.mark.parametrize("seed", range(5))
def test_a_machine_that_stumbles_now_and_then_is_not_taken_for_a_bad_plan(seed):
    """One round in fifty takes thirty times as long, whatever its plan."""
    world = World((1.5, 3.0), (1.1, 1.3), (1.3, 1.5), seed=seed, hiccups=0.02)
    world.run(4000)
    assert world.reasons["plan"] > 0.93 * sum(world.reasons.values())
    bad = World((3.0, 1.0), (2.0, 1.0), (1.5, 1.0), seed=seed, hiccups=0.02)
    assert bad.run(4000) < 1.05


@pytest.mark.parametrize("seed", range(5))
def test_a_machine_with_a_busy_neighbour_is_not_taken_for_a_bad_plan(seed):
    """Every now and then all rounds take three times as long for a while."""
    world = World((1.5, 3.0), (1.1, 1.3), (1.3, 1.5), seed=seed, weather=3.0)
    world.run(4000)
    assert world.reasons["plan"] > 0.85 * sum(world.reasons.values())


@pytest.mark.parametrize("seed", range(3))
def test_a_narrower_plan_has_its_turn_before_speculation_stops(seed):
    world = World((4.0, 2.0), (1.4, 2.0), (1.2, 1.1), seed=seed)
    world.run(1000)
    assert world.run(4000) < 1.1 * 1.4 / 2.0
    assert world.reasons["narrowed"] > 0.8 * sum(world.reasons.values())
    assert "autoregressive, nothing else pays" not in world.reasons or (
        world.reasons["autoregressive, nothing else pays"] < 300
    )


@pytest.mark.parametrize("seed", range(3))
def test_a_faster_narrow_plan_is_not_left_for_a_wide_one_that_pays_less(seed):
    world = World((4.0, 2.0), (1.2, 2.4), (1.2, 1.1), seed=seed)
    world.run(1500)
    world.levels[0] = (2.0, 2.2)
    world.reasons.clear()
    world.run(4000)
    assert world.reasons["narrowed"] > 0.8 * sum(world.reasons.values())


def test_what_turns_good_is_found_again_and_what_turns_bad_is_left():
    world = World((3.0, 1.0), (2.0, 1.0), (1.5, 1.0))
    world.run(3000)
    world.levels[0] = (1.5, 3.0)
    world.run(2000)
    assert world.run(2000) < 1.1 * 1.5 / 3.0
    world.levels[0] = (3.0, 1.0)
    assert world.run(2000) < 1 + SHARE + (LOSS_BUDGET + 5) / 2000 + 0.01


def test_a_plain_round_is_timed_for_each_power_of_two_of_context():
    """A long context makes every round dearer: that is no reason to stop."""
    world = World((1.5, 3.0))
    world.run(300)
    world.levels = [(15.0, 3.0), (10.0, 1.0)]
    world.reasons.clear()
    world.run(900, context=16384)
    world.levels = [(1.5, 3.0), (1.0, 1.0)]
    world.run(300)
    assert set(world.reasons) == {"plan", "autoregressive, measured"}


def test_processes_decide_by_the_same_times():
    """One of them measures nonsense, and is told what the first one measured."""
    first, told = Fallback(NAMES), []
    second = Fallback(NAMES, agree=lambda seconds: told[-1])
    for count in range(500):
        place, reason = first.choose(100 + count)
        assert second.choose(100 + count) == (place, reason)
        told.append((3.0, 2.0, 1.4, 1.0)[place])
        first.record(told[-1], 1)
        second.record(random.random(), 1)


@pytest.mark.parametrize(
    "plan", [paper_policy().graft, paper_policy(num_draft_tokens=12, num_steps=6).graft, learned_plan()]
)
def test_the_plans_to_fall_back_to_get_cheaper_one_by_one(plan):
    levels = fallback_plans(plan)
    assert tuple(levels) == NAMES
    assert levels["plan"] == plan
    assert levels["autoregressive"] == AUTOREGRESSIVE
    most = max(checkpoint.num_draft_tokens for checkpoint in plan.checkpoints)
    narrowed = levels["narrowed"]
    assert max(checkpoint.num_draft_tokens for checkpoint in narrowed.checkpoints) <= -(-most // 2) + 1
    assert narrowed.num_steps == -(-plan.num_steps // 2)
    assert type(narrowed) is type(plan)
    assert replace(narrowed, checkpoints=plan.checkpoints) == plan
    alone = levels["retrieval alone"]
    assert not alone.drafts
    assert alone.sources


def test_a_plan_without_anything_to_narrow_has_no_such_rung():
    assert tuple(fallback_plans(AUTOREGRESSIVE)) == ("plan", "autoregressive")
    assert tuple(fallback_plans(paper_policy().eagle3)) == ("plan", "narrowed", "autoregressive")
    assert tuple(fallback_plans(paper_policy().retrieve)) == ("plan", "narrowed", "autoregressive")


class FakeTime:
    """A clock that the engine reads and that only what it runs moves on: verified rows and head passes."""

    def __init__(self, monkeypatch, row: float = 0.02, head: float = 0.3) -> None:
        self.now = 0.0
        monkeypatch.setattr(PhaseClock, "now", lambda clock: self.now)
        run_target, run_head = Target.forward, Eagle3Proposer._pass

        def forward(target, tokens, *arguments, **named):
            self.now += 1 + row * (len(tokens) - 1)
            return run_target(target, tokens, *arguments, **named)

        def head_pass(*arguments):
            self.now += head
            return run_head(*arguments)

        monkeypatch.setattr(Target, "forward", forward)
        monkeypatch.setattr(Eagle3Proposer, "_pass", head_pass)


def governed_engine(policy=None) -> GraftEngine:
    model = tiny_model("llama", max_position_embeddings=1024)
    return tiny_engine(model, policy or paper_policy(8, 32, 5, 3), tiny_head(model), fallback=True)


def test_a_random_head_is_nearly_as_fast_as_autoregressive(monkeypatch):
    engine = governed_engine()
    FakeTime(monkeypatch)
    methods = ("graft", "autoregressive")
    found = {method: engine.generate(prompt(9), 600, 1.0, method, seed=0) for method in methods}
    fallback = found["graft"].stats
    assert found["graft"].sequences.tolist() == found["autoregressive"].sequences.tolist()
    assert fallback.decode_seconds < 1.05 * found["autoregressive"].stats.decode_seconds
    assert sum(fallback.fallback.values()) == fallback.rounds
    assert fallback.fallback["plan"]
    assert fallback.fallback["narrowed"]
    assert fallback.fallback["autoregressive, nothing else pays"] > 400
    engine.fallback = False
    ungoverned = engine.generate(prompt(9), 100, 1.0, seed=0).stats
    assert ungoverned.tokens_per_second < 0.7 * found["autoregressive"].stats.tokens_per_second
    assert not ungoverned.fallback


def test_a_batch_with_a_random_head_is_nearly_as_fast_as_autoregressive_ones(monkeypatch):
    engine = governed_engine()
    FakeTime(monkeypatch)
    batch = [prompt(length)[0] for length in (9, 5, 12, 7)]
    methods = ("graft", "autoregressive")
    found = {method: engine.generate(batch, 600, 1.0, method, seed=0, pad_token_id=0) for method in methods}
    fallback, plain = (found[method].stats for method in methods)
    assert found["graft"].sequences.tolist() == found["autoregressive"].sequences.tolist()
    assert fallback.decode_seconds < 1.05 * plain.decode_seconds
    assert fallback.fallback["plan"]
    assert fallback.fallback["autoregressive, nothing else pays"] > 4 * 450
    engine.fallback = False
    ungoverned = engine.generate(batch, 90, 1.0, seed=0, pad_token_id=0).stats
    assert ungoverned.tokens_per_second < 0.7 * plain.tokens_per_second


@pytest.mark.parametrize("method", ["eagle3", "retrieve", "autoregressive"])
def test_baselines_and_a_plan_of_ones_own_stay_what_they_are(monkeypatch, method):
    engine = governed_engine()
    FakeTime(monkeypatch)
    plan = engine.policy.plan(method)
    for stats in (
        engine.generate(prompt(9), 100, method=method).stats,
        engine.generate(prompt(9), 100, plan=plan).stats,
    ):
        assert not stats.fallback
        assert set(stats.checkpoints) <= {checkpoint.name for checkpoint in plan.checkpoints}


@pytest.mark.parametrize("policy", [tiny_policy(0.5), learned_policy(0.5)])
@pytest.mark.parametrize("scope", ["request", "engine"])
def test_plans_may_change_from_round_to_round(policy, scope):
    """Every level after every other, in one request, with deferred reading and caches of the request's own plan."""
    engine = small_engine(policy=policy)
    engine.fallback, engine.retrieval_scope = True, scope

    class Restless(Fallback):
        draw = random.Random(0)

        def choose(self, context):
            place = self.draw.randrange(len(self.names))
            return place, self.names[place]

        def record(self, seconds, tokens):
            pass

    engine.fallbacks[engine.policy.graft] = {1: Restless(tuple(fallback_plans(engine.policy.graft)))}
    accepted: Counter[str] = Counter()
    for seed in range(3):
        input_ids = prompt(3 + seed, seed, SMALL)
        expected = greedy_reference(engine.target.model, input_ids, 120)
        found = engine.generate(input_ids, 120)
        assert found.sequences.tolist() == expected.tolist()
        assert len(found.stats.fallback) == 4
        accepted.update(found.stats.accepted)
    assert accepted["matrix"] + accepted["lookup"]
    assert accepted["drafted"]


def test_requests_that_take_turns_share_a_fallback(monkeypatch):
    engine = governed_engine()
    FakeTime(monkeypatch)
    expected = [engine.generate(prompt(length), 60, 1.0, seed=0).sequences[0, length:].tolist() for length in (9, 70)]
    engine.fallbacks.clear()
    streams = [engine.stream(prompt(length), 60, 1.0, seed=0) for length in (9, 70)]
    assert list(zip(*streams, strict=True)) == list(zip(*expected, strict=True))
    (fallback,) = engine.fallbacks[engine.policy.graft].values()
    assert fallback.emitted >= 118


def test_the_head_leaves_few_positions_unread(monkeypatch):
    """However long it is not asked; and what it has read in pieces it knows as if it had read it at once."""
    engine = governed_engine(learned_policy())
    most, proposer = [], engine.speculator.head
    defer = proposer.defer

    def watched(drafters, fresh):
        defer(drafters, fresh)
        most.extend(drafter.unread for drafter in drafters)

    monkeypatch.setattr(proposer, "defer", watched)
    always = replace(learned_plan().checkpoints[0], threshold=-1.0)  # retrieved nodes promise more than that
    skipping = replace(learned_plan(), checkpoints=(always, *learned_plan().checkpoints[1:]))
    engine.generate(prompt(9), 900, plan=skipping)
    assert max(most) < DEFERRED
    assert len(most) > 2 * DEFERRED

    monkeypatch.undo()
    target = engine.target
    tokens = prompt(200)[0]
    with torch.inference_mode():
        taps = target.prefill(tokens, target.new_cache(200)).aux_NE
        drafters = [proposer.open(3, 0, 240) for _ in range(2)]
        for place in range(150):
            proposer.defer(drafters[:1], [(tokens[place + 1 : place + 2], taps[place : place + 1])])
        (one,) = proposer.begin(drafters[:1], [(tokens[151:152], taps[150:151])], [tokens[151:152]], [None])
        (other,) = proposer.begin(drafters[1:], [(tokens[1:152], taps[:151])], [tokens[151:152]], [None])
    assert drafters[0].length == drafters[1].length == 151
    assert one.candidates.tokens_N.tolist() == other.candidates.tokens_N.tolist()
    torch.testing.assert_close(one.candidates.logp_N, other.candidates.logp_N)


def test_the_wide_rungs_fit_the_caches_of_the_plan():
    """Every narrower plan's rows and beams fit what was made for the plan itself."""
    for plan in (paper_policy().graft, paper_policy(4, 16, 6, 3).graft, learned_plan()):
        for level in fallback_plans(plan).values():
            assert level.num_draft_tokens <= plan.num_draft_tokens
            assert level.topk * level.num_steps <= plan.topk * plan.num_steps
