"""The stage from conversations on the disk to samples: the data's own answers, servers, and the preview."""

import json

import pytest

from graft_inference.errors import GraftError
from graft_train.config import Config
from graft_train.data.documents import DataConfig
from graft_train.data.samples import read_samples
from graft_train.data.target import TargetConfig
from graft_train.distill.batches import to_rows
from graft_train.regenerate import RegenerateConfig, regenerate
from tests.graft_train.regenerate.server import Server, answer_to, serving
from tests.graft_train.tiny_chat import MARKED, PLAIN, VOCABULARY, save_target, words

LETTERS = VOCABULARY[9:]


def chat_config(root, template, **changes):
    """Forty conversations of two answers each, and a random target with this template."""
    rows = ([LETTERS[n % 26], LETTERS[n // 26], "x y", f"{LETTERS[n % 13]} {LETTERS[n % 26]}"] for n in range(40))
    (root / "chats.jsonl").write_text("".join(json.dumps({"data": row}) + "\n" for row in rows))
    return Config(
        run_dir=str(root / "run"),
        target=TargetConfig(name_or_path=str(save_target(root / "target", template)), dtype="float32", device="cpu"),
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
    for sample, row in zip(samples, to_rows(samples, 64, len(VOCABULARY)), strict=True):
        assert len(sample.answers) == answers
        for start, end in sample.answers:
            assert words(sample.ids[start - 1 : start]) == "<assistant>"
            assert words(sample.ids[end - 1 : end]) == "<end>"
        assert row.answer_S.sum() == len(sample.answer_ids)
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
