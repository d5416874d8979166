"""Replays against the engine itself, and the search's guarantees."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch

from graft_inference import ChainPlan, Checkpoint, GraftError, Plan, QuotaCheckpoint, QuotaPlan, ScoredPlan
from graft_inference.policy.acceptance import by_evidence
from graft_train.calibrate import fit as fit_module
from graft_train.calibrate import timer as timer_module
from graft_train.calibrate.fit import (
    Steps,
    calibration_error,
    drafted_scores,
    fit_acceptance,
    raw_acceptance,
    source_scores,
)
from graft_train.calibrate.latency import Latency
from graft_train.calibrate.replay import Forecast, Replay
from graft_train.calibrate.search import Allowed, best_eagle3, best_learned, best_paper
from graft_train.calibrate.trace_file import read_traces
from graft_train.calibrate.traces import on_path, record_traces
from graft_train.config.policy import CalibrateConfig
from tests.graft_inference.tiny import tiny_engine, tiny_head, tiny_model
from tests.graft_inference.trees import random_tree, token_path

BEAM, PASSES, NEW, BUDGET = 3, 4, 40, 12
WIDTHS = [1, 2, 4, 8, 12]
LATENCY = Latency(
    num_draft_tokens=WIDTHS,
    contexts=[16, 64],
    verify_ms=[[1.0, 1.1, 1.3, 1.9, 2.6]] * 2,
    draft_ms=[0.0, 0.2, 0.4, 0.6, 0.8],
    build_ms=0.05,
    commit_ms=0.1,
    source_ms={"matrix": 0.15, "lookup": 0.03},
    read_ms=0.01,
    spread=[0, 0],
)
ALLOWED = Allowed(tuple(WIDTHS))


@pytest.fixture(scope="module")
def engine():
    # Few tokens, so that a random head is often right.
    model = tiny_model("llama", vocab_size=8)
    return tiny_engine(model, head=tiny_head(model, draft_vocab_size=8))


def settings(**changes) -> CalibrateConfig:
    """36 rank paths of the matrix (four times the widest tree), chains of 8 of the lookup."""
    sizes = {"max_new_tokens": NEW, "topk": BEAM, "num_steps": PASSES, "num_draft_tokens": [1, 9], "retrieval_depth": 4}
    return CalibrateConfig(**(sizes | changes))


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 8, (length,), generator=generator) for length in (5, 9, 14)]


@pytest.fixture(scope="module")
def traces(engine, prompts):
    return record_traces(engine, prompts, settings())


@pytest.fixture(scope="module")
def replay(traces):
    return Replay(traces, LATENCY, BUDGET)


@pytest.mark.parametrize(("positions", "prompts_traced"), [(1, 1), (NEW - 1, 1), (NEW, 2), (10_000, 3)])
def test_no_further_prompt_is_traced_once_there_are_enough_positions(
    engine, prompts, traces, positions, prompts_traced
):
    few = record_traces(engine, prompts, settings(num_steps=2, retrieval_depth=2), positions=positions)
    assert few.prompt_T.unique().tolist() == list(range(prompts_traced))
    assert torch.equal(few.truth_TD[:, :2], traces.truth_TD[traces.prompt_T < prompts_traced, :2])


def competing(traces, *checkpoints, **changes) -> ScoredPlan:
    return ScoredPlan(checkpoints, BEAM, **{"acceptance": fit_acceptance(traces), "learns_accepted": True} | changes)


def without(plan: ScoredPlan, name: str) -> ScoredPlan:
    model = plan.acceptance
    return replace(plan, acceptance=replace(model, sources=tuple(one for one in model.sources if one.name != name)))


def plans(traces) -> dict[str, Plan]:
    gated = (
        Checkpoint(0, 6.0, num_draft_tokens=8),
        Checkpoint(1, 0.3, num_draft_tokens=4),
        Checkpoint(3, num_draft_tokens=8),
    )
    template = traces.sources["matrix"].template[:9]
    return {
        "one pass": QuotaPlan((QuotaCheckpoint(1, drafted=2),), BEAM),
        "tree": QuotaPlan((QuotaCheckpoint(3, drafted=7),), BEAM),
        "pruned at two checkpoints": QuotaPlan(
            (QuotaCheckpoint(1, 0.35, drafted=3), QuotaCheckpoint(2, 0.2, drafted=5), QuotaCheckpoint(4, drafted=9)),
            BEAM,
        ),
        "quotas": QuotaPlan(
            (QuotaCheckpoint(2, drafted=4, retrieved=5, template=template),), BEAM, learns_accepted=True
        ),
        "both compete": competing(traces, Checkpoint(2, num_draft_tokens=8)),
        "retrieved alone": competing(traces, Checkpoint(0, num_draft_tokens=8)),
        "everything": competing(traces, *gated),
        "head alone": without(without(competing(traces, *gated[1:]), "matrix"), "lookup"),
        "lookup alone": without(competing(traces, Checkpoint(0, num_draft_tokens=7)), "matrix"),
        "lookup and head": without(competing(traces, *gated), "matrix"),
        "no lookup": without(competing(traces, *gated), "lookup"),
    }


@pytest.mark.parametrize("name", [
    "one pass", "tree", "pruned at two checkpoints", "quotas", "both compete", "retrieved alone",
    "everything", "head alone", "lookup alone", "lookup and head", "no lookup",
])  # fmt: skip
def test_replay_reproduces_the_engines_rounds(engine, prompts, traces, replay, name):
    plan = plans(traces)[name]
    stats = [engine.generate(prompt, NEW, plan=plan).stats for prompt in prompts]
    acceptance_length = sum(s.emitted - 1 for s in stats) / sum(s.rounds for s in stats)
    assert acceptance_length > 1.1, "the tiny head must be right now and then for this to mean anything"
    assert replay.run(plan)[1] == pytest.approx(acceptance_length, abs=1e-9)
    visited = replay.outcome(plan).checkpoint_T[replay.visits(replay.outcome(plan))]
    for index, one in enumerate(plan.checkpoints):
        assert sum(s.checkpoints[one.name] for s in stats) == (visited == index).sum()


@pytest.fixture(scope="module")
def chain_traces(engine, prompts):
    return record_traces(engine, prompts, settings(topk=1))


def chains(traces) -> dict[str, ChainPlan]:
    gated = Checkpoint(0, 2.5, num_draft_tokens=9), Checkpoint(1, 0.3, num_draft_tokens=4), Checkpoint(4)
    both = ChainPlan((replace(gated[-1], num_draft_tokens=6),), acceptance=fit_acceptance(traces), learns_accepted=True)
    everything = replace(both, checkpoints=(*gated[:-1], both.checkpoints[0]))
    return {
        "both": both,
        "everything": everything,
        "head alone": ChainPlan(
            (Checkpoint(1, 0.3, num_draft_tokens=2), Checkpoint(4, num_draft_tokens=5)),
            acceptance=replace(both.acceptance, sources=()),
        ),
        "retrieved alone": replace(both, checkpoints=(Checkpoint(0, num_draft_tokens=8),)),
        "lookup and head": without(everything, "matrix"),
        "cut short": replace(both, checkpoints=(Checkpoint(4, num_draft_tokens=3),)),
    }


@pytest.mark.parametrize(
    "name", ["both", "everything", "head alone", "retrieved alone", "lookup and head", "cut short"]
)
def test_replay_reproduces_the_rounds_of_chains(engine, prompts, chain_traces, name):
    replay, plan = Replay(chain_traces, LATENCY, BUDGET), chains(chain_traces)[name]
    stats = [engine.generate(prompt, NEW, plan=plan).stats for prompt in prompts]
    acceptance_length = sum(s.emitted - 1 for s in stats) / sum(s.rounds for s in stats)
    assert acceptance_length > 1.05
    assert replay.run(plan)[1] == pytest.approx(acceptance_length, abs=1e-9)
    visited = replay.outcome(plan).checkpoint_T[replay.visits(replay.outcome(plan))]
    for index, one in enumerate(plan.checkpoints):
        assert sum(s.checkpoints[one.name] for s in stats) == (visited == index).sum()


def test_the_learned_chain_is_as_fast_as_any_of_its_parts(chain_traces):
    replay = Replay(chain_traces, LATENCY, BUDGET)
    allowed = replace(ALLOWED, kind=ChainPlan)
    model = replay.fitted
    learned = best_learned(replay, model, allowed)
    assert isinstance(learned, ChainPlan)
    parts = [replace(model, sources=()), replace(model, drafted=())]
    assert replay.run(learned)[0] >= max(replay.run(best_learned(replay, part, allowed))[0] for part in parts)
    assert replay.run(learned)[0] >= replay.run(best_eagle3(replay, WIDTHS))[0]


def test_a_forecast_has_the_tokens_rounds_and_time_of_every_prompt(engine, prompts, traces, replay):
    plan = plans(traces)["everything"]
    forecast = Forecast.of(replay, plan)
    stats = [engine.generate(prompt, NEW, plan=plan).stats for prompt in prompts]
    assert forecast.rounds_P.tolist() == [s.rounds for s in stats]
    assert forecast.tokens_P.tolist() == [s.emitted - 1 for s in stats]
    speed, acceptance_length = replay.run(plan)
    assert forecast.tokens_P.sum() / forecast.seconds_P.sum() == pytest.approx(speed)
    assert forecast.tokens_P.sum() / forecast.rounds_P.sum() == pytest.approx(acceptance_length)


@pytest.mark.parametrize("dearness", [0.5, 1])
def test_replay_reproduces_the_rounds_of_the_plan_that_was_learned(engine, prompts, traces, dearness):
    """A lookup promises one of few sums: a threshold on one of them would part replay and engine by rounding."""
    latency = replace(LATENCY, draft_ms=[dearness * time for time in LATENCY.draft_ms])
    replay = Replay(traces, latency, BUDGET)
    scale = without(competing(traces, Checkpoint(0)), "matrix").acceptance
    plan = best_learned(replay, scale, ALLOWED)
    assert plan.checkpoints[0].steps == 0
    assert plan.drafts
    seen = np.unique(replay.promise(scale))
    assert np.abs(seen - plan.checkpoints[0].threshold).min() > 1e-6
    stats = [engine.generate(prompt, NEW, plan=plan).stats for prompt in prompts]
    visited = replay.outcome(plan).checkpoint_T[replay.visits(replay.outcome(plan))]
    for index, one in enumerate(plan.checkpoints):
        assert sum(s.checkpoints[one.name] for s in stats) == (visited == index).sum()


@pytest.fixture(scope="module")
def told(engine, prompts):
    return record_traces(engine, prompts, settings(temperature=0.6), shares_noise=True)


@pytest.mark.parametrize("name", ["tree", "pruned at two checkpoints", "quotas", "retrieved alone", "everything"])
def test_replay_reproduces_rounds_that_know_the_noise_of_draws(engine, prompts, told, name):
    plan = replace(plans(told)[name], shares_noise=True)
    stats = [engine.generate(prompt, NEW, 0.6, plan=plan, seed=seed).stats for seed, prompt in enumerate(prompts)]
    acceptance_length = sum(s.emitted - 1 for s in stats) / sum(s.rounds for s in stats)
    assert acceptance_length > 1.1
    assert Replay(told, LATENCY, BUDGET, True).run(plan)[1] == pytest.approx(acceptance_length, abs=1e-9)
    unaware = [
        engine.generate(prompt, NEW, 0.6, plan=replace(plan, shares_noise=False), seed=seed).stats.rounds
        for seed, prompt in enumerate(prompts)
    ]
    assert sum(unaware) != sum(s.rounds for s in stats)
    assert set(told.reach_TC.unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("seed", range(4))
def test_on_path_equals_a_comparison_of_token_paths(seed):
    tree = random_tree(seed)
    truth = token_path(tree, int(tree.depths_N.argmax()))
    found = on_path(tree, torch.tensor([*truth, -1, -1]))
    expected = [token_path(tree, row) == truth[: int(tree.depths_N[row])] for row in range(len(tree))]
    assert found.tolist() == expected


def test_without_temperature_reach_is_the_greedy_path(traces, replay):
    assert torch.equal(traces.reach_TC.bool(), replay._true_TC)
    reached = [source.reach_TR.bool() for source in traces.sources.values()]
    assert torch.equal(torch.cat(reached, dim=1), replay._true_TR)


def test_with_temperature_reach_is_the_targets_own_probability_of_the_path(engine, prompts):
    """Against plain passes over each path, at several positions of a sampled continuation."""
    small = settings(max_new_tokens=12, num_steps=2, retrieval_depth=2, num_draft_tokens=[2], temperature=0.7)
    traces = record_traces(engine, prompts[:1], small)
    sequence = engine.generate(prompts[0], 12, 0.7, "autoregressive", seed=0).sequences[0]
    model = engine.target.model
    model.set_attn_implementation("sdpa")

    def reach(position: int, path: list[int]) -> float:
        prefix = sequence[: int(traces.context_T[position]) + 1].tolist()
        logits = model(torch.tensor([prefix + path])).logits[0, len(prefix) - 1 : -1] / 0.7
        return float(logits.log_softmax(-1)[range(len(path)), path].sum().exp())

    try:
        for position in (0, 4, 9):
            for column in range(traces.tokens_TC.shape[1]):
                parent = int(traces.parents_TC[position, column])
                above = [] if parent < 0 else [int(traces.tokens_TC[position, parent])]
                path = [*above, int(traces.tokens_TC[position, column])]
                assert float(traces.reach_TC[position, column]) == pytest.approx(reach(position, path), abs=1e-4)
            for source in traces.sources.values():
                for row, ranks in enumerate(source.template):
                    above = [source.template.index(ranks[:n]) for n in range(1, len(ranks) + 1)]
                    ids = source.tokens_TR[position, above].tolist()
                    expected = 0.0 if ids[-1] < 0 else reach(position, ids)
                    assert float(source.reach_TR[position, row]) == pytest.approx(expected, abs=1e-4)
    finally:
        model.set_attn_implementation("graft_tree")


def test_a_head_that_overflows_is_told_before_anything_is_fitted(engine, prompts):
    head = tiny_head(engine.target.model, draft_vocab_size=8)
    head.midlayer.mlp.down_proj.weight.data.fill_(3e38)
    broken = tiny_engine(engine.target.model, head=head)
    with pytest.raises(GraftError, match=r"the draft head overflows in torch\.float32"):
        record_traces(broken, prompts[:1], settings(max_new_tokens=8, num_steps=2, retrieval_depth=2))


def test_a_fit_finds_the_law_that_made_the_data():
    """Steps accepted as sigmoid(1.5 logit - 0.2, + 0.7 for rank 1): the law comes back, whatever the depth."""
    generator = torch.Generator().manual_seed(0)
    logit = 3 * torch.randn(60_000, generator=generator)
    depth, rank = (torch.randint(0, 2, (60_000,), generator=generator) for _ in range(2))
    share = (torch.rand(60_000, generator=generator) < (1.5 * logit - 0.2 + 0.7 * rank).sigmoid()).float()
    prompt = torch.arange(60_000) % 30
    slopes, offsets, ranks = fit_module._fit(Steps(logit, depth + 1, rank, torch.ones_like(logit), share, prompt), 2, 2)
    for slope, offset in zip(slopes, offsets, strict=True):
        assert slope == pytest.approx(1.5, abs=0.05)
        assert offset + ranks[0] == pytest.approx(-0.2, abs=0.05)
    assert ranks[1] - ranks[0] == pytest.approx(0.7, abs=0.05)


def test_parents_that_were_rejected_do_not_count():
    logit = torch.zeros(2000)
    reach = torch.tensor([1.0, 0.0]).repeat(1000)
    _, offsets, ranks = fit_module._fit(
        Steps(logit, torch.ones(2000).long(), torch.zeros(2000).long(), reach, reach, torch.arange(2000) // 100), 1, 1
    )
    assert offsets[0] + ranks[0] > 2  # all that could be accepted was


def honest_steps(prompts: int, distinct: int, repeats: int, seed: int) -> Steps:
    """Of a source whose word is true, so many times each; two depths."""
    generator = torch.Generator().manual_seed(seed)
    logit = 2 * torch.randn(prompts * distinct, generator=generator)
    depth = torch.randint(1, 3, logit.shape, generator=generator)
    share = (torch.rand(logit.shape, generator=generator) < logit.sigmoid()).float()
    prompt = torch.arange(prompts).repeat_interleave(distinct)
    columns = (logit, depth, torch.zeros_like(depth), torch.ones_like(logit), share, prompt)
    return Steps(*(column.repeat_interleave(repeats) for column in columns))


def test_what_prompts_repeat_is_not_taken_for_many_observations():
    """Twenty prompts say the same four things fifty times each: on other prompts the fit is no worse than raw."""
    unseen = honest_steps(20_000, 1, 1, seed=99)
    raw = calibration_error(unseen.logit.sigmoid(), unseen.share)
    errors = []
    for seed in range(6):
        slopes, offsets, ranks = fit_module._fit(honest_steps(20, 4, 50, seed), 2, 1)
        slope, offset = torch.tensor([slopes, offsets])[:, unseen.depth - 1]
        errors.append(calibration_error((slope * unseen.logit + offset + ranks[0]).sigmoid(), unseen.share))
    assert sum(errors) / len(errors) < raw + 0.02


def test_one_prompt_leaves_the_source_at_its_word():
    steps = honest_steps(1, 40, 50, seed=0)
    assert fit_module._fit(steps, 2, 1) == ((1.0, 1.0), (0.0, 0.0), (0.0,))


def test_a_fitted_model_never_ranks_a_child_above_its_parent(traces):
    model = fit_acceptance(traces)
    drafted_TC, parents_TC = drafted_scores(traces, model), traces.parents_TC.long()
    above_TC = drafted_TC.gather(1, parents_TC.clamp(min=0)).masked_fill(parents_TC < 0, 0.0)
    assert (drafted_TC <= above_TC).all()
    for one in model.sources:
        source = traces.sources[one.name]
        scores_TR = source_scores(source, one)
        assert scores_TR.isfinite().any()
        for row, path in enumerate(source.template):
            above = scores_TR[:, source.template.index(path[:-1])] if len(path) > 1 else 0.0
            assert (scores_TR[:, row] <= above).all()


def test_calibration_brings_the_promises_near_what_is_met(traces):
    fitted, raw = fit_acceptance(traces), raw_acceptance(traces)

    def error(scores_TN, reach_TN) -> float:
        probability_TN = scores_TN.exp()
        return calibration_error(probability_TN[probability_TN > 0.02], reach_TN[probability_TN > 0.02])

    assert error(drafted_scores(traces, fitted), traces.reach_TC) < 0.5 * error(
        drafted_scores(traces, raw), traces.reach_TC
    )
    matrix = traces.sources["matrix"]
    before, after = (source_scores(matrix, model.sources[0]) for model in (raw, fitted))
    assert error(after, matrix.reach_TR) < 0.5 * error(before, matrix.reach_TR)


def test_rare_evidence_is_trusted_little(traces):
    """Twenty matches of three tokens that all went on; one of four."""
    lookup = traces.sources["lookup"]
    few = replace(
        lookup,
        evidence_T=torch.tensor([3] * 20 + [4] + [0] * (len(traces) - 21)),
        reach_TR=torch.ones_like(lookup.reach_TR),
    )
    (model,) = (
        one
        for one in fit_acceptance(replace(traces, sources=traces.sources | {"lookup": few})).sources
        if one.name == "lookup"
    )
    reached = by_evidence(model).exp()
    assert reached[2, 1] < 0.01
    for depth in (1, 4):
        assert reached[3, depth] == pytest.approx(20 / 30, abs=0.01)
        assert reached[4, depth] == pytest.approx((1 + 10 * 20 / 30) / 11, abs=0.01)


def test_calibration_error_by_hand():
    """Two bins: 0.2 promised and 0 met, 0.8 promised and 1 met."""
    error = calibration_error(torch.tensor([0.2, 0.8, 0.2, 0.8]), torch.tensor([0.0, 1.0, 0.0, 1.0]), bins=2)
    assert error == pytest.approx(0.2)


def test_time_is_the_sum_of_the_rounds(traces, replay):
    plan = QuotaPlan((QuotaCheckpoint(2, drafted=3),), BEAM)
    speed, acceptance_length = replay.run(plan)
    assert speed == pytest.approx(1e3 * acceptance_length / (0.4 + 0.05 + 0.1 + 1.3))
    plan = competing(traces, Checkpoint(0, num_draft_tokens=8))
    speed, acceptance_length = replay.run(plan)
    assert speed == pytest.approx(1e3 * acceptance_length / (0.05 + 0.1 + 0.15 + 0.03 + 1.9))


def test_one_disturbed_time_does_not_stand_for_all_wider_passes():
    assert timer_module._rising([1.0, 9.0, 1.2, 1.8, 5.0]) == pytest.approx([1.0, 4.0, 4.0, 4.0, 5.0])
    assert timer_module._rising([1.0, 1.5, 2.0]) == [1.0, 1.5, 2.0]


def test_verification_costs_more_in_a_long_context():
    latency = replace(LATENCY, verify_ms=[[1.0] * 5, [3.0] * 5])
    plan = QuotaPlan((QuotaCheckpoint(1, drafted=1),), BEAM)
    times = latency.round_ms(plan, plan.checkpoints[0], torch.tensor([0, 40, 100]).numpy())
    assert times.tolist() == pytest.approx([1 + 0.35, 2 + 0.35, 3 + 0.35])


def test_the_learned_plan_is_predicted_at_least_as_fast_as_its_special_cases(traces, replay):
    scale = fit_acceptance(traces)
    learned = replay.run(best_learned(replay, scale, ALLOWED))[0]
    without = replay.run(best_learned(replay, replace(scale, sources=()), ALLOWED))[0]
    alone = replay.run(best_learned(replay, replace(scale, drafted=()), ALLOWED))[0]
    fixed = replay.run(best_learned(replay, scale, replace(ALLOWED, retrieve_first=False)))[0]
    assert learned >= max(without, fixed)
    assert learned >= 0.999 * max(alone, replay.run(best_eagle3(replay, WIDTHS))[0])


def test_costly_drafting_is_left_out_and_dear_rows_are_not_taken(traces):
    """With passes at a hundred times the price no plan runs more than one."""
    dear = Replay(traces, replace(LATENCY, draft_ms=[0.0, 0.2, 40.0, 80.0, 120.0]), BUDGET)
    scale = fit_acceptance(traces)
    assert best_learned(dear, scale, ALLOWED).num_steps <= 1
    assert best_eagle3(dear, WIDTHS).num_steps == 1
    steep = Replay(traces, replace(LATENCY, verify_ms=[[1.0, 1.1, 50.0, 100.0, 150.0]] * 2), BUDGET)
    assert (
        steep.run(best_learned(steep, scale, ALLOWED))[0]
        >= steep.run(competing(traces, Checkpoint(1, num_draft_tokens=2)))[0]
    )


def test_a_mixture_of_experts_gets_a_narrower_tree_than_a_dense_target(traces):
    """Each row wakes experts of its own, so that verification takes longer with every one; all else is the same."""
    costs = {"dense": [1.0, 1.02, 1.05, 1.15, 1.3], "experts": [1.0, 1.5, 2.4, 4.2, 6.0]}
    widths = {}
    for name, verify in costs.items():
        replay = Replay(traces, replace(LATENCY, verify_ms=[verify] * 2), BUDGET)
        plans = (best_learned(replay, fit_acceptance(traces), ALLOWED), best_eagle3(replay, WIDTHS))
        # Rows of the average round: each stage has its own.
        widths[name] = [mean_rows(replay, plan) for plan in plans]
    for dense, experts in zip(widths["dense"], widths["experts"], strict=True):
        assert experts < 0.7 * dense


def mean_rows(replay: Replay, plan: Plan) -> float:
    """Verified rows of a round, on average over all positions: what the verification alone costs, if a row costs 1."""
    per_row = replace(
        LATENCY,
        verify_ms=[[float(width) for width in WIDTHS]] * 2,
        draft_ms=[0.0] * 5,
        build_ms=0.0,
        commit_ms=0.0,
        source_ms=dict.fromkeys(LATENCY.source_ms, 0.0),
        read_ms=0.0,
    )
    return float(Replay(replay.traces, per_row, BUDGET).outcome(plan).ms_T.mean())


def test_where_no_candidate_is_worth_its_row_nothing_is_asked(traces):
    """A second row at the price of a hundred tokens: the plan is autoregressive, in all that it costs."""
    dear = Replay(traces, replace(LATENCY, verify_ms=[[1.0] + [101.0] * 4] * 2), BUDGET)
    plan = best_learned(dear, fit_acceptance(traces), ALLOWED)
    assert not plan.drafts
    assert not plan.sources
    assert dear.run(plan) == (pytest.approx(1e3 / (1.0 + 0.05 + 0.1)), 1.0)


def test_the_search_finds_the_best_of_all_thresholds_and_widths(replay, traces):
    """Against every plan of the family, two stages of one width each: none is more than a per cent faster."""
    scale = without(competing(traces, Checkpoint(0)), "lookup").acceptance
    allowed = replace(ALLOWED, checkpoints=1, retrieve_first=False)
    learned = replay.run(best_learned(replay, scale, allowed))[0]
    widths, best = WIDTHS[1:4], 0.0
    cuts = sorted({float(c) for c in traces.confidence_TP[::7].flatten()})[::12]
    for last, wide in product(range(1, 4), widths):
        best = max(best, replay.run(competing(traces, Checkpoint(last, num_draft_tokens=wide), acceptance=scale))[0])
        for first, narrow, cut in product(range(1, last), widths, cuts):
            pair = Checkpoint(first, cut, num_draft_tokens=narrow), Checkpoint(last, num_draft_tokens=wide)
            best = max(best, replay.run(competing(traces, *pair, acceptance=scale))[0])
    assert learned > 0.99 * best


def test_a_threshold_separates_where_stopping_pays():
    """Stopping gains 1 where the head is unsure and loses 1 where it is sure."""
    from graft_train.calibrate.search import _threshold

    confidence = torch.linspace(0, 1, 401).numpy()
    gain = 1.0 - 2.0 * (confidence > 0.3)
    found = _threshold(-confidence, gain)
    assert found == pytest.approx(-0.3, abs=0.03)
    assert _threshold(-confidence, gain * 0 - 1) is None


def test_a_threshold_lies_between_measures_and_takes_equal_ones_together():
    from graft_train.calibrate.search import _threshold

    measure = np.array([3.0, 2.0, 3.0, 1.0, 2.0, np.nextafter(2.0, 3.0)])
    assert _threshold(measure, np.array([1.0, 1.0, 1.0, -9.0, 1.0, -0.5])) == 1.5
    # The best prefix by position would end within the threes, where no threshold can part them.
    assert _threshold(measure, np.array([5.0, 1.0, -6.0, -9.0, 1.0, 1.0])) == 1.5
    assert _threshold(np.full(4, 2.0), np.ones(4)) is None


def test_a_device_that_takes_twice_as_long_has_the_same_tau_and_half_the_speed(traces, replay):
    plan = plans(traces)["everything"]
    before = replay.run(plan)
    twice = replace(LATENCY, **{
        name: [[2 * t for t in row] for row in LATENCY.verify_ms] if name == "verify_ms" else
        [2 * t for t in value] if isinstance(value, list) else
        {source: 2 * t for source, t in value.items()} if isinstance(value, dict) else 2 * value
        for name, value in LATENCY.to_dict().items() if name.endswith("_ms")
    })  # fmt: skip
    assert Replay(traces, twice, BUDGET).run(plan) == (pytest.approx(before[0] / 2), before[1])
    assert replay.run(plan) == before


def test_rounds_that_begin_behind_every_continuation_are_none(traces, replay):
    visited = replay.visits(replay.outcome(best_eagle3(replay, WIDTHS)), 10**6)
    assert visited.dtype == np.int64
    assert not len(visited)


def test_paper_settings_scale_to_the_width_and_the_matrix(traces, replay):
    plan = best_paper(replay, WIDTHS, most_rank=3)
    assert {one.num_draft_tokens for one in plan.checkpoints} <= set(WIDTHS) | {1 + BEAM}
    assert plan.most_ranks("matrix") <= 4


def test_traces_survive_the_disk_and_refuse_other_weights(traces, tmp_path):
    made_of = {"target": "a", "head": "b"}
    traces.save(tmp_path / "traces.safetensors", made_of)
    loaded = read_traces(tmp_path / "traces.safetensors", made_of)
    assert torch.equal(loaded.logp_TC, traces.logp_TC)
    for name, source in traces.sources.items():
        assert loaded.sources[name].template == source.template
        assert all(torch.equal(column, getattr(loaded.sources[name], key)) for key, column in vars(source).items())
    with pytest.raises(GraftError, match=r"traced with another head \(b, now c\): give the settings .*or delete"):
        read_traces(tmp_path / "traces.safetensors", made_of | {"head": "c"})
    (tmp_path / "traces.safetensors").write_bytes(b"xx")
    with pytest.raises(GraftError, match="cannot be read"):
        read_traces(tmp_path / "traces.safetensors", made_of)


def test_a_raw_model_takes_proposers_at_their_word(traces):
    scores_TC = drafted_scores(traces, raw_acceptance(traces))
    likely_TC = traces.logp_TC > -5
    assert torch.allclose(scores_TC[likely_TC], traces.logp_TC[likely_TC], atol=2e-3)
