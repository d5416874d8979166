"""Plans and policies: what is refused, what is written, and that what is made of a plan is a plan."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

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
from graft_inference.policy.fallback import fallback_plans
from graft_inference.policy.plan import ChainPlan
from graft_inference.template import check_template
from graft_inference.tree import drafted_nodes

from .test_tree_builder import models
from .tiny import learned_plan, learned_policy
from .trees import templates


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


SHARES = st.sampled_from([-1.0, 0.0, 0.3, 1.0])


@st.composite
def plans(draw) -> Plan:
    """Of any kind."""
    steps = sorted(draw(st.sets(st.integers(0, 9), min_size=1, max_size=4)))
    options = {"learns_accepted": draw(st.booleans()), "shares_noise": draw(st.booleans())}
    kind = draw(st.sampled_from([QuotaPlan, ScoredPlan, ChainPlan]))
    topk = 1 if kind is ChainPlan else draw(st.integers(1, 5))
    checkpoints: list[Checkpoint | QuotaCheckpoint] = []
    acceptance = draw(models())
    for step in steps:
        if kind is QuotaPlan:
            template, nodes = draw(templates()), draw(st.integers(0, drafted_nodes(topk, step)))
            quota = draw(st.integers(0, len(template)))
            checkpoints.append(QuotaCheckpoint(step, draw(SHARES), nodes, quota, template))
        else:
            nodes = draw(st.integers(1, 1 + drafted_nodes(topk, step) + acceptance.candidates))
            checkpoints.append(Checkpoint(step, draw(SHARES), nodes))
    if steps[-1] and not steps[0] and (kind is QuotaPlan or not acceptance.sources):
        del checkpoints[0]  # nothing would say whether to draft
    return kind(tuple(checkpoints), topk, **options, **({} if kind is QuotaPlan else {"acceptance": acceptance}))


@given(plans())
def test_what_a_plan_falls_back_to_are_cheaper_plans(plan):
    """Each is valid, asks for nothing that the plan does not ask for, and fits the buffers made for it."""
    for name, level in fallback_plans(plan).items():
        assert level.num_draft_tokens <= plan.num_draft_tokens
        assert level.num_steps <= plan.num_steps
        assert level.topk <= plan.topk
        assert max(map(level.depth, level.checkpoints)) <= max(map(plan.depth, plan.checkpoints))
        assert set(level.sources) <= set(plan.sources)
        assert all(level.most_ranks(source) <= plan.most_ranks(source) for source in plan.sources)
        if name == "narrowed":
            assert type(level) is type(plan)
            assert level.num_steps == -(-plan.num_steps // 2)
            assert level.num_draft_tokens <= -(-plan.num_draft_tokens // 2) + 1
        if name == "retrieval alone":
            assert not level.drafts
            assert level.sources == plan.sources


@given(plans())
def test_any_plan_survives_json(plan):
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


@given(st.integers(1, 20), st.integers(1, 128), st.integers(1, 12), st.integers(0, 9))
def test_the_papers_settings_scale_to_any_size(topk, nodes, steps, max_rank):
    policy = paper_policy(topk, nodes, steps, max_rank)
    for plan in (policy.graft, policy.eagle3, policy.retrieve):
        assert plan.num_draft_tokens <= nodes
        assert plan.num_steps <= steps
        assert plan.most_ranks("matrix") <= max_rank + 1
        for checkpoint in plan.checkpoints:
            check_template(checkpoint.template, "it")
    assert policy.graft.num_steps == policy.eagle3.num_steps == steps
    assert policy.retrieve.num_steps == 0


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
