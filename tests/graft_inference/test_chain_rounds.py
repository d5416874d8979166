"""Rounds of chains for other engines make just the chains that our own engine makes."""

import json
from dataclasses import replace

import pytest
import torch

from graft_inference import AcceptanceModel, ChainPlan, Checkpoint, GraftError, Plan, ScoredPlan, SourceModel
from graft_inference.integrations.chains import ChainRounds
from graft_inference.retrieval.sources import SOURCES
from graft_inference.template import chain
from graft_inference.tree import Source

from .tiny import tiny_engine, tiny_head, tiny_model
from .tiny_bundle import tiny_tokenizer, write_bundle, write_target

LOOKUP = SourceModel("lookup", chain(6), (), ((-0.4,) * 6,) * SOURCES["lookup"].kinds, (0.0,))
MATRIX = SourceModel("matrix", chain(3), (1.0,) * 3, ((-0.5,) * 3,), (0.0,))
BOTH = AcceptanceModel(((1.0, 0.0),) * 4, (MATRIX, LOOKUP))
EVERYTHING = ChainPlan(
    (Checkpoint(0, 1.4, 7), Checkpoint(1, 0.35, 3), Checkpoint(2, 0.2, 5), Checkpoint(4, 0.0, 6)), acceptance=BOTH
)
PLANS = {
    "everything": EVERYTHING,
    "always drafts": replace(EVERYTHING, checkpoints=EVERYTHING.checkpoints[1:]),
    "head alone": ChainPlan((Checkpoint(1, 0.35, 2), Checkpoint(4, 0.0, 5)), acceptance=replace(BOTH, sources=())),
    "sources alone": EVERYTHING.without_drafting(),
    "nothing": ChainPlan((Checkpoint(0),)),
}


@pytest.fixture(scope="module")
def engine():
    model = tiny_model("llama", vocab_size=8)
    engine = tiny_engine(model, head=tiny_head(model, draft_vocab_size=8))
    engine.retrieval_scope = "frozen"
    return engine


def recorded_rounds(engine, prompts, plan, monkeypatch):
    """(texts, drafted trees, checkpoints, chains) of every round of prompts that our engine decodes together."""
    rounds, build = [], engine.speculator.build

    def watched(requests, drafts):
        chosen = build(requests, drafts)
        texts = [one.sources["lookup"].text_S for one in requests if "lookup" in one.sources]
        rounds.append(([text[text >= 0].long() for text in texts], drafts, chosen))
        return chosen

    monkeypatch.setattr(engine.speculator, "build", watched)
    for prompt in prompts:
        engine.generate(prompt, 30, plan=plan)
    return rounds


@pytest.mark.parametrize("name", ["everything", "always drafts", "sources alone"])
def test_a_round_stops_and_chooses_as_the_engine_does(engine, monkeypatch, name):
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, 8, (length,), generator=generator) for length in (5, 9, 14)]
    plan = PLANS[name]
    rounds = ChainRounds(plan, {"matrix": engine.successors})
    checkpoints = set()
    for (text_S,), [(stopped, drafted)], [(_, tree)] in recorded_rounds(engine, prompts, plan, monkeypatch):
        one = rounds.begin([text_S, None], most=9)
        steps = (drafted.logp_N - drafted.logp_N[drafted.parents_N])[1:]
        for token, logp in zip(drafted.tokens_N[1:], steps, strict=True):
            assert one.is_drafting
            one.deepen(torch.stack((token, token)), torch.stack((logp, logp)))
        assert not one.is_drafting
        assert one.chains() == [tree.tokens_N[tree.sources_N > Source.ROOT].tolist(), []]
        checkpoints.add(stopped.name)
    assert checkpoints == {checkpoint.name for checkpoint in plan.checkpoints}, "each way out of a round was taken"


def test_requests_of_a_round_stop_when_each_is_unsure():
    one = ChainRounds(PLANS["head alone"], {}).begin([torch.tensor([3]), None, torch.tensor([4])], most=9)
    one.deepen(torch.tensor([1, 1, 2]), torch.tensor([0.9, 0.9, 0.1]).log())
    assert one.is_drafting
    for token in (5, 6, 7):
        one.deepen(torch.tensor([token] * 3), torch.tensor([0.9] * 3).log())
    assert not one.is_drafting
    assert one.chains() == [[1, 5, 6, 7], [], [2]]


@pytest.mark.parametrize(("most", "drafted"), [(0, 0), (1, 1), (3, 3), (4, 4)])
def test_no_chain_is_longer_than_the_engine_verifies(most, drafted):
    plan = PLANS["head alone"]
    one = ChainRounds(plan, {}).begin([torch.tensor([3])], most)
    for token in range(drafted):
        assert one.is_drafting
        one.deepen(torch.tensor([token]), torch.tensor([0.9]).log())
    assert not one.is_drafting
    assert one.chains() == [list(range(drafted))]


def test_a_plan_of_nothing_proposes_nothing():
    one = ChainRounds(PLANS["nothing"], {}).begin([torch.tensor([3, 3, 3, 3])], most=4)
    assert not one.is_drafting
    assert one.chains() == [[]]


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_a_plan_of_chains_is_what_was_written(plan):
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def test_a_chain_has_one_token_after_the_other():
    with pytest.raises(GraftError, match="topk=2 must be 1"):
        replace(EVERYTHING, topk=2)


@pytest.fixture
def bundle(tmp_path):
    """A bundle of chains, and the configuration of its target."""
    (tmp_path / "bundle").mkdir()
    directory = write_bundle(tmp_path / "bundle", write_target(tmp_path / "target"))
    write_plan(directory, EVERYTHING)
    return directory, tiny_model("llama").config


def write_plan(bundle, plan):
    graft = json.loads((bundle / "graft.json").read_text())
    graft["policy"]["graft"] = plan.to_dict()
    (bundle / "graft.json").write_text(json.dumps(graft))


def test_a_bundle_of_chains_is_read(bundle):
    directory, config = bundle
    rounds = ChainRounds.of_bundle(str(directory), config, tiny_tokenizer(), most=EVERYTHING.length)
    assert rounds.plan == EVERYTHING
    assert not rounds.without_drafting().plan.drafts
    assert EVERYTHING.length == 6


def test_a_bundle_that_makes_no_chains_is_refused(bundle):
    directory, config = bundle
    with pytest.raises(GraftError, match="chains of at most 6 tokens"):
        ChainRounds.of_bundle(str(directory), config, None, most=7)
    with pytest.raises(GraftError, match="tokenizer is not the one"):
        ChainRounds.of_bundle(str(directory), config, tiny_tokenizer("<end>"), most=6)
    with pytest.raises(GraftError, match="wants a target with vocab_size"):
        ChainRounds.of_bundle(str(directory), tiny_model("llama", vocab_size=8).config, None, most=6)
    write_plan(directory, PLANS["nothing"])
    with pytest.raises(GraftError, match=r"is plain decoding, .*start the engine without speculation"):
        ChainRounds.of_bundle(str(directory), config, None, most=1)
    write_plan(directory, ScoredPlan((Checkpoint(2, num_draft_tokens=4),), 2, acceptance=BOTH))
    with pytest.raises(GraftError, match=r"policy\.kind=chain policy\.topk=1"):
        ChainRounds.of_bundle(str(directory), config, None, most=2)
    (directory / "graft.json").unlink()
    with pytest.raises(GraftError, match="a head without a policy"):
        ChainRounds.of_bundle(str(directory), config, None, most=2)
