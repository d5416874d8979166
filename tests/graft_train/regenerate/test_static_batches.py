"""Off the CPU transformers answers whole batches; a kill loses or doubles none."""

import pytest
import torch

import graft_train.regenerate.static_batches as module
from graft_train.data.prompts import Prompt
from graft_train.data.samples import read_samples
from graft_train.data.target import load_target
from graft_train.regenerate.static_batches import answer_in_static_batches, drop_torn_batch
from tests.graft_inference.tiny_bundle import write_target
from tests.graft_train.tiny_run import tiny_config

ENDS = {35}
PROMPTS = [Prompt(f"p{number}", [(number * 7 + place) % 60 for place in range(3 + number % 4)]) for number in range(12)]


@pytest.fixture
def config(tmp_path):
    write_target(tmp_path / "target")
    return tiny_config(tmp_path, tmp_path)


def test_greedy_answers_are_generates(config, tmp_path):
    answer_in_static_batches(PROMPTS, tmp_path / "samples.jsonl", config, ENDS)
    samples = read_samples(tmp_path / "samples.jsonl", "train")
    assert sorted(sample.id for sample in samples) == sorted(prompt.id for prompt in PROMPTS)
    assert {sample.sampling["temperature"] for sample in samples} == {0.0, 0.8}
    model = load_target(config.target)
    for sample in [sample for sample in samples if sample.sampling["temperature"] == 0]:
        prompt = torch.tensor([sample.prompt_ids])
        mask = torch.ones_like(prompt)
        plain = model.generate(prompt, attention_mask=mask, max_new_tokens=8, do_sample=False, eos_token_id=35)
        assert sample.answer_ids == plain[0, prompt.shape[1] :].tolist()


def test_killed_and_resumed_equals_uninterrupted(config, tmp_path, monkeypatch):
    answer_in_static_batches(PROMPTS, tmp_path / "whole.jsonl", config, ENDS)
    expected = (tmp_path / "whole.jsonl").read_bytes()
    answer, calls = module.answer, []

    def dying(*arguments):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(1)
        return answer(*arguments)

    killed = tmp_path / "killed.jsonl"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "answer", dying)
        answer_in_static_batches(PROMPTS, killed, config, ENDS)
    with killed.open("ab") as file:  # what a kill in the middle of a write leaves
        file.write(expected.splitlines(keepends=True)[8] + b'{"id": "torn')
    answer_in_static_batches(PROMPTS, killed, config, ENDS)
    assert killed.read_bytes() == expected


def test_nothing_to_drop_from_a_file_that_is_not_there(tmp_path):
    assert drop_torn_batch(tmp_path / "samples.jsonl", [4, 4]) == 0
