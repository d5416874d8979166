"""Every ready-made setting, on a tiny random target of the same family and as many layers."""

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from graft_inference import GraftError
from graft_train.config.head import HeadTrainConfig
from graft_train.data.states import PackedTarget
from graft_train.distill.batches import collate, to_tensors
from graft_train.distill.eagle3.head import head_config, new_head
from graft_train.distill.eagle3.layout import make_layout
from graft_train.distill.eagle3.loss import distillation_loss, taught_positions
from graft_train.distill.eagle3.unroll import unroll
from graft_train.distill.families import FAMILIES as FAMILY_OF_HEADS
from graft_train.distill.teacher import final_state_teacher
from tests.graft_train.test_config import composed

from .pair import VOCAB, samples

CONF = Path(__file__).parents[3] / "conf"
TARGETS = sorted(path.stem for path in (CONF / "target").glob("*.yaml"))
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": 0,
    "bos_token_id": None,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
LLAMA_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
FAMILIES = {
    "llama3_1_8b": lambda: LlamaConfig(**SIZES, num_hidden_layers=32, rope_parameters=LLAMA_ROPE),
    "llama3_1_70b": lambda: LlamaConfig(**SIZES, num_hidden_layers=80, rope_parameters=LLAMA_ROPE),
    "smollm2": lambda: LlamaConfig(**SIZES, num_hidden_layers=30, tie_word_embeddings=True),
    "qwen3_8b": lambda: Qwen3Config(**SIZES, num_hidden_layers=36),
    "qwen3_32b": lambda: Qwen3Config(**SIZES, num_hidden_layers=64),
    "qwen3_30b_a3b": lambda: Qwen3MoeConfig(**SIZES, **EXPERTS, num_hidden_layers=48),
    "qwen3_235b_a22b": lambda: Qwen3MoeConfig(**SIZES, **EXPERTS, num_hidden_layers=94),
    "mistral_7b": lambda: MistralConfig(**SIZES, num_hidden_layers=32, sliding_window=None),
    # Windows shorter than the samples, so that they matter.
    "gemma3_12b": lambda: Gemma3TextConfig(**SIZES, num_hidden_layers=48, sliding_window=4, query_pre_attn_scalar=4),
    "gpt_oss_20b": lambda: GptOssConfig(
        **SIZES, num_hidden_layers=24, sliding_window=4, num_local_experts=4, num_experts_per_tok=2
    ),
}


# EAGLE-3's choice: its code taps what enters layers 2, n // 2 and n - 3.
TAPPED = {
    "llama3_1_8b": (1, 15, 28),
    "llama3_1_70b": (1, 39, 76),
    "smollm2": (1, 14, 26),
    "qwen3_8b": (1, 17, 32),
    "qwen3_32b": (1, 31, 60),
    "qwen3_30b_a3b": (1, 23, 44),
    "qwen3_235b_a22b": (1, 46, 90),
    "mistral_7b": (1, 15, 28),
    "gemma3_12b": (1, 23, 44),
    "gpt_oss_20b": (1, 11, 20),
}


def rope_of(model):
    """Of the layers that see everything, where they differ."""
    rope = model.config.rope_parameters
    return rope.get("full_attention", rope)


def tiny(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "sinks" in name or "self_attn" in name:
            parameter.normal_(std=0.3)
    return model


@pytest.mark.parametrize("name", TARGETS)
def test_every_setting_trains_a_head(name):
    config = composed("distill", f"experiment={name}", "data.path=chats.jsonl")
    assert config.run_dir == f"runs/{name}"
    model = tiny(FAMILIES[name]())
    settings = config.head
    shape = head_config(model, settings)
    assert shape.aux_layer_ids == TAPPED[name]
    assert shape.rope_parameters == rope_of(model)
    rows = to_tensors(samples(3), settings.max_length, VOCAB)
    batch = collate(rows, [0, 1, 2], torch.device("cpu"))

    # The target's own attention, one document at a time, is what packing must not change.
    with torch.no_grad():
        natives = [model(row.tokens_S[None], output_hidden_states=True) for row in rows]
    target = PackedTarget(model, shape.aux_layer_ids)
    states, layout = target.states(batch.tokens_S, batch.lengths), make_layout(batch.lengths, batch.loss_mask_S)
    expected = torch.cat([native.logits[0] for native in natives])
    torch.testing.assert_close(states.final_SH @ target.lm_head_VH.T, expected, atol=2e-4, rtol=1e-3)
    first = shape.aux_layer_ids[0] + 1
    expected = torch.cat([native.hidden_states[first][0] for native in natives])
    torch.testing.assert_close(states.aux_SE[:, : shape.hidden_size], expected, atol=1e-4, rtol=1e-3)

    head = new_head(shape, torch.arange(shape.draft_vocab_size), target.lm_head_VH)
    taught = taught_positions(layout, states.choice_S, getattr(head, "t2d", None), settings.ttt_steps)
    outputs = unroll(head, target.embed(batch.tokens_S), states.aux_SE, layout, settings.ttt_steps)
    weights_K = torch.tensor(settings.weights())
    teacher = final_state_teacher(states.final_SH, target.lm_head_VH)
    loss, _ = distillation_loss(head, outputs, teacher, taught, weights_K, settings.loss)
    loss.backward()
    assert loss > 0
    assert all(parameter.grad.isfinite().all() for parameter in head.parameters())


@pytest.mark.parametrize("rope", [{"rope_type": "default"}, {"rope_type": "linear", "factor": 4.0}])
def test_a_target_that_turns_a_part_of_its_rows_has_a_head_that_turns_all(rope):
    """By the plain frequencies, as those scaled for a part would not fit; what is written down says so."""
    model = tiny(LlamaConfig(**SIZES, num_hidden_layers=6))
    model.config.rope_parameters = rope | {"rope_theta": 5000.0, "partial_rotary_factor": 0.5}
    assert head_config(model, HeadTrainConfig()).rope_parameters == {"rope_type": "default", "rope_theta": 5000.0}


def test_a_target_with_other_norms_has_a_head_with_its_own():
    model = tiny(LlamaConfig(**SIZES, num_hidden_layers=6))
    del model.config.rms_norm_eps
    assert head_config(model, HeadTrainConfig()).rms_norm_eps == 1e-6


def test_sliding_windows_of_a_mistral_hold_inside_each_document():
    model = tiny(MistralConfig(**SIZES, num_hidden_layers=4, sliding_window=3))
    tokens_S = torch.randint(VOCAB, (15,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = torch.cat([model(part[None]).logits[0] for part in tokens_S.split([9, 6])])
    target = PackedTarget(model, (1,))
    got = target.states(tokens_S, [9, 6]).final_SH @ target.lm_head_VH.T
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-3)


def test_a_target_with_capped_logits_is_refused_by_name():
    model = tiny(Gemma2Config(**SIZES, num_hidden_layers=4, final_logit_softcapping=0.01))
    with pytest.raises(GraftError, match="Gemma2ForCausalLM changes its logits"):
        PackedTarget(model, (1,))


def test_a_target_that_remembers_by_other_means_is_refused_by_name():
    config = Qwen3Config(**SIZES, num_hidden_layers=4)
    model = tiny(config)
    model.config.layer_types = ["linear_attention", "full_attention"] * 2
    with pytest.raises(GraftError, match="Qwen3ForCausalLM has layers of kind linear_attention"):
        PackedTarget(model, (1,))


@pytest.mark.parametrize("name", TARGETS)
def test_every_setting_trains_a_block_head(name):
    settings = composed("distill", f"experiment={name}", "data.path=chats.jsonl", "head.family=block").head
    texts, model = samples(3), tiny(FAMILIES[name]())
    strategy = FAMILY_OF_HEADS[settings.family](model, texts, settings)
    config = strategy.head.config
    assert config.aux_layer_ids[0] == 1
    assert len(config.aux_layer_ids) == 5
    assert config.aux_layer_ids[-1] == model.config.num_hidden_layers - 3
    assert config.rope_parameters == rope_of(model)
    batch = collate(to_tensors(texts, settings.max_length, VOCAB), [0, 1, 2], torch.device("cpu"))
    prepared = strategy.prepare(batch, strategy.target.states(batch.tokens_S, batch.lengths), seed=0)
    embedding_SH = strategy.target.embed(batch.tokens_S[None])[0]
    loss, _ = strategy(prepared, embedding_SH, strategy.coefficients(prepared.trained_K))
    loss.backward()
    assert loss > 0
    assert all(parameter.grad.isfinite().all() for parameter in strategy.head.parameters())
