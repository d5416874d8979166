"""Replays against the engine itself, and the search's guarantees."""

import pytest
import torch

from graft_inference import Plan, Stage
from graft_train.calibrate.latency import Latency
from graft_train.calibrate.search import Replay, best_eagle3, best_graft, best_retrieve
from graft_train.calibrate.traces import record_traces
from tests.graft_inference.tiny import tiny_engine, tiny_head, tiny_model

BEAM, PASSES, NEW = 3, 4, 40
WIDTHS = [1, 2, 4, 8, 12]
LATENCY = Latency(WIDTHS, [1.0, 1.1, 1.3, 1.9, 2.6], [0.0, 0.2, 0.4, 0.6, 0.8], [0.05, 0.1], 0.0)


@pytest.fixture(scope="module")
def engine():
    # Few tokens, so that a random head is often right.
    model = tiny_model("llama", vocab_size=8)
    return tiny_engine(model, head=tiny_head(model, draft_vocab_size=8))


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 8, (length,), generator=generator) for length in (5, 9, 14)]


@pytest.fixture(scope="module")
def replay(engine, prompts):
    traces = record_traces(engine, prompts, NEW, BEAM, PASSES, retrieval_depth=4)
    return Replay(traces, LATENCY, WIDTHS, BEAM)


@pytest.mark.parametrize(
    "plan",
    [
        Plan((Stage(1, drafted=2),), BEAM),
        Plan((Stage(3, drafted=7),), BEAM),
        Plan((Stage(1, 0.35, drafted=3), Stage(2, 0.2, drafted=5), Stage(4, drafted=9)), BEAM),
    ],
    ids=["one pass", "tree", "pruned at two checkpoints"],
)
def test_replay_reproduces_the_engines_tau(engine, prompts, replay, plan):
    stats = [engine.generate(prompt, NEW, plan=plan).stats for prompt in prompts]
    tau = sum(s.emitted - 1 for s in stats) / sum(s.rounds for s in stats)
    assert tau > 1.1, "the tiny head must be right now and then for this to mean anything"
    assert replay.run(plan)[1] == pytest.approx(tau, abs=1e-9)


def test_replay_counts_retrieved_nodes_by_rank_path(replay):
    """The matrix of a row changes only where the target read its token: check against the recorded ranks."""
    template = ((0,), (0, 0), (1,))
    accepted = replay.accepted(Stage(0, retrieved=3, template=template))
    for row, count in enumerate(accepted):
        ranks = replay.traces.successor_rank_TD[row].tolist()
        expected = 2 if ranks[:2] == [0, 0] else 1 if ranks[0] in (0, 1) else 0
        assert count == min(expected, replay.traces.remaining_T[row] - 1)


def test_time_is_the_sum_of_the_rounds(replay):
    plan = Plan((Stage(2, drafted=3),), BEAM)
    speed, tau = replay.run(plan)
    assert speed == pytest.approx(1e3 * tau / (0.4 + 0.05 + 1.3))


def test_templates_are_prefix_closed(replay):
    for template in (replay.template(0, 1.0), replay.template(1, 0.3)):
        seen = {()}
        for path in template:
            assert path[:-1] in seen
            seen.add(path)


def test_graft_is_never_predicted_slower_than_its_special_cases(replay):
    graft, eagle3 = best_graft(replay, checkpoints=2), best_eagle3(replay)
    assert replay.run(graft)[0] >= replay.run(eagle3)[0]
    assert all(stage.rows <= WIDTHS[-1] for stage in (*graft.stages, *best_retrieve(replay).stages))


def test_costly_drafting_is_stopped_early(replay):
    """With passes at a hundred times the price, no plan should run more than one."""
    dear = Latency(WIDTHS, LATENCY.verify_ms, [0.0, 0.2, 40.0, 80.0, 120.0], [0.05, 0.1], 0.0)
    replay = Replay(replay.traces, dear, WIDTHS, BEAM)
    assert best_graft(replay, 2).max_passes == 1
    assert best_eagle3(replay).max_passes == 1
