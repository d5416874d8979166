"""Every family's greedy output is what `generate` gives with the model's own attention, or it is refused."""

import pytest
import torch
from transformers import (
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from graft_inference import METHODS, GraftEngine, GraftError
from graft_inference.bundle import Bundle
from graft_inference.retrieval.successor_matrix import SuccessorMatrix
from graft_inference.target.model import Target
from graft_inference.target.self_check import self_check

from .families import FAMILIES, WINDOW, family_model
from .test_engine import prompt
from .tiny import SIZES, VOCAB, tiny_engine, tiny_head, tiny_model, tiny_policy
from .trees import random_tree, token_path

SMALL = 8


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_output_equals_generate(family):
    model = family_model(family, seed=5 if "qwen2" in family else 3, vocab_size=SMALL)
    prompts = [prompt(length, seed, SMALL) for seed, length in enumerate((WINDOW - 3, 24))]
    expected = [model.generate(ids, max_new_tokens=24, do_sample=False).tolist() for ids in prompts]
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation("eager")
        assert [model.generate(ids, max_new_tokens=24, do_sample=False).tolist() for ids in prompts] == expected
    engine = tiny_engine(model, tiny_policy(0.5), tiny_head(model, draft_vocab_size=SMALL - 1))
    rounds = 0
    for ids, sequence in zip(prompts, expected, strict=True):
        for method in METHODS:
            out = engine.generate(ids, 24, method=method)
            assert out.sequences.tolist() == sequence, (method, ids.shape)
            rounds += out.stats.rounds
    assert rounds < 0.9 * 2 * 5 * 23  # or no branch of any tree was ever kept
    assert len({tuple(row[0][-24:]) for row in expected}) > 1


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("length", [1, WINDOW, 20])
def test_tree_logits_equal_linear_forwards(family, length):
    model = family_model(family)
    tree, text = random_tree(1, nodes=12), prompt(length, 2)[0]
    target = Target(model)
    cache = target.new_cache(64)
    target.prefill(text, cache)
    out = target.verify(tree, tree.ancestors(8), cache)
    target.release()
    for row in range(len(tree)):
        ids = torch.cat((text, tree.tokens_N[:1], torch.tensor(token_path(tree, row), dtype=torch.long)))[None]
        torch.testing.assert_close(out.logits_NV[row], model(ids).logits[0, -1], atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chunk", [1, 5, WINDOW])
def test_a_prompt_read_in_pieces_gives_the_same_logits(family, chunk):
    target = Target(family_model(family))
    text = prompt(20, 2)[0]
    whole = target.prefill(text, target.new_cache(32)).logits_NV
    cache = target.new_cache(32)
    pieces = [target.prefill(piece, cache).logits_NV for piece in text.split(chunk)]
    torch.testing.assert_close(torch.cat(pieces), whole, atol=2e-3, rtol=1e-3)
    last = target.prefill(text, target.new_cache(32), all_logits=False).logits_NV
    torch.testing.assert_close(last, whole[-1:], atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_self_check_passes_and_leaves_no_trace(family):
    model = family_model(family)
    state = torch.random.get_rng_state()
    target = Target(model)
    self_check(target)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.config._attn_implementation == "graft_tree"
    target.release()
    assert model.config._attn_implementation in ("sdpa", "eager")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_self_check_passes_in_half_precision(dtype):
    self_check(Target(family_model("gemma3").to(dtype)))


class ForgetsPositions(LlamaForCausalLM):
    """Counts rows itself, as models with learned positions do: wrong for the branches of a tree."""

    def forward(self, *args, position_ids=None, **kwargs):
        return super().forward(*args, **kwargs)


class HidesWindow(MistralForCausalLM):
    """Hides tokens by the mask alone, which tree attention never sees."""

    def forward(self, *args, visible=None, **kwargs):
        if visible is not None:
            bias, visible.bias = visible.bias, lambda window, *rest: bias(None, *rest)
            visible.first_key = lambda window: 0
        return super().forward(*args, visible=visible, **kwargs)


def check_refused(model, message, error=GraftError, **settings):
    """No engine comes of it, and the model is what it was: its own attention, no hooks, the same logits."""
    head = tiny_head(model)
    bundle = Bundle(head, tiny_policy(), SuccessorMatrix.empty(VOCAB, 4, torch.device("cpu")))

    def state():
        hooks = sum(len(module._forward_hooks) for module in model.modules())
        return model.config._attn_implementation, hooks, LlamaForCausalLM.forward(model, prompt(9)).logits.tolist()

    before = state()
    with pytest.raises(error, match=message):
        GraftEngine.from_bundle(bundle, model, packed=False, **settings)
    assert state() == before


def test_a_model_that_the_tree_does_not_fit_is_refused_by_the_self_check():
    for model in (ForgetsPositions(LlamaConfig(**SIZES)), HidesWindow(family_model("mistral-window").config)):
        for parameter in model.parameters():
            parameter.data.mul_(6 if parameter.dim() > 1 else 1)
        check_refused(model.eval(), f"{type(model).__name__} gives other logits .*check=False")


class Fails(LlamaForCausalLM):
    """Cannot take our caches, as RecurrentGemma; or is interrupted."""

    error: type[BaseException] = TypeError

    def forward(self, *args, visible=None, **kwargs):
        if visible is not None:
            raise self.error("unexpected")
        return super().forward(*args, **kwargs)


class HandsNothingOn(LlamaForCausalLM):
    """Its layers do not tell their attention what the model is called with, as Nemotron's."""

    def forward(self, *args, visible=None, **kwargs):
        return super().forward(*args, **kwargs)


class CannotSwitch(LlamaForCausalLM):
    """Has an attention of its own in some layers."""

    def set_attn_implementation(self, implementation):
        super().set_attn_implementation(implementation)
        if implementation == "graft_tree":
            raise ValueError("no such attention")


def test_whatever_fails_before_the_engine_is_there_names_the_family_and_leaves_the_model_as_it_was(monkeypatch):
    check_refused(Fails(LlamaConfig(**SIZES)).eval(), "Fails cannot be served: TypeError: unexpected")
    check_refused(HandsNothingOn(LlamaConfig(**SIZES)).eval(), "HandsNothingOn cannot be served: it does not hand on")
    check_refused(CannotSwitch(LlamaConfig(**SIZES)).eval(), "CannotSwitch cannot be served: ValueError: no such")
    check_refused(tiny_model("llama"), "prefill_chunk=0", prefill_chunk=0)
    check_refused(tiny_model("llama"), "captured=True needs a CUDA device", captured=True, check=False)
    monkeypatch.setattr(SuccessorMatrix, "to", lambda *_: torch.empty(0).view(2, 2))
    check_refused(tiny_model("llama"), "LlamaForCausalLM cannot be served: RuntimeError: shape", check=False)
    monkeypatch.setattr(Fails, "error", KeyboardInterrupt)
    check_refused(Fails(LlamaConfig(**SIZES)).eval(), "unexpected", KeyboardInterrupt)


def test_a_window_too_long_for_the_check_to_feel_must_still_be_applied():
    config = family_model("gemma3").config
    config.sliding_window = 64
    model = Gemma3ForCausalLM(config).eval()
    for layer in model.model.layers:
        layer.self_attn.sliding_window = None
    with pytest.raises(GraftError, match="hides their window of 64"):
        self_check(Target(model))


def test_a_window_that_only_the_models_own_mask_applies_is_refused():
    config = PhimoeConfig(**SIZES, num_local_experts=4, sliding_window=64)
    with pytest.raises(GraftError, match=r"PhimoeForCausalLM .* hides their window of 64"):
        self_check(Target(PhimoeForCausalLM(config).eval()))
    config.sliding_window = None
    self_check(Target(PhimoeForCausalLM(config).eval()))


def test_a_window_that_nobody_applies_may_stand_in_the_configuration():
    model = family_model("llama", sliding_window=64)
    assert model.config.sliding_window == 64
    self_check(Target(model))
    assert model.config.sliding_window == 64


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: Llama4ForCausalLM(Llama4TextConfig(**SIZES)), "Llama4.* kind chunked_attention"),
        (lambda: Qwen3NextForCausalLM(Qwen3NextConfig(**SIZES, num_experts=4)), "Qwen3Next.* kind linear_attention"),
        (lambda: GPT2LMHeadModel(GPT2Config(n_embd=8, n_head=2, n_layer=1, vocab_size=11)), "GPT2LMHeadModel"),
        (lambda: family_model("gemma3", use_bidirectional_attention=True), "Gemma3.* both directions"),
        (lambda: family_model("llama", max_position_embeddings=0), "Llama.* no max_position_embeddings"),
        (lambda: family_model("llama", num_kv_shared_layers=2), "Llama.* share keys and values"),
    ],
)
def test_families_that_cannot_work_are_refused_by_name(build, reason):
    model = build()
    before = model.config._attn_implementation
    with pytest.raises(GraftError, match=reason):
        Target(model)
    assert model.config._attn_implementation == before


def test_soft_capping_that_sdpa_leaves_out_is_applied_and_said():
    model = Gemma2ForCausalLM._from_config(family_model("gemma2").config, attn_implementation="sdpa").eval()
    with pytest.warns(UserWarning, match="soft-capping"):
        target = Target(model)
    self_check(target)


def test_rope_that_switches_is_served_up_to_the_switch():
    factors = [1.0] * 4
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": factors, "long_factor": [4.0] * 4}
    model = family_model("phi3", rope_parameters=rope, original_max_position_embeddings=32, vocab_size=SMALL)
    expected = model.generate(prompt(12, 0, SMALL), max_new_tokens=20, do_sample=False).tolist()
    engine = tiny_engine(model, tiny_policy(0.5), tiny_head(model, draft_vocab_size=SMALL - 1))
    for method in METHODS:
        assert engine.generate(prompt(12, 0, SMALL), 20, method=method).sequences.tolist() == expected
    with pytest.raises(GraftError, match="limit of 32 positions"):
        engine.generate(prompt(12, 0, SMALL), 21)


def test_a_model_that_serves_an_engine_refuses_other_callers():
    target = Target(tiny_model("llama"))
    with pytest.raises(GraftError, match=r"engine.target.release\(\)"):
        target.model(prompt(3))


@pytest.mark.parametrize("method", METHODS)
def test_learned_positions_end_where_the_text_does(method):
    """Trees reach beyond the last position that there is."""
    torch.manual_seed(3)
    ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "num_hidden_layers": 4}
    config = OPTConfig(**sizes, **ends, num_attention_heads=4, max_position_embeddings=40, dropout=0.0)
    model = OPTForCausalLM(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(6)
    expected = model.generate(prompt(20), max_new_tokens=20, do_sample=False)
    assert tiny_engine(model).generate(prompt(20), 20, method=method).sequences.tolist() == expected.tolist()
