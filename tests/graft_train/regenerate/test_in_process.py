"""Answers are the target's own, and a kill loses or doubles none."""

import json
import shutil
from itertools import islice

import pytest
import torch

import graft_train.regenerate.in_process as module
from graft_train.data.samples import read_samples
from graft_train.data.target import load_target
from graft_train.regenerate import regenerate
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
    return sorted(path.joinpath("samples.jsonl").read_bytes().splitlines(keepends=True))


def copy_of(config, root):
    copy = tiny_config(root, root)
    copy.target.name_or_path, copy.data = f"{config.run_dir}/target", config.data
    return copy


def test_killed_and_resumed_equals_uninterrupted(config, tmp_path, monkeypatch):
    whole, killed = (copy_of(config, tmp_path / name) for name in ("whole", "killed"))
    expected = answers_of(regenerate(whole))
    answers = module.answers

    def dying(*arguments):
        yield from islice(answers(*arguments), 5)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "answers", dying)
        regenerate(killed)
    partial = tmp_path / "killed" / "data.partial" / "samples.jsonl"
    assert set(answers_of(partial.parent)) < set(expected)
    with partial.open("ab") as file:  # what a kill in the middle of a write leaves
        file.write(expected[8][:20])
    asked = []
    monkeypatch.setattr(
        module, "answers", lambda engine, pending, *rest: asked.extend(pending) or answers(engine, pending, *rest)
    )
    assert answers_of(regenerate(killed)) == expected
    assert len(asked) == 12 - 5


def test_an_answer_does_not_depend_on_how_many_are_under_way(config, tmp_path):
    expected = answers_of(regenerate(config))
    copy = copy_of(config, tmp_path)
    copy.regenerate.batch = 1
    assert answers_of(regenerate(copy)) == expected


def test_greedy_answers_are_generates(config):
    samples = read_samples(regenerate(config) / "samples.jsonl", "train")
    assert len(samples) == 12
    drawn = sorted((sample.sampling["seed"], sample.sampling["temperature"]) for sample in samples)
    assert drawn == [(config.seed + number, (0.0, 0.8)[number % 2]) for number in range(12)]
    model = load_target(config.target)
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
