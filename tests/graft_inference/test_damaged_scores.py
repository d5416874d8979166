"""Whatever heads, matrices and policies score, the output is the target's: the worst that may happen is slow."""

import pytest
import torch

from graft_inference import METHODS
from graft_inference.decode.captured import CapturedRounds

from .recorded import RecordedGraphs
from .test_engine import prompt
from .tiny import learned_policy, tiny_engine, tiny_head, tiny_model, tiny_policy, told_policy

DAMAGE = {
    "overflows": lambda head: head.midlayer.mlp.down_proj.weight.data[0].fill_(3e38),
    "is infinite": lambda head: head.fc.weight.data.fill_(torch.inf),
    "is not a number": lambda head: head.norm.weight.data.fill_(torch.nan),
    "says one token's score is not a number": lambda head: head.lm_head.weight.data[5].fill_(torch.nan),
    "finds one token infinitely likely": lambda head: head.lm_head.weight.data[5].fill_(3e38),
}
POLICIES = {"quotas": tiny_policy, "learned": learned_policy, "shared noise": told_policy}


@pytest.fixture(scope="module")
def plain():
    """What the target alone says, by temperature."""
    engine = tiny_engine(tiny_model("llama"))
    return {
        temperature: engine.generate(prompt(9), 24, temperature, "autoregressive", seed=7).sequences.tolist()
        for temperature in (0.0, 1.0)
    }


def texts(engine, temperature):
    return {m: engine.generate(prompt(9), 24, temperature, m, seed=7).sequences.tolist() for m in METHODS}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_head_may_say_anything(plain, damage, policy, temperature):
    model = tiny_model("llama")
    head = tiny_head(model)
    DAMAGE[damage](head)
    engine = tiny_engine(model, POLICIES[policy](), head)
    assert texts(engine, temperature) == dict.fromkeys(METHODS, plain[temperature])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, -3.0, 60000.0])
def test_a_matrix_may_say_anything(plain, value, policy, temperature):
    engine = tiny_engine(tiny_model("llama"), POLICIES[policy]())
    engine.successors.probs_VK[::2] = value
    assert texts(engine, temperature) == dict.fromkeys(METHODS, plain[temperature])


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("policy", POLICIES)
def test_captured_rounds_stand_it_too(plain, policy, damage):
    model = tiny_model("llama")
    head = tiny_head(model)
    DAMAGE[damage](head)
    engine = tiny_engine(model, POLICIES[policy](), head)
    engine.captured = CapturedRounds(engine.target, engine.speculator, RecordedGraphs())
    out = engine.generate(prompt(9), 24)
    assert out.sequences.tolist() == plain[0.0]
    assert out.stats.captured == out.stats.rounds


def test_a_target_that_overflows_leaves_nothing_in_the_matrix():
    engine = tiny_engine(tiny_model("llama"))
    engine.successors.update(torch.tensor([3]), torch.full((1, 61), torch.nan))
    assert engine.successors.probs_VK[3].tolist() == [0.0] * 4
