"""A pass over a tree equals one pass per path."""

import pytest
import torch

from graft_inference import GraftError
from graft_inference.target.model import Target

from .test_kv_cache import commit_branch
from .tiny import tiny_model
from .trees import random_tree, token_path


@pytest.mark.parametrize("length", [1, 12])
def test_tree_logits_and_taps_equal_linear_forwards(model, length):
    torch.manual_seed(0)
    prompt = torch.randint(0, 61, (length,))
    tree = random_tree(1, nodes=12)
    target = Target(model, (0, 1, 3))
    cache = target.new_cache(64)
    target.prefill(prompt, cache)
    out = target.verify(tree, tree.ancestors(8), cache)
    target.release()
    for row in range(len(tree)):
        path = [int(tree.tokens_N[0]), *token_path(tree, row)]
        ids = torch.cat((prompt, torch.tensor(path)))[None]
        plain = model(ids, output_hidden_states=True)
        taps = torch.cat([plain.hidden_states[layer + 1][0, -1] for layer in (0, 1)])
        assert torch.allclose(out.logits_NV[row], plain.logits[0, -1], atol=2e-4, rtol=1e-4)
        assert torch.allclose(out.aux_NE[row][: len(taps)], taps, atol=2e-4, rtol=1e-4)


def test_committed_branch_equals_a_linear_cache(model):
    torch.manual_seed(0)
    prompt = torch.randint(0, 61, (9,))
    tree = random_tree(2, nodes=12)
    deepest = int(tree.depths_N.argmax())
    path, row = [], deepest
    while row:
        path.insert(0, row)
        row = int(tree.parents_N[row])
    target = Target(model)
    cache, linear = target.new_cache(64), target.new_cache(64)
    target.prefill(prompt, cache)
    target.verify(tree, tree.ancestors(12), cache)
    commit_branch(cache, [0, *path])
    target.prefill(torch.cat((prompt, tree.tokens_N[torch.tensor([0, *path])])), linear)
    assert cache.length == linear.length
    for ours, plain in zip(cache.layers, linear.layers, strict=True):
        assert torch.allclose(ours.keys[:, :, : cache.length], plain.keys[:, :, : cache.length], atol=1e-4)
        assert torch.allclose(ours.values[:, :, : cache.length], plain.values[:, :, : cache.length], atol=1e-4)


def test_release_gives_the_model_back(model):
    before = model.config._attn_implementation
    target = Target(model, (0, 1, 3))
    assert model.config._attn_implementation != before
    target.release()
    assert model.config._attn_implementation == before
    assert not any(layer._forward_hooks for layer in model.get_decoder().layers)


def test_a_head_that_reads_a_layer_too_deep_is_refused():
    with pytest.raises(GraftError, match=r"aux_layer_ids=\[0, 1, 7\]: the target has layers 0\.\.3"):
        Target(tiny_model("llama"), (0, 1, 7))
