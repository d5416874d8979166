"""Answers are the target's own, and a kill loses or doubles none."""

import json
import shutil

import pytest
import torch

import graft_train.regenerate.in_process as module
from graft_train.data.samples import read_samples
from graft_train.data.target import load_target
from graft_train.regenerate import regenerate
from graft_train.regenerate.in_process import drop_torn_batch
from tests.graft_inference.tiny_bundle import write_target
from tests.graft_train.tiny_run import tiny_config, write_sources


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    root = tmp_path_factory.mktemp("regenerate")
    write_sources(root / "sources")
    config = tiny_config(root / "run", root / "sources")
    write_target(root / "run" / "target")
    return config


def answers_of(path):
    return path.joinpath("samples.jsonl").read_bytes()


def test_killed_and_resumed_equals_uninterrupted(config, tmp_path, monkeypatch):
    target = f"{config.run_dir}/target"
    configs = [tiny_config(tmp_path / name, tmp_path) for name in ("whole", "killed")]
    for copy in configs:
        copy.target.name_or_path, copy.data = target, config.data
    expected = answers_of(regenerate(configs[0]))

    answer, calls = module.answer, []

    def dying(*arguments):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(1)
        return answer(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "answer", dying)
        regenerate(configs[1])
    partial = tmp_path / "killed" / "data.partial" / "samples.jsonl"
    with partial.open("ab") as file:  # what a kill in the middle of a write leaves
        file.write(expected.splitlines(keepends=True)[8] + b'{"id": "torn')
    assert answers_of(regenerate(configs[1])) == expected


def test_greedy_answers_are_generates(config):
    samples = read_samples(regenerate(config) / "samples.jsonl", "train")
    assert len(samples) == 12
    assert {sample.sampling["temperature"] for sample in samples} == {0.0, 0.8}
    model = load_target(config)
    for sample in [sample for sample in samples if sample.sampling["temperature"] == 0][:4]:
        prompt = torch.tensor([sample.prompt_ids])
        plain = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False)
        assert sample.answer_ids == plain[0, prompt.shape[1] :].tolist()


def test_a_targets_own_generation_settings_do_not_change_its_answers(config, tmp_path):
    """They would make the distribution another than the one that the head learns."""
    expected = answers_of(regenerate(config))
    copy = tiny_config(tmp_path / "run", tmp_path)
    copy.data, copy.target.name_or_path = config.data, str(shutil.copytree(f"{config.run_dir}/target", tmp_path / "t"))
    settings = tmp_path / "t" / "generation_config.json"
    own = {"min_p": 0.3, "no_repeat_ngram_size": 1, "suppress_tokens": list(range(5, 60)), "repetition_penalty": 2.0}
    settings.write_text(json.dumps(json.loads(settings.read_text()) | own))
    assert answers_of(regenerate(copy)) == expected


def test_splits_share_no_document(config):
    path = regenerate(config) / "samples.jsonl"
    documents = {
        split: {sample.id.split("@")[0] for sample in read_samples(path, split)}
        for split in ("train", "calibration", "evaluation")
    }
    assert not documents["train"] & documents["calibration"]
    assert not documents["train"] & documents["evaluation"]
    assert not documents["calibration"] & documents["evaluation"]


def test_nothing_to_drop_from_a_file_that_is_not_there(tmp_path):
    assert drop_torn_batch(tmp_path / "samples.jsonl", [4, 4]) == 0
