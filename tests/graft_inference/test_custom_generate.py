"""`generate` of the bundle, as transformers calls it: what plain `generate` gives, or a refusal."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    MinLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    StopStringCriteria,
    SynthIDTextWatermarkingConfig,
    set_seed,
)
from transformers.generation import EosTokenCriteria
from transformers.generation.streamers import BaseStreamer

from graft_inference import METHODS, GraftError, custom_generate
from graft_inference.custom_generate import generate

from .test_engine import prompt
from .tiny import VOCAB, tiny_model
from .tiny_bundle import tiny_tokenizer, write_bundle, write_target

PAD = next(token for token in range(VOCAB) if token not in prompt(9))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    root = tmp_path_factory.mktemp("root")
    return write_bundle(root / "bundle", write_target(root / "target"))


class Recorder(BaseStreamer):
    def __init__(self, fail_after=1000):
        self.values, self.ended, self.fail_after = [], False, fail_after

    def put(self, value):
        if len(self.values) == self.fail_after:
            raise RuntimeError("the listener left")
        self.values.append(value.tolist())

    def end(self):
        self.ended = True


@pytest.mark.parametrize("method", METHODS)
def test_greedy_equals_plain_generate(model, bundle, method):
    expected = model.generate(prompt(9), max_new_tokens=30, do_sample=False)
    ours = generate(model=model, inputs=prompt(9), max_new_tokens=30, draft=bundle, method=method)
    assert ours.dtype == torch.long
    assert ours.tolist() == expected.tolist()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_length": 16},
        {"max_new_tokens": 1},
        {"generation_config": GenerationConfig(max_new_tokens=5)},
        {"max_new_tokens": 5, "attention_mask": torch.ones(1, 9, dtype=torch.long)},
        {"max_new_tokens": 5, "temperature": 0.3, "top_k": 3, "do_sample": False},
    ],
)
def test_lengths_are_those_of_plain_generate(model, bundle, settings):
    expected = model.generate(prompt(9), **settings)
    assert generate(prompt(9), model=model, draft=bundle, **settings).tolist() == expected.tolist()


@pytest.mark.parametrize("as_list", [False, True])
def test_the_request_decides_which_token_ends_it(model, bundle, as_list):
    free = model.generate(prompt(9), max_new_tokens=30)[0, 9:].tolist()
    eos = free[12]
    settings: dict[str, Any] = {"max_new_tokens": 30, "eos_token_id": [eos] if as_list else eos, "pad_token_id": PAD}
    ours = generate(prompt(9), model=model, draft=bundle, **settings)
    assert ours[0, 9:].tolist() == free[: free.index(eos) + 1]
    # The model's own end token no longer counts when the request names another.
    model.generation_config.eos_token_id = eos
    other = next(token for token in range(VOCAB) if token not in free)
    unended = generate(prompt(9), model=model, draft=bundle, **(settings | {"eos_token_id": other}))
    assert unended[0, 9:].tolist() == free


def test_threads_take_turns_on_a_model(model, bundle):
    """It has our attention while it serves one of them, and its own again behind all."""
    prompts = [prompt(5 + turn, turn) for turn in range(4)]
    expected = [model.generate(ids, max_new_tokens=24, do_sample=False).tolist() for ids in prompts]
    with ThreadPoolExecutor(4) as pool:
        ask = partial(generate, model=model, draft=bundle, max_new_tokens=24)
        assert [out.tolist() for out in pool.map(ask, prompts)] == expected
    assert model.generate(prompts[0], max_new_tokens=24, do_sample=False).tolist() == expected[0]


LEFT = {"padding_value": PAD, "batch_first": True, "padding_side": "left"}
PADDED = pad_sequence([prompt(length, length)[0] for length in (4, 9, 6)], **LEFT)
BATCH = {"inputs": PADDED, "attention_mask": (torch.arange(9) >= torch.tensor([[5], [0], [3]])).long()}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_length": 20},
        {"eos_token_id": list(range(0, VOCAB, 7))},
        {"eos_token_id": list(range(0, VOCAB, 7)), "min_new_tokens": 4},
        {"eos_token_id": list(range(0, VOCAB, 7)), "min_length": 13},
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 1},
        {"suppress_tokens": list(range(0, VOCAB, 2))},
        {"stop_strings": ["a", "e", "y"], "eos_token_id": 0, "tokenizer": tiny_tokenizer()},
    ],
)
def test_a_batch_padded_on_the_left_equals_plain_generate(model, bundle, settings):
    settings = {"pad_token_id": PAD, **({} if "max_length" in settings else {"max_new_tokens": 25}), **settings}
    expected = model.generate(**BATCH, **settings)
    for method in ("graft", "autoregressive"):
        assert generate(**BATCH, model=model, draft=bundle, method=method, **settings).tolist() == expected.tolist()


def test_several_sequences_of_one_prompt_differ(model, bundle):
    settings = {"max_new_tokens": 12, "do_sample": True, "top_k": 0, "temperature": 5.0, "num_return_sequences": 3}
    ours = generate(prompt(9), model=model, draft=bundle, **settings)
    assert ours[:, :9].tolist() == prompt(9).tolist() * 3
    assert len(set(map(str, ours.tolist()))) == 3


def test_a_stopping_criterion_is_asked_after_every_token(model, bundle):
    lengths = []

    def stop(input_ids, scores, **kwargs):
        lengths.append(input_ids.shape[1])
        return torch.tensor([input_ids.shape[1] == 16])

    ours = generate(prompt(9), model=model, draft=bundle, max_new_tokens=30, stopping_criteria=[stop])
    assert ours.tolist() == model.generate(prompt(9), max_new_tokens=7).tolist()
    assert lengths == list(range(10, 17))


def test_the_streamer_gets_what_plain_generate_gives_it(model, bundle):
    ours, plain = Recorder(), Recorder()
    generate(prompt(9), model=model, draft=bundle, max_new_tokens=12, streamer=ours)
    model.generate(prompt(9), max_new_tokens=12, streamer=plain)
    assert ours.values == plain.values
    assert ours.ended


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 1},
        {"min_new_tokens": 9, "eos_token_id": list(range(0, VOCAB, 3)), "pad_token_id": PAD},
        {"suppress_tokens": list(range(0, VOCAB, 2))},
        {"logits_processor": LogitsProcessorList([MinLengthLogitsProcessor(20, list(range(0, VOCAB, 2)))])},
        {"stop_strings": ["a", "e", "y"], "tokenizer": tiny_tokenizer()},
    ],
)
def test_settings_that_change_the_greedy_output_are_followed(model, bundle, settings):
    plain = model.generate(prompt(9), max_new_tokens=30)
    expected = model.generate(prompt(9), max_new_tokens=30, **settings)
    assert expected.tolist() != plain.tolist()
    for method in ("graft", "retrieve"):
        ours = generate(prompt(9), model=model, draft=bundle, max_new_tokens=30, method=method, **settings)
        assert ours.tolist() == expected.tolist()


@pytest.mark.parametrize("settings", [{"top_k": 1}, {"top_k": 0, "top_p": 1e-6}, {"top_k": 0, "min_p": 1.0}])
def test_filters_that_leave_one_token_make_sampling_greedy(model, bundle, settings):
    ours = generate(
        prompt(9), model=model, draft=bundle, max_new_tokens=30, do_sample=True, temperature=5.0, **settings
    )
    assert ours.tolist() == model.generate(prompt(9), max_new_tokens=30).tolist()


def test_sampling_follows_the_global_seed_and_the_temperature(model, bundle):
    def sample(seed, temperature=1.0):
        set_seed(seed)
        settings = {"max_new_tokens": 20, "do_sample": True, "top_k": 0, "temperature": temperature}
        return generate(prompt(9), model=model, draft=bundle, **settings).tolist()

    assert sample(1) == sample(1)
    # A temperature above 1 so that the peaked random targets have something to choose from.
    assert len({str(sample(seed, 5.0)) for seed in range(4)}) > 1
    greedy = model.generate(prompt(9), max_new_tokens=20).tolist()
    assert sample(1, temperature=1e-4) == greedy


def test_the_model_comes_back_as_it_was(model, bundle, monkeypatch):
    def pack(module):
        for layer in module.modules():
            layer.forward = layer.forward

    # Tiny layers are not worth packing; as if these were.
    monkeypatch.setattr("graft_inference.engine.pack_linears", pack)

    def state():
        hooks = sum(len(module._forward_hooks) for module in model.modules())
        replaced = [name for name, module in model.named_modules() if "forward" in vars(module)]
        return model.config._attn_implementation, hooks, replaced, model(prompt(9)).logits.tolist()

    before = state()
    generate(prompt(9), model=model, draft=bundle, max_new_tokens=8)
    assert state() == before
    with pytest.raises(RuntimeError, match="the listener left"):
        generate(prompt(9), model=model, draft=bundle, streamer=Recorder(fail_after=3))
    assert state() == before
    with pytest.raises(GraftError, match="exceed the target's limit of 256"):
        generate(prompt(9), model=model, draft=bundle, max_new_tokens=300)
    assert state() == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 2}, "beam_search is not supported"),
        ({"prompt_lookup_num_tokens": 3}, "assisted_generation is not supported"),
        ({"inputs": prompt(8).view(2, 4), "streamer": Recorder()}, "a streamer follows one prompt"),
        ({"inputs": prompt(8).view(2, 4), "encoder_no_repeat_ngram_size": 2}, "pass prompts one by one"),
        ({"attention_mask": torch.tensor([[1, 1, 1, 1, 1, 1, 1, 1, 0]])}, "pad on the left"),
        # transformers takes pad tokens of a prompt for padding, unless a mask says otherwise.
        ({"pad_token_id": int(prompt(9)[0, 4])}, "holes in prompt 0"),
        ({"pad_token_id": int(prompt(9)[0, 8])}, "or pass attention_mask=torch.ones_like"),
        ({"return_dict_in_generate": True}, "return_dict_in_generate"),
        ({"stop_strings": ["a"]}, "stop_strings need a tokenizer"),
        ({"prefix_allowed_tokens_fn": lambda batch, ids: [1]}, "prefix_allowed_tokens_fn"),
        ({"inputs_embeds": torch.zeros(1, 4, 32)}, "inputs_embeds"),
        ({"past_key_values": object()}, "past_key_values"),
        ({"max_new_token": 4}, "max_new_token"),
        ({"method": "grafted"}, "unknown method 'grafted'"),
        ({"tokenizer": tiny_tokenizer(extra="§")}, "tokenizer is not the one"),
    ],
)
def test_what_would_change_the_output_is_refused(model, bundle, settings, message):
    with pytest.raises(GraftError, match=message):
        generate(**({"inputs": prompt(9), "model": model, "draft": bundle, "max_new_tokens": 8} | settings))


FOLLOWED: dict[str, Any] = {
    "max_length": 16,
    "max_new_tokens": 7,
    "min_length": 20,
    "min_new_tokens": 12,
    "max_time": 0.0,
    "stop_strings": ["a", "e", "y"],
    "repetition_penalty": 1.7,
    "encoder_repetition_penalty": 3.0,
    "no_repeat_ngram_size": 1,
    "encoder_no_repeat_ngram_size": 1,
    "bad_words_ids": [[token] for token in range(0, VOCAB, 2)],
    "renormalize_logits": True,
    "forced_bos_token_id": 5,
    "forced_eos_token_id": 7,
    "remove_invalid_values": True,
    "exponential_decay_length_penalty": (2, 3.0),
    "suppress_tokens": list(range(0, VOCAB, 2)),
    "begin_suppress_tokens": list(range(0, VOCAB, 2)),
    "sequence_bias": [[[3], 30.0]],
    "watermarking_config": {"bias": 30.0},
    "eos_token_id": list(range(0, VOCAB, 3)),
}
"""Settings that plain greedy decoding follows."""
IDLE: dict[str, Any] = {
    "use_cache": False,
    "cache_implementation": "static",
    "cache_config": {"axis_key": 0},
    "max_cache_len": 50,
    "prefill_chunk_size": 4,
    "do_sample": False,
    "num_beams": 1,
    "num_return_sequences": 1,
    "early_stopping": True,
    "length_penalty": 2.0,
    "diversity_penalty": 1.0,
    "num_beam_groups": 1,
    "low_memory": False,
    "temperature": 0.3,
    "top_k": 3,
    "top_p": 0.3,
    "min_p": 0.9,
    "top_h": 0.3,
    "typical_p": 0.3,
    "epsilon_cutoff": 0.3,
    "eta_cutoff": 0.3,
    "output_scores": True,
    "output_logits": True,
    "output_attentions": True,
    "output_hidden_states": True,
    "pad_token_id": PAD,
    "bos_token_id": 4,
    "decoder_start_token_id": 4,
    "guidance_scale": 1.0,
    "num_assistant_tokens": 3,
    "num_assistant_tokens_schedule": "heuristic",
    "assistant_confidence_threshold": 0.1,
    "assistant_lookbehind": 3,
    "target_lookbehind": 3,
    "assistant_ensemble_weight": 0.5,
    "max_matching_ngram_size": 3,
    "speculation_type": None,
    "compile_config": None,
    "disable_compile": True,
    "continuous_batching_config": None,
    "transformers_version": "5",
}
"""Settings that change no token of it: of sampling, beams, assistants, caches, and what else comes back."""
UNSEEN = {"renormalize_logits", "remove_invalid_values", "forced_bos_token_id"}
"""Of these, what shows in no prompt of the tests."""
REFUSED: dict[str, Any] = {
    "guidance_scale": 1.5,
    "token_healing": True,
    "is_assistant": True,
    "return_dict_in_generate": True,
    "cache_implementation": "quantized",
    "num_beams": 2,
    "penalty_alpha": 0.6,
    "dola_layers": "high",
    "prompt_lookup_num_tokens": 3,
    "assistant_early_exit": 2,
    "use_mtp": True,
    "constraints": [object()],
    "force_words_ids": [[1]],
}
ENDED = ("min_length", "min_new_tokens", "exponential_decay_length_penalty")


def as_set(model, where, name, value):
    """Arguments of generate that set it there: in the call, in a configuration passed, or in the model's."""
    settings = {name: value}
    if name in ENDED:
        settings["eos_token_id"] = FOLLOWED["eos_token_id"]
    if where == "passed":
        return {"generation_config": GenerationConfig(**settings)}
    if where == "model":
        model.generation_config.update(**settings)
        return {}
    return settings


def compared(model, bundle, name, arguments):
    """What plain `generate` makes of it, and what ours does."""
    lengths = {} if name in ("max_length", "max_new_tokens") else {"max_new_tokens": 25}
    settings = {"tokenizer": tiny_tokenizer(), **lengths, **arguments}
    expected = model.generate(prompt(9), **settings)
    return expected.tolist(), generate(prompt(9), model=model, draft=bundle, **settings).tolist()


@pytest.mark.parametrize("where", ["call", "passed", "model"])
@pytest.mark.parametrize("name", FOLLOWED)
def test_every_setting_of_a_generation_config_is_followed_wherever_it_stands(bundle, name, where):
    model = tiny_model("llama")
    untouched = model.generate(prompt(9), max_new_tokens=25).tolist()
    expected, ours = compared(model, bundle, name, as_set(model, where, name, FOLLOWED[name]))
    assert ours == expected
    assert (expected != untouched) == (name not in UNSEEN)


@pytest.mark.parametrize("name", IDLE)
def test_settings_that_change_no_token_are_taken(bundle, name):
    model = tiny_model("llama")
    model.set_attn_implementation("eager")  # or output_attentions is none of it
    expected, ours = compared(model, bundle, name, {name: IDLE[name]})
    assert ours == expected == model.generate(prompt(9), max_new_tokens=25).tolist()


@pytest.mark.parametrize("where", ["call", "passed", "model"])
@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_cannot_be_followed_are_refused_by_name(bundle, name, where):
    model = tiny_model("llama")
    arguments = as_set(model, where, name, REFUSED[name])
    with pytest.raises(GraftError, match=f"{name}=.*not supported with Graft|not supported with Graft .*{name}="):
        generate(prompt(9), model=model, draft=bundle, **arguments)


def test_no_setting_of_a_generation_config_is_forgotten():
    tested = FOLLOWED.keys() | IDLE.keys() | REFUSED.keys()
    assert {name for name in vars(GenerationConfig()) if not name.startswith("_")} - tested == set()


@pytest.mark.parametrize(
    "settings",
    [
        lambda: {"logits_processor": [RepetitionPenaltyLogitsProcessor(3.0)], "repetition_penalty": 1.1},
        lambda: {"stopping_criteria": [MaxLengthCriteria(12)]},
        lambda: {"stopping_criteria": [MaxLengthCriteria(40)]},
        lambda: {"stopping_criteria": [MaxLengthCriteria(3)]},
        lambda: {"stopping_criteria": [EosTokenCriteria([2, 4, 44])], "eos_token_id": 1, "pad_token_id": PAD},
        lambda: {
            "stopping_criteria": [StopStringCriteria(tiny_tokenizer(), ["zzz"])],
            "stop_strings": ["a", "e", "y"],
            "tokenizer": tiny_tokenizer(),
        },
        lambda: {"watermarking_config": SynthIDTextWatermarkingConfig(keys=[1, 2, 3, 4], ngram_len=3)},
    ],
)
def test_a_callers_own_processor_or_criterion_stands_for_that_of_its_setting(model, bundle, settings):
    expected = model.generate(prompt(9), max_new_tokens=20, **settings())
    ours = generate(prompt(9), model=model, draft=bundle, max_new_tokens=20, **settings())
    assert ours.tolist() == expected.tolist()


def test_a_watermark_is_on_each_prompt_of_a_batch(model, bundle):
    settings = {"max_new_tokens": 12, "watermarking_config": {"bias": 30.0}, "pad_token_id": PAD}
    expected = model.generate(**BATCH, **settings)
    assert generate(**BATCH, model=model, draft=bundle, **settings).tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (prompt(9)[0], r"pass \*\*inputs"),
        (prompt(9).tolist(), "a tensor of token ids"),
        (torch.empty((1, 0), dtype=torch.long), "that is not empty"),
        ({"input_ids": prompt(9)}, r"pass \*\*inputs"),
        (torch.tensor([[1, VOCAB]]), "prompt 0 has the token 61 outside the vocabulary of 61"),
    ],
)
def test_prompts_that_a_plain_generate_stumbles_over_are_refused_by_name(model, bundle, inputs, message):
    with pytest.raises(GraftError, match=message):
        generate(inputs, model=model, draft=bundle, max_new_tokens=5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"streamer": 5}, "streamer=5: pass one with put and end"),
        ({"tokenizer": 5}, "tokenizer=5: pass the target's"),
        ({"logits_processor": [5]}, "logits_processor has 5, which cannot be called"),
        ({"stopping_criteria": [5]}, "stopping_criteria has 5, which cannot be called"),
        ({"prepared": True}, "does not support prepared"),
    ],
)
def test_objects_that_a_plain_generate_stumbles_over_are_refused_by_name(model, bundle, settings, message):
    with pytest.raises(GraftError, match=message):
        generate(prompt(9), model=model, draft=bundle, max_new_tokens=5, **settings)


@pytest.mark.parametrize("settings", [{"suppress_tokens": "x"}, {"bad_words_ids": []}, {"max_new_tokens": -2}])
def test_what_transformers_refuses_is_our_error(model, bundle, settings):
    with pytest.raises(GraftError, match=r"transformers' generate refuses this request: .*generation_config"):
        generate(prompt(9), model=model, draft=bundle, **settings)


def test_a_callers_own_processor_fails_as_it_does(model, bundle):
    def fails(input_ids, scores):
        raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        generate(prompt(9), model=model, draft=bundle, max_new_tokens=5, logits_processor=[fails])


def test_code_and_weights_belong_together(model, bundle, monkeypatch):
    weights = (bundle / "model.safetensors").read_bytes()
    monkeypatch.setattr(custom_generate, "BUNDLE", str(bundle))
    monkeypatch.setattr(custom_generate, "WEIGHTS_SHA256", hashlib.sha256(weights[:-1]).hexdigest())
    with pytest.raises(GraftError, match=r"model.safetensors holds other weights"):
        generate(prompt(9), model=model)
    monkeypatch.setattr(custom_generate, "WEIGHTS_SHA256", hashlib.sha256(weights).hexdigest())
    generate(prompt(9), model=model)


def test_an_official_head_serves_but_not_for_a_bundles_code(model, bundle, tmp_path, monkeypatch):
    head = tmp_path / "head"
    head.mkdir()
    (head / "config.json").write_bytes((bundle / "config.json").read_bytes())
    torch.save(load_file(bundle / "model.safetensors"), head / "pytorch_model.bin")
    expected = model.generate(prompt(9), max_new_tokens=8, do_sample=False)
    ours = generate(prompt(9), model=model, draft=head, max_new_tokens=8, do_sample=False)
    assert ours.tolist() == expected.tolist()
    custom_generate._bundles.clear()
    monkeypatch.setattr(custom_generate, "WEIGHTS_SHA256", "0" * 64)
    with pytest.raises(GraftError, match="other weights"):
        generate(prompt(9), model=model, draft=head, max_new_tokens=8)


def test_every_tokenizer_is_checked(model, bundle):
    call = partial(generate, prompt(9), model=model, draft=bundle, max_new_tokens=2)
    call()
    with pytest.raises(GraftError, match="tokenizer is not the one"):
        call(tokenizer=tiny_tokenizer(extra="z"))
    call(tokenizer=tiny_tokenizer())


def test_without_a_bundle_the_remedy_is_named(model, tmp_path, monkeypatch):
    with pytest.raises(GraftError, match="belongs to no bundle: pass draft=PATH"):
        generate(prompt(9), model=model)
    monkeypatch.setattr(custom_generate, "BUNDLE", str(tmp_path / "gone"))
    with pytest.raises(GraftError, match=r"gone is neither a directory.*pass draft=PATH"):
        generate(prompt(9), model=model)
