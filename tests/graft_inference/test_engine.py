"""Losslessness: whatever is proposed, the target's own output comes out."""

import pytest
import torch
from graft_inference import METHODS, GraftError

from .tiny import VOCAB, tiny_engine, tiny_head, tiny_model, tiny_policy


def prompt(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, VOCAB, (1, length), generator=torch.Generator().manual_seed(seed))


def greedy_reference(model, input_ids, max_new_tokens):
    implementation = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    out = model.generate(input_ids, max_new_tokens=max_new_tokens, do_sample=False)
    model.set_attn_implementation(implementation)
    return out


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("length", [1, 2, 17])
def test_greedy_output_equals_generate(model, method, length):
    engine = tiny_engine(model)
    input_ids = prompt(length, seed=length)
    expected = greedy_reference(model, input_ids, 40)
    out = engine.generate(input_ids, max_new_tokens=40, method=method)
    assert out.sequences.tolist() == expected.tolist()
    assert out.stats.emitted == 40
