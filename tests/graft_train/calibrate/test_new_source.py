"""A source of one's own is one class and one line: everything else follows from it."""

import json

import pytest
import torch

from graft_inference import Policy, ScoredPlan
from graft_inference.proposer import Proposal, TokenSource
from graft_inference.retrieval.sources import SOURCES
from graft_train.calibrate import calibrate, looked_up
from graft_train.calibrate.replay import Replay
from graft_train.calibrate.search import Allowed, best_learned
from graft_train.calibrate.traces import record_traces
from tests.graft_inference.tiny import tiny_engine, tiny_head, tiny_model

from .test_calibrate import BUDGET, LATENCY, NEW, WIDTHS, settings
from .test_stage import config_for, write_run


class Again(TokenSource):
    """The token will come again: proposes it over and over, the surer the oftener it has just been repeated."""

    name = "again"
    kinds = 3

    def __init__(self, tokens_S):
        self.last_K = torch.full((4,), -1)
        self.extend(tokens_S)

    @classmethod
    def open(cls, opening):
        return cls(opening.tokens_S)

    def propose(self, root_1, template, noise):
        tree = template.tree(root_1.expand(len(template)), None)
        repeated = (self.last_K == root_1).long().flip(0).cumprod(0).sum()
        return Proposal(tree, repeated[None].clamp(1, 3))

    def extend(self, tokens_A, count_1=None):
        self.last_K = torch.cat((self.last_K, tokens_A))[-4:]


@pytest.fixture(autouse=True)
def listed(monkeypatch):
    monkeypatch.setitem(SOURCES, Again.name, Again)


@pytest.fixture
def engine():
    model = tiny_model("llama", vocab_size=8)
    return tiny_engine(model, head=tiny_head(model, draft_vocab_size=8))


def test_it_traces_calibrates_and_serves_bit_exact_in_replay(engine):
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, 8, (length,), generator=generator) for length in (5, 9, 14)]
    replay = Replay(record_traces(engine, prompts, settings()), LATENCY_OF_THREE, BUDGET)
    model = looked_up(replay.fitted, 8)
    assert [source.name for source in model.sources] == ["matrix", "lookup", "again"]
    alone = best_learned(replay, type(model)((), model.sources[-1:]), Allowed(tuple(WIDTHS)))
    everything = best_learned(replay, model, Allowed(tuple(WIDTHS)))
    for plan in (alone, everything):
        assert isinstance(plan, ScoredPlan)
        found = [engine.generate(prompt, NEW, plan=plan) for prompt in prompts]
        plain = [engine.generate(prompt, NEW, method="autoregressive") for prompt in prompts]
        assert all(torch.equal(ours.sequences, own.sequences) for ours, own in zip(found, plain, strict=True))
        stats = [one.stats for one in found]
        length = sum(one.emitted - 1 for one in stats) / sum(one.rounds for one in stats)
        assert replay.run(plan)[1] == pytest.approx(length, abs=1e-9)
    assert alone.sources == ("again",)
    assert sum(engine.generate(prompt, NEW, plan=alone).stats.accepted["again"] for prompt in prompts)


LATENCY_OF_THREE = type(LATENCY)(**(LATENCY.to_dict() | {"source_ms": LATENCY.source_ms | {"again": 0.0}}))


def test_the_stage_races_and_prices_it(tmp_path):
    directory = calibrate(config_for(write_run(tmp_path)))
    latency = json.loads((directory / "latency.json").read_text())
    assert set(latency["source_ms"]) == set(SOURCES) == {"matrix", "lookup", "again"}
    report = json.loads((directory / "report.json").read_text())
    assert "again" in report["calibration_error"]
    Policy.from_dict(json.loads((directory / "policy.json").read_text()))
