import json

import pytest

from graft_inference import Checkpoint, GraftError, Policy, QuotaCheckpoint, QuotaPlan, paper_policy
from graft_inference.policy.plan import depth_template

from .tiny import learned_plan, learned_policy


def test_round_trip_through_json():
    for policy in (paper_policy(), learned_policy()):
        assert Policy.from_dict(json.loads(json.dumps(policy.to_dict()))) == policy


def test_paper_settings_follow_table_1():
    plan = paper_policy().graft
    assert [(stage.name, stage.drafted, stage.retrieved) for stage in plan.checkpoints] == [
        ("d0", 8, 52),
        ("d1", 24, 36),
        ("d5", 40, 20),
        ("d8", 60, 0),
    ]


def test_depth_template_is_prefix_closed_with_the_given_counts():
    counts = (8, 10, 8, 6, 5, 4, 4, 4, 3)
    template = depth_template(counts)
    seen = set()
    for path in template:
        assert len(path) == 1 or path[:-1] in seen
        seen.add(path)
    assert [sum(len(path) == depth for path in template) for depth in range(1, 10)] == list(counts)
    assert (0,) * 9 in seen


def test_prune_leaves_retrieved_rows_empty():
    prune = paper_policy().plan("prune")
    assert not prune.retrieves
    assert [stage.threshold for stage in prune.checkpoints] == [
        stage.threshold for stage in paper_policy().graft.checkpoints
    ]


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ((QuotaCheckpoint(2), QuotaCheckpoint(1)), "rising passes"),
        ((QuotaCheckpoint(1, drafted=11),), "lower drafted"),
        ((QuotaCheckpoint(2, drafted=64),), "over the budget of 64"),
        ((QuotaCheckpoint(1, drafted=2, retrieved=3, template=((0,),)),), "lower retrieved"),
        ((QuotaCheckpoint(0), QuotaCheckpoint(1, drafted=2)), "only a plan that scores"),
        ((Checkpoint(1, num_draft_tokens=4),), "a width and a plan's scale belong together"),
    ],
)
def test_impossible_plans_are_refused(stages, message):
    with pytest.raises(GraftError, match=message):
        QuotaPlan(stages)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"width": -1}, "width must be a count"),
        ({"width": 4, "drafted": 1}, "either a width or rows"),
    ],
)
def test_impossible_stages_are_refused(values, message):
    with pytest.raises(GraftError, match=message):
        QuotaCheckpoint(1, **values)


def test_a_scale_must_reach_as_deep_as_its_plan():
    with pytest.raises(GraftError, match="knows 1 depths, its template has 2"):
        Scale(retrieved=((1.0, 0.0),), ranks=(0.0,), template=((0,), (0, 0)))
    with pytest.raises(GraftError, match="knows 1 drafted depths, the plan 2"):
        QuotaPlan((Checkpoint(2, num_draft_tokens=4),), scale=Scale(drafted=((1.0, 0.0),)))
    with pytest.raises(GraftError, match="only 3 drafted and 0 retrieved candidates"):
        QuotaPlan((Checkpoint(1, num_draft_tokens=5),), topk=3, scale=Scale(drafted=((1.0, 0.0),)))


def test_prune_of_a_learned_plan_keeps_its_stages():
    plan = learned_plan()
    assert plan.without_retrieval().checkpoints == plan.checkpoints
    assert plan.without_retrieval().drafted_only
