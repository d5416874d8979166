"""A packed product is the stock product. Which is faster depends on the machine, so tests decide it."""

from types import MethodType

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from graft_inference import METHODS
from graft_inference.target import packed_linear
from graft_inference.target.model import Target
from graft_inference.target.packed_linear import _packable, pack_linears, pack_target, packs

from .families import FAMILIES, family_model
from .tiny import VOCAB, tiny_engine, tiny_head, tiny_model

needs_operator = pytest.mark.skipif(not packed_linear._available(), reason="this build has no packed product")

BF16 = pytest.mark.skipif(not packs(torch.bfloat16), reason="this CPU packs no bfloat16")


@pytest.fixture
def always(monkeypatch):
    """Every packed product counts as the faster one."""
    monkeypatch.setattr(packed_linear, "_seconds", lambda products, layer: float(products[0] == layer.forward))


@pytest.fixture
def never(monkeypatch):
    monkeypatch.setattr(packed_linear, "_seconds", lambda products, layer: 1.0)


@needs_operator
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=BF16)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (1, 9), (3, 4), (1, 70)], ids=str)
def test_packed_product_equals_the_stock_one(always, dtype, bias, shape):
    torch.manual_seed(0)
    layer = nn.Linear(48, 37, bias=bias, dtype=dtype).requires_grad_(False)
    input_BSH = torch.randn(*shape, 48, dtype=dtype)
    expected = F.linear(input_BSH.double(), layer.weight.double(), layer.bias.double() if bias else None)
    assert pack_linears(nn.Sequential(layer)) == ["0"]
    with torch.inference_mode():
        out = layer(input_BSH)
    assert out.dtype == dtype
    assert out.shape == (*shape, 37)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)


@needs_operator
def test_packing_a_model_leaves_its_output_and_its_weights(always):
    model = tiny_model("llama", tie_word_embeddings=True)
    ids = torch.arange(11)[None]
    expected = model(ids).logits
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    linears = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    assert pack_linears(model) == linears
    torch.testing.assert_close(model(ids).logits, expected, atol=1e-4, rtol=1e-4)
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


@needs_operator
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_that_read_the_same_states_are_one_product(always, family):
    target = Target(family_model(family))
    prompts = [torch.arange(length) % VOCAB for length in (1, 6)]

    def logits():
        return [target.prefill(tokens_S, target.new_cache(8)).logits_NV for tokens_S in prompts]

    with torch.inference_mode():
        expected, linears = logits(), _packable(target.model)
        assert pack_target(target) == [name for name, layer in target.model.named_modules() if layer in linears]
        for _ in range(2):  # nothing of a pass is left for the next
            torch.testing.assert_close(logits(), expected, atol=1e-4, rtol=1e-4)
    sets = {id(layer.forward.func.__self__) for layer in target.model.modules() if _is_part(layer)}
    fused = {"phi3": 0}  # its projections are one layer already
    assert len(sets) >= fused.get(family, target.config.num_hidden_layers)


def _is_part(layer) -> bool:
    return hasattr(layer, "forward") and isinstance(getattr(layer.forward, "func", None), MethodType)


@needs_operator
def test_parts_are_those_of_the_tensor_that_a_layer_is_called_with(always):
    torch.manual_seed(0)
    first, second = nn.Linear(6, 4), nn.Linear(6, 3)
    weights = [first.weight.clone(), second.weight.clone()]
    assert pack_linears(nn.Sequential(first, second), [[first, second]]) == ["0", "1"]
    one, other = torch.randn(2, 2, 5, 6)
    with torch.inference_mode():
        for layer, states in ((first, one), (second, other), (first, other), (first, other), (second, one)):
            weight = weights[layer is second]
            torch.testing.assert_close(layer(states), F.linear(states, weight, layer.bias), atol=1e-5, rtol=1e-5)


@needs_operator
def test_two_threads_that_take_turns_within_a_product_get_their_own_parts(always, monkeypatch):
    torch.manual_seed(0)
    first, second = nn.Linear(6, 4), nn.Linear(6, 3)
    one, other = torch.randn(2, 1, 5, 6)
    real, others_turn = packed_linear._product, []

    def interrupted(weight_OH, bias_O):
        product = real(weight_OH, bias_O)

        def run(states):
            if states is one and not others_turn:  # the other thread begins before this product is done
                others_turn.append(first(other))
            return product(states)

        return run

    expected = [[F.linear(states, layer.weight, layer.bias) for layer in (first, second)] for states in (one, other)]
    monkeypatch.setattr(packed_linear, "_product", interrupted)
    pack_linears(nn.Sequential(first, second), [[first, second]])
    with torch.inference_mode():
        found_first = first(one)
        found = [[found_first, None], [others_turn[0], second(other)]]
        found[0][1] = second(one)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@needs_operator
def test_layers_between_which_their_states_are_changed_in_place_share_nothing(always):
    model = tiny_model("llama")

    def changing(mlp, states_BSH):
        gate = mlp.gate_proj(states_BSH)
        states_BSH += 1
        return mlp.down_proj(gate * mlp.up_proj(states_BSH))

    for layer in model.model.layers:
        layer.mlp.forward = MethodType(changing, layer.mlp)
    target = Target(model)
    with torch.inference_mode():
        expected = target.prefill(torch.arange(6), target.new_cache(8)).logits_NV
        assert pack_target(target)
        found = target.prefill(torch.arange(6), target.new_cache(8)).logits_NV
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert not any(_is_part(layer.mlp.up_proj) for layer in model.model.layers)
    assert all(_is_part(layer.self_attn.q_proj) for layer in model.model.layers)


@needs_operator
def test_a_model_that_is_packed_again_computes_the_same(always):
    target = Target(tiny_model("llama"))
    with torch.inference_mode():
        expected = target.prefill(torch.arange(6), target.new_cache(8)).logits_NV
        assert pack_target(target) == pack_target(target)
        found = target.prefill(torch.arange(6), target.new_cache(8)).logits_NV
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@needs_operator
def test_looking_who_shares_leaves_no_hook_and_draws_no_random_number(always, monkeypatch):
    target = Target(tiny_model("llama"))
    before = torch.get_rng_state()
    pack_target(target)
    assert torch.equal(torch.get_rng_state(), before)
    monkeypatch.setattr(target.model, "forward", lambda **inputs: target.model.lm_head(torch.zeros(3)))
    with pytest.raises(RuntimeError):
        pack_target(target)
    assert not any(layer._forward_pre_hooks for layer in target.model.modules())


@BF16
@needs_operator
@pytest.mark.parametrize("method", METHODS)
def test_every_token_in_bf16_is_the_targets_choice_but_for_rounding(always, method):
    """A wider pass rounds otherwise, and near ties may fall differently: so greedy text need not be the same."""
    model = tiny_model("llama").to(torch.bfloat16)
    engine = tiny_engine(model, head=tiny_head(model).to(torch.bfloat16))
    assert pack_linears(model)
    assert pack_linears(engine.head)
    tokens_S = engine.generate(torch.arange(9), 40, method=method).sequences[0]
    with engine.target.own_attention() as plain, torch.inference_mode():
        logits_NV = plain(tokens_S[None]).logits[0, 8:-1].float()
    chosen_N = logits_NV.gather(1, tokens_S[9:, None])[:, 0]
    assert logits_NV.isfinite().all()
    rounding = 0.03 * logits_NV.abs().max()
    assert (logits_NV.max(dim=1).values - chosen_N).max() < rounding
    assert (logits_NV.max(dim=1).values - logits_NV.median(dim=1).values).min() > 2 * rounding


@needs_operator
def test_layers_that_packing_does_not_speed_up_stay_as_they_are(never):
    model = tiny_model("llama")
    assert pack_linears(model) == []
    assert not any("forward" in vars(module) for module in model.modules())


@needs_operator
def test_each_shape_is_timed_once(monkeypatch):
    timed = []
    monkeypatch.setattr(packed_linear, "_seconds", lambda products, layer: timed.append(layer.weight.shape) or 1.0)
    pack_linears(nn.Sequential(nn.Linear(8, 4), nn.Linear(8, 4), nn.Linear(4, 8)))
    assert len(timed) == 2 * 2  # both products of both shapes


@needs_operator
def test_subclasses_keep_their_own_product(always):
    class Doubled(nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    layer = Doubled(8, 4)
    assert pack_linears(nn.Sequential(layer)) == []


def test_without_the_operator_nothing_changes(monkeypatch, always):
    monkeypatch.setattr(packed_linear, "_available", lambda: False)
    model = tiny_model("llama")
    assert pack_linears(model) == []
    assert not any("forward" in vars(module) for module in model.modules())
