"""Killed processes, several processes, and DeepSpeed: the same losses as one process left alone."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from graft_train.data.samples import answered, append_samples
from graft_train.distill import distill
from graft_train.trained import trained_head
from tests.hub import serve

from .pair import samples
from .ranks import deepspeed, run_ranks, torchrun, was_killed
from .test_distill import distill_until_killed, load_curve, make_run, metrics

# Some steps' gradients are longer than the clip and some are not: AdamW alone would forgive a wrong scale.
CHANGES = {
    "max_steps": 4,
    "batches_per_step": 4,
    "checkpoint_every": 2,
    "measure_prompts": 3,
    "measure_tokens": 6,
    "clip": 10.0,
    "feature_noise": 0.05,
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """The head that one process makes, uninterrupted."""
    return distill(make_run(tmp_path_factory.mktemp("alone"), **CHANGES))


@pytest.fixture(scope="module")
def early(tmp_path_factory) -> dict[str, torch.Tensor]:
    """The head that one process had at its first checkpoint, after two steps."""
    directory = tmp_path_factory.mktemp("early")
    with pytest.MonkeyPatch.context() as patch:
        distill_until_killed(make_run(directory, **CHANGES), 3, patch)
    return head_in_checkpoint(directory)


def head_in_checkpoint(directory: Path, stage: str = "head.partial") -> dict[str, torch.Tensor]:
    """What `adopt` makes of the checkpoint after two steps, and `export` of that."""
    return trained_head(directory / "run" / stage / "checkpoints" / "step-00000002").state_dict()


def assert_same_head(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-4, rtol=1e-3, msg=name)


def head_of(directory: Path, changes: dict = CHANGES, **how) -> Path:
    make_run(directory, **changes)
    run = run_ranks(directory, json.dumps(changes), **how)
    assert run.returncode == 0, run.stderr[-3000:]
    return directory / "run" / "head"


def measured_acceptance_length(head: Path) -> float | None:
    return json.loads((head / "training.json").read_text())["measured_acceptance_length"]


def assert_same_training(head: Path, alone: Path, tolerance: float) -> None:
    for one, two in zip(load_curve(alone), load_curve(head), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=tolerance)
    assert measured_acceptance_length(head) == measured_acceptance_length(alone)
    expected = load_file(alone / "model.safetensors")
    for name, tensor in load_file(head / "model.safetensors").items():
        torch.testing.assert_close(tensor, expected[name], atol=tolerance, rtol=10 * tolerance, msg=name)


@pytest.mark.parametrize(("kill", "during"), [(3, "step"), (2, "saving")])
def test_after_a_kill_the_curve_goes_on_to_the_bit(tmp_path, alone, kill, during):
    """Killed between two checkpoints, and in the midst of writing the first one."""
    make_run(tmp_path, **CHANGES)
    assert was_killed(run_ranks(tmp_path, json.dumps(CHANGES), kill=kill, during=during))
    saved = sorted(path.name for path in (tmp_path / "run" / "head.partial" / "checkpoints").iterdir())
    assert saved == ["step-00000002.partial" if during == "saving" else "step-00000002"]
    head = distill(make_run(tmp_path, **CHANGES))
    assert metrics(head) == metrics(alone)
    for name, tensor in load_file(alone / "model.safetensors").items():
        assert torch.equal(load_file(head / "model.safetensors")[name], tensor), name


def test_two_processes_train_as_one(tmp_path, alone):
    assert_same_training(head_of(tmp_path, launcher=torchrun(2)), alone, 1e-4)
    assert measured_acceptance_length(alone) is not None


def test_a_process_whose_answers_have_one_token_takes_part(tmp_path):
    """And steps in which no process has anything to train on."""
    few = [answered(f"few{n}", [1, 2, 3], [4], {}) for n in range(12)]
    changes = {"max_steps": 10, "batch_tokens": 4, "log_every": 1}
    heads = []
    for name, launcher in (("one", ()), ("two", torchrun(2))):
        make_run(tmp_path / name, **changes)
        with (tmp_path / name / "run" / "data" / "samples.jsonl").open("wb") as file:
            append_samples(file, few + samples(8))
        heads.append(head_of(tmp_path / name, changes, launcher=launcher))
    assert_same_training(heads[1], heads[0], 1e-4)
    drafts = [any(line["loss"]) for line in metrics(heads[0])]
    assert any(drafts)
    assert not all(drafts)


def test_one_process_goes_on_from_two(tmp_path, alone, early):
    make_run(tmp_path, **CHANGES)
    killed = run_ranks(tmp_path, json.dumps(CHANGES), torchrun(2), kill=3)
    assert killed.returncode != 0
    assert_same_head(head_in_checkpoint(tmp_path), early)
    assert_same_training(distill(make_run(tmp_path, **CHANGES)), alone, 1e-4)


@pytest.mark.parametrize("launcher", [torchrun(2), deepspeed(3, 2)])
def test_a_block_head_trains_in_two_processes_as_in_one(tmp_path, launcher):
    block = {"block_size": 4, "anchors": 10, "sample_from_anchor": True, "markov_rank": 4, "loss": "dspark"}
    changes = CHANGES | {"family": "block", "aux_layer_ids": [0, 2], "block": block}
    alone = distill(make_run(tmp_path / "alone", **changes))
    assert_same_training(head_of(tmp_path / "two", changes, launcher=launcher), alone, 1e-4)


@pytest.mark.parametrize("stage", [2, 3])
def test_zero_trains_in_bf16(tmp_path, alone, stage):
    """There the parameters themselves are bf16, as they are nowhere else."""
    head = head_of(tmp_path, CHANGES | {"mixed_precision": "bf16"}, launcher=deepspeed(stage, 2))
    for one, two in zip(load_curve(alone), load_curve(head), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=0.05)


def test_zero_3_trains_as_one_process_and_pushes_whole_heads(tmp_path, alone, early, monkeypatch):
    """Its checkpoints hold shares of the head, which are put together in one process."""
    changes = CHANGES | {"push_every": 2, "repo_id": "someone/head", "keep_checkpoints": 2}
    with serve() as hub:
        client = {"ENDPOINT": hub.url, "TOKEN": hub.token, "HUB_OFFLINE": "0", "HUB_DISABLE_XET": "1"}
        for name, value in client.items():
            monkeypatch.setenv(f"HF_{name}", value)
        head = head_of(tmp_path, changes, launcher=deepspeed(3, 2), during="keeping")
        pushed = hub.repositories["someone/head"].at("main")["model.safetensors"]
    assert_same_training(head, alone, 1e-4)
    assert_same_head(head_in_checkpoint(tmp_path, "head"), early)
    assert pushed == (head / "model.safetensors").read_bytes()
    assert json.loads((head / "training.json").read_text())["pushed"]["step"] == 4


def test_zero_2_killed_goes_on_as_one_process_would_but_with_as_many_processes_only(tmp_path, alone, early):
    make_run(tmp_path, **CHANGES)
    killed = run_ranks(tmp_path, json.dumps(CHANGES), deepspeed(2, 2), kill=3)
    assert killed.returncode != 0
    assert_same_head(head_in_checkpoint(tmp_path), early)
    other = run_ranks(tmp_path, json.dumps(CHANGES), deepspeed(2, 1))
    assert "written by 2 processes at ZeRO stage 2; this is 1" in other.stderr
    assert_same_training(head_of(tmp_path, launcher=deepspeed(2, 2)), alone, 1e-4)
