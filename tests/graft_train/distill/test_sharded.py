"""A target shared out over processes, and target states that several processes write together."""

import json
from pathlib import Path

import pytest

from graft_train.distill import distill, state_source

from .pair import tiny_target
from .ranks import deepspeed, run_ranks, torchrun
from .test_distill import make_run
from .test_parallel import assert_same_training, measured_acceptance_length

CHANGES = {"max_steps": 4, "measure_every": 2, "measure_prompts": 3, "measure_tokens": 6}


def prepare(directory: Path, **changes):
    """A run whose target has a vocabulary that two processes can halve."""
    config = make_run(directory, **(CHANGES | changes))
    tiny_target(vocab_size=32).save_pretrained(config.target.name_or_path)
    return config


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    return distill(prepare(tmp_path_factory.mktemp("alone"), states="disk"))


def launch(directory: Path, launcher: tuple[str, ...], kill: int = -1, during: str = "step", **changes):
    prepare(directory, **changes)
    return run_ranks(directory, json.dumps(CHANGES | changes), launcher, kill, during)


@pytest.mark.parametrize("states", ["online", "disk"])
@pytest.mark.parametrize(("shard", "launcher"), [("tp", torchrun(2)), ("zero3", deepspeed(3, 2))])
def test_a_target_shared_out_trains_as_one_process(tmp_path, alone, shard, launcher, states):
    run = launch(tmp_path, launcher, shard_target=shard, states=states)
    assert run.returncode == 0, run.stderr[-3000:]
    head = tmp_path / "run" / "head"
    assert_same_training(head, alone, 1e-4)
    assert measured_acceptance_length(alone) is not None


@pytest.mark.parametrize(("shard", "launcher"), [(None, torchrun(2)), ("zero3", deepspeed(3, 2))])
def test_several_processes_write_the_shards_that_one_writes_and_go_on_after_a_kill(
    tmp_path, monkeypatch, shard, launcher
):
    monkeypatch.setattr(state_source, "SHARD_TOKENS", 60)  # as in the processes
    changes = {"states": "disk", "max_steps": 1, "measure_every": None, "dtype": "bfloat16"}
    distill(prepare(tmp_path / "one", **changes))
    expected = contents(tmp_path / "one" / "run" / "states")
    changes["shard_target"] = shard
    killed = launch(tmp_path, launcher, kill=1, during="states", **changes)
    assert killed.returncode != 0
    partial = contents(tmp_path / "run" / "states.partial")
    assert partial.items() < expected.items()
    assert any(name.startswith("shard") for name in partial)
    run = launch(tmp_path, launcher, **changes)
    assert run.returncode == 0, run.stderr[-3000:]
    assert contents(tmp_path / "run" / "states") == expected
    assert sum(name.startswith("shard") for name in expected) == 5  # one process has one more than the other


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}
