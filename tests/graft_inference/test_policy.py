import json

import pytest

from graft_inference import (
    AcceptanceModel,
    Checkpoint,
    GraftError,
    Plan,
    Policy,
    QuotaCheckpoint,
    QuotaPlan,
    ScoredPlan,
    paper_policy,
)
from graft_inference.template import depth_template

from .tiny import learned_plan, learned_policy


def test_round_trip_through_json():
    for policy in (paper_policy(), learned_policy()):
        assert Policy.from_dict(json.loads(json.dumps(policy.to_dict()))) == policy


def test_paper_settings_follow_table_1():
    plan = paper_policy().graft
    assert [(checkpoint.name, checkpoint.drafted, checkpoint.retrieved) for checkpoint in plan.checkpoints] == [
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


@pytest.mark.parametrize(
    ("checkpoints", "message"),
    [
        ((QuotaCheckpoint(2), QuotaCheckpoint(1)), "rising steps"),
        ((), "rising steps"),
        ((QuotaCheckpoint(1, drafted=11),), "lower drafted"),
        ((QuotaCheckpoint(12, drafted=1024),), "a tree of 1025 nodes is over the limit of 1024"),
        ((QuotaCheckpoint(0), QuotaCheckpoint(1, drafted=2)), "only a plan that scores"),
        ((Checkpoint(1, num_draft_tokens=4),), "checkpoints=.* must be"),
    ],
)
def test_impossible_plans_are_refused(checkpoints, message):
    with pytest.raises(GraftError, match=message):
        QuotaPlan(checkpoints)


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (Checkpoint, {"num_draft_tokens": -1}, "num_draft_tokens must be a count"),
        (Checkpoint, {"num_draft_tokens": 0}, "num_draft_tokens >= 1"),
        (QuotaCheckpoint, {"drafted": -1}, "drafted must be a count"),
        (QuotaCheckpoint, {"retrieved": 3, "template": ((0,),)}, "lower retrieved"),
        (QuotaCheckpoint, {"template": ((0, 0),)}, "the parent of"),
    ],
)
def test_impossible_checkpoints_are_refused(kind, values, message):
    with pytest.raises(GraftError, match=message):
        kind(1, **values)


def test_an_acceptance_model_must_reach_as_deep_and_as_wide_as_its_plan():
    drafted = AcceptanceModel(drafted=((1.0, 0.0),))
    with pytest.raises(GraftError, match="knows 1 drafted depths, the plan 2"):
        ScoredPlan((Checkpoint(2, num_draft_tokens=4),), acceptance=drafted)
    with pytest.raises(GraftError, match="only 3 candidates and the root"):
        ScoredPlan((Checkpoint(1, num_draft_tokens=5),), topk=3, acceptance=drafted)
    with pytest.raises(GraftError, match="only a plan that asks a source can begin"):
        ScoredPlan((Checkpoint(0), Checkpoint(1, num_draft_tokens=4)), topk=3, acceptance=drafted)


@pytest.mark.parametrize("plan", [paper_policy().graft, learned_plan()], ids=["quotas", "scores"])
def test_a_plan_survives_json(plan):
    values = json.loads(json.dumps(plan.to_dict()))
    assert Plan.from_dict(values) == plan
    assert type(Plan.from_dict(values)) is type(plan)
    assert values["kind"] == ("scores" if isinstance(plan, ScoredPlan) else "quotas")
    for damage in ({"kind": "best"}, {"kind": None}, {"kind": "scores" if values["kind"] == "quotas" else "quotas"}):
        with pytest.raises(GraftError, match=r"not a plan of a graft\.json"):
            Plan.from_dict(values | damage)
    for name in values:
        with pytest.raises(GraftError, match=rf"not a plan of a graft\.json .*{name}"):
            Plan.from_dict({key: value for key, value in values.items() if key != name})
    assert values == json.loads(json.dumps(plan.to_dict())), "what is read is left as it was"
