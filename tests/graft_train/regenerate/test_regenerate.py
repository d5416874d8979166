"""The stage from conversations on the disk to samples: the data's own answers, servers, and the preview."""

import json
import shutil

import pytest
import torch
from transformers import GenerationConfig, LlamaForCausalLM

from graft_inference.errors import GraftError
from graft_train.config import Config
from graft_train.config.data import DataConfig
from graft_train.config.target import TargetConfig
from graft_train.data.samples import read_samples
from graft_train.distill.batches import to_tensors
from graft_train.regenerate import RegenerateConfig, regenerate
from tests.graft_train.regenerate.server import Server, answer_to, serving
from tests.graft_train.tiny_chat import MARKED, PLAIN, VOCABULARY, save_target, word_tokenizer, words

LETTERS = VOCABULARY[9:]


SHAPE = ("hidden_size", "head_dim", "eos_token_id")


def chat_config(root, template, **changes):
    """Forty conversations of two answers each, and a random target with this template."""
    shape = {name: changes.pop(name) for name in SHAPE if name in changes}
    rows = ([LETTERS[n % 26], LETTERS[n // 26], "x y", f"{LETTERS[n % 13]} {LETTERS[n % 26]}"] for n in range(40))
    (root / "chats.jsonl").write_text("".join(json.dumps({"data": row}) + "\n" for row in rows))
    return Config(
        run_dir=str(root / "run"),
        target=TargetConfig(
            name_or_path=str(save_target(root / "target", template, **shape)), dtype="float32", device="cpu"
        ),
        data=DataConfig(path=str(root / "chats.jsonl"), calibration_share=0.2, evaluation_share=0.2),
        regenerate=RegenerateConfig(**{"samples": 10, "held_out": 2, "max_new_tokens": 6, "batch": 4} | changes),
    )


@pytest.mark.parametrize(("template", "answers"), [(PLAIN, 1), (MARKED, 2)])
def test_the_datas_own_answers_become_samples_without_the_target(tmp_path, template, answers):
    config = chat_config(tmp_path, template, answers="data")
    (tmp_path / "target" / "model.safetensors").unlink()
    path = regenerate(config) / "samples.jsonl"
    samples = read_samples(path, "train")
    assert len(samples) == 10
    for sample, row in zip(samples, to_tensors(samples, 64, len(VOCABULARY)), strict=True):
        assert len(sample.answers) == answers
        for start, end in sample.answers:
            assert words(sample.ids[start - 1 : start]) == "<assistant>"
            assert words(sample.ids[end - 1 : end]) == "<end>"
        assert row.loss_mask_S.sum() == len(sample.answer_ids)
    assert len(read_samples(path, "evaluation")) == 2


def test_a_server_answers_in_place_of_this_process(tmp_path):
    with serving(Server()) as server:
        config = chat_config(tmp_path, PLAIN, base_url=server.url)
        (tmp_path / "target" / "model.safetensors").unlink()
        path = regenerate(config) / "samples.jsonl"
    samples = read_samples(path, "train")
    assert len(samples) == server.answers == 10
    assert all(sample.answer_ids == answer_to(sample.prompt_ids, 6) for sample in samples)
    assert all(words(sample.prompt_ids).endswith("<user> x y <end> gap <assistant>") for sample in samples)
    assert len(read_samples(path, "calibration")) == 2
    config.regenerate.base_url, config.regenerate.batch = "http://127.0.0.1:9/v1", 7  # do not decide the samples
    assert regenerate(config) / "samples.jsonl" == path


def test_a_server_is_not_asked_more_than_it_takes(tmp_path):
    """Prompts of 14 tokens are cut at the earlier turn, of 5, where answers of 6 would not fit behind them."""
    narrow = Server(model={"max_model_len": 19})
    with serving(Server(model={"max_model_len": 64})) as wide, serving(narrow):
        samples = read_samples(regenerate(served(tmp_path / "one", wide, narrow)) / "samples.jsonl", "train")
        assert {len(sample.prompt_ids) for sample in samples} == {5}
        asked, narrow.model["max_model_len"] = len(wide.requests), 10
        with pytest.raises(GraftError, match="longer than 4 tokens"):
            regenerate(served(tmp_path / "two", wide, narrow))
        assert len(wide.requests) == asked


def served(root, *servers):
    root.mkdir()
    return chat_config(root, PLAIN, base_url=[server.url for server in servers])


def test_several_processes_would_answer_everything_twice(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(GraftError, match="regenerate runs as one process"):
        regenerate(chat_config(tmp_path, PLAIN))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("answers", ["data", "target"])
def test_preview_shows_what_there_is_and_runs_and_writes_nothing(tmp_path, answers, capsys):
    config = chat_config(tmp_path, MARKED, answers=answers)
    config.data.preview = True
    (tmp_path / "target" / "model.safetensors").unlink()
    with pytest.raises(SystemExit) as stopped:
        regenerate(config)
    assert stopped.value.code == 0
    assert not (tmp_path / "run").exists()
    out = capsys.readouterr().out
    assert ("trained tokens: 0 of" in out) == (answers == "target")
    assert "<assistant>" in out


def test_preview_of_a_finished_run_shows_its_answers(tmp_path, capsys):
    config = chat_config(tmp_path, MARKED)
    samples = read_samples(regenerate(config) / "samples.jsonl", "train")
    config.data.preview = True
    with pytest.raises(SystemExit):
        regenerate(config)
    trained = sum(len(sample.answer_ids) for sample in samples)
    assert f"trained tokens: {trained} of" in capsys.readouterr().out


def test_text_has_no_answers(tmp_path):
    config = chat_config(tmp_path, PLAIN, answers="data")
    (tmp_path / "chats.jsonl").write_text(
        "".join(json.dumps({"text": f"{a} {b}"}) + "\n" for a in LETTERS for b in "xyz")
    )
    config.data.prompt_tokens = 2
    with pytest.raises(GraftError, match="is plain text"):
        regenerate(config)


def test_what_a_refusal_advises_works(tmp_path):
    """data.on_error=skip after a bad record that was met behind good ones."""
    config = chat_config(tmp_path, PLAIN, answers="data")
    with (tmp_path / "chats.jsonl").open("a") as file:
        file.writelines(json.dumps({"text": f"{letter} b c d"}) + "\n" for letter in LETTERS)
    config.regenerate.samples = 1000
    with pytest.raises(GraftError, match=r"is plain text.*data\.on_error=skip"):
        regenerate(config)
    config.data.on_error = "skip"
    assert read_samples(regenerate(config) / "samples.jsonl", "train")


def make_chain(directory, follows):
    """Changes a target into one that writes after each word the one that it says, and z after all others."""
    model = LlamaForCausalLM.from_pretrained(directory)
    size = len(VOCABULARY)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.fill_(1.0 if "norm" in name else 0.0)
        model.model.embed_tokens.weight[:, :size] = torch.eye(size)
        for token, word in enumerate(VOCABULARY):
            model.lm_head.weight[VOCABULARY.index(follows.get(word, "z")), token] = 1.0
    return model


def answers_of(samples):
    return {words(sample.answer_ids) for sample in samples}


@pytest.mark.parametrize(
    ("own", "answer"),
    [(None, "a b <end>"), ("c", "a b <end>"), ("b", "a b"), (["c", "<end>"], "a b <end>"), (["c", "a"], "a")],
)
def test_an_answer_ends_at_the_tokenizers_end_and_at_the_targets(tmp_path, own, answer):
    """The files of a chat model that was tuned from a base disagree about them; servers and the data do the same."""
    config = chat_config(tmp_path, PLAIN, hidden_size=len(VOCABULARY) + 1, head_dim=16)
    model = make_chain(tmp_path / "target", {"<assistant>": "a", "a": "b", "b": "<end>", "<end>": "c"})
    ids = [VOCABULARY.index(word) for word in own] if isinstance(own, list) else own and VOCABULARY.index(own)
    model.generation_config = GenerationConfig(eos_token_id=ids)
    model.save_pretrained(tmp_path / "target")
    assert answers_of(read_samples(regenerate(config) / "samples.jsonl", "train")) == {answer}


def test_without_generation_settings_the_configurations_end_counts_too(tmp_path):
    config = chat_config(tmp_path, PLAIN, hidden_size=len(VOCABULARY) + 1, head_dim=16, eos_token_id=10)
    make_chain(tmp_path / "target", {"<assistant>": "a", "a": "b"}).save_pretrained(tmp_path / "target")
    (tmp_path / "target" / "generation_config.json").unlink()
    assert answers_of(read_samples(regenerate(config) / "samples.jsonl", "train")) == {"a b"}


def with_more_tokens(target, *tokens, pad=None):
    """A tokenizer that knows words which the target beside it has no embedding for."""
    tokenizer = word_tokenizer(PLAIN)
    tokenizer.add_tokens(list(tokens))
    tokenizer.pad_token = pad or tokenizer.pad_token
    tokenizer.save_pretrained(target)


def test_padding_needs_no_embedding(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    configs = []
    for root in (one, two):
        root.mkdir()
        configs.append(chat_config(root, PLAIN, temperatures=[0.0]))
        with (root / "chats.jsonl").open("a") as file:
            file.writelines(json.dumps({"data": ["a " * length]}) + "\n" for length in range(1, 30))
    shutil.copy(one / "target" / "model.safetensors", two / "target")
    with_more_tokens(two / "target", "[PAD]", pad="[PAD]")
    expected, found = (regenerate(config) / "samples.jsonl" for config in configs)
    assert len({len(sample.ids) for sample in read_samples(found, "train")}) > 1  # some were padded
    assert found.read_bytes() == expected.read_bytes()


@pytest.mark.parametrize("answers", ["target", "data"])
def test_a_token_without_embedding_is_a_bad_record(tmp_path, answers, capsys):
    config = chat_config(tmp_path, PLAIN, answers=answers, samples=100)
    with_more_tokens(tmp_path / "target", "<call>")
    rows = (tmp_path / "chats.jsonl").read_text().splitlines()
    (tmp_path / "chats.jsonl").write_text("\n".join([*rows[:30], '{"data": ["a", "b", "<call>", "d"]}', *rows[30:]]))
    with pytest.raises(GraftError, match=r"chats.jsonl, line 31\) has the token '<call>' \(35\).* has 35 rows"):
        regenerate(config)
    config.data.on_error, config.run_dir = "skip", str(tmp_path / "skipping")
    path = regenerate(config) / "samples.jsonl"
    assert "line 31" in capsys.readouterr().out
    found = [sample for split in ("train", "calibration", "evaluation") for sample in read_samples(path, split)]
    assert max(token for sample in found for token in sample.ids) < len(VOCABULARY)


@pytest.mark.parametrize("answers", ["target", "data"])
def test_without_room_for_a_prompt_the_setting_is_named_before_data_is_read(tmp_path, answers):
    config = chat_config(tmp_path, PLAIN, answers=answers, max_new_tokens=64)
    (tmp_path / "chats.jsonl").write_text("no record")
    with pytest.raises(GraftError, match=r"regenerate\.max_new_tokens=64 leaves no room .* at most 64 tokens"):
        regenerate(config)


def test_without_room_at_a_server_the_setting_is_named_before_it_is_asked(tmp_path):
    with serving(Server(model={"max_model_len": 6})) as server:
        config = served(tmp_path / "one", server)
        with pytest.raises(GraftError, match=r"regenerate\.max_new_tokens=6 leaves no room .* at most 6 tokens"):
            regenerate(config)
    assert not server.requests
