"""Heads that go to the Hub while training goes on: what is pushed, what is not pushed twice, and what fails."""

import json
import threading
from functools import partial
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load, load_file

from graft_inference import GraftError
from graft_inference.heads.families import load_any_head
from graft_train import distill as stage_module
from graft_train import hub as hub_module
from graft_train.config.export import ExportConfig
from graft_train.distill import distill, loop
from graft_train.hub import HeadPusher
from graft_train.trained import trained_head
from tests.hub import serve

from .test_distill import distill_until_killed, make_run

REPO = "someone/head"


class Waiting(huggingface_hub.HfApi):
    """Pushes before training goes on, so that it is certain which heads are pushed."""

    def run_as_future(self, *arguments, **named):
        going = super().run_as_future(*arguments, **named)
        going.result()
        return going


@pytest.fixture
def hub(monkeypatch):
    """The client speaks to a Hub on the loopback, one push at a time."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    with serve() as found:
        monkeypatch.setattr(hub_module, "HfApi", partial(Waiting, endpoint=found.url, token=found.token))
        yield found


def commits(hub) -> list[dict[str, bytes]]:
    """Without the one that a new repository begins with."""
    return list(hub.repositories[REPO].commits.values())[1:]


def weights(files: dict[str, bytes]) -> dict[str, torch.Tensor]:
    return load(files["model.safetensors"])


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("family", ["eagle3", "block"])
def test_the_heads_on_the_hub_are_those_of_the_steps_as_they_are_served(tmp_path, hub, monkeypatch, family, capsys):
    block = {"block": {"block_size": 4, "causal": False}, "aux_layer_ids": [0, 2]} if family == "block" else {}
    changes = {"max_steps": 5, "push_every": 2, "checkpoint_every": 2, "family": family, **block}
    config = make_run(tmp_path, repo_id=REPO, **changes)
    distill_until_killed(config, 3, monkeypatch)
    early = trained_head(tmp_path / "run" / "head.partial" / "checkpoints" / "step-00000002")
    head = distill(config)
    pushed = commits(hub)
    assert len(pushed) == 3  # of steps 2, 4 and 5
    assert all(set(files) == {".gitattributes", "config.json", "model.safetensors"} for files in pushed)
    assert same(weights(pushed[0]), early.state_dict())
    assert same(weights(pushed[2]), load_any_head(head, 4).state_dict())
    values = json.loads(pushed[2]["config.json"])
    target = str((tmp_path / "tiny").resolve())
    assert values["speculators_config"]["verifier"] == {"name_or_path": target, "architectures": ["LlamaForCausalLM"]}
    last = list(hub.repositories[REPO].commits)[-1]
    record = {"asked": REPO, "repo_id": REPO, "step": 5, "commit": last}
    assert json.loads((head / "training.json").read_text())["pushed"] == record
    assert f"newest head on the Hub: step 5 in {REPO}, commit {last}" in capsys.readouterr().out


def test_a_resumed_training_pushes_nothing_twice(tmp_path, hub, monkeypatch):
    """Killed before step 6, it goes on from the checkpoint of step 3, behind what it has pushed."""
    changes = {"max_steps": 7, "push_every": 2, "checkpoint_every": 3}
    config = make_run(tmp_path, repo_id=REPO, **changes)
    distill_until_killed(config, 5, monkeypatch)
    assert len(commits(hub)) == 2
    head = distill(config)
    pushed = commits(hub)
    assert len(pushed) == 4  # of steps 2, 4, 6 and 7
    assert same(weights(pushed[3]), load_file(head / "model.safetensors"))


def test_a_training_that_starts_again_pushes_again(tmp_path, hub, monkeypatch):
    changes = {"max_steps": 4, "push_every": 2, "checkpoint_every": 2}
    distill_until_killed(make_run(tmp_path, repo_id=REPO, **changes), 3, monkeypatch)
    distill(make_run(tmp_path, repo_id=REPO, resume="never", **changes))
    assert len(commits(hub)) == 3


def test_training_does_not_wait_for_a_push(tmp_path, hub, monkeypatch, capsys):
    """The first push ends only when the last step has been taken; those between are left out, the last head is not."""
    monkeypatch.setattr(hub_module, "HfApi", partial(huggingface_hub.HfApi, endpoint=hub.url, token=hub.token))
    over, real_step, real_writer, waited = threading.Event(), loop.train_step, stage_module.head_writer, []

    def writer(target):
        def write(head, directory):
            waited.append(over.wait(60))
            real_writer(target)(head, directory)

        return write

    def step(training, batches, rate):
        result = real_step(training, batches, rate)
        if max(batches) == 11:  # two batches a step, and six steps
            over.set()
        return result

    monkeypatch.setattr(stage_module, "head_writer", writer)
    monkeypatch.setattr(loop, "train_step", step)
    head = distill(make_run(tmp_path, repo_id=REPO, max_steps=6, push_every=1))
    assert waited == [True, True]
    assert len(commits(hub)) == 2
    assert same(weights(commits(hub)[1]), load_file(head / "model.safetensors"))
    assert "the head of step 3 is not pushed, as the one before is still on its way" in capsys.readouterr().out


def test_what_cannot_be_pushed_is_told_and_training_goes_on(tmp_path, hub, monkeypatch, capsys):
    monkeypatch.setattr(hub_module, "HfApi", partial(Waiting, endpoint=hub.url, token="hf_wrong"))
    head = distill(make_run(tmp_path, repo_id=REPO, max_steps=3, push_every=2))
    assert hub.repositories == {}
    assert json.loads((head / "training.json").read_text())["pushed"] is None
    told = capsys.readouterr().out
    for step in (2, 3):
        assert f"warning: the head of step {step} could not be pushed to {REPO}: " in told
    assert "newest head on the Hub: none" in told


def test_a_push_that_does_not_end_is_left_to_itself(tmp_path, hub, monkeypatch, capsys):
    monkeypatch.setattr(hub_module, "HfApi", partial(huggingface_hub.HfApi, endpoint=hub.url, token=hub.token))
    monkeypatch.setattr(hub_module, "PATIENCE_S", 0.2)
    may_end, asked = threading.Event(), []

    def write(head, directory: Path) -> None:
        asked.append(head)
        may_end.wait(60)
        (directory / "config.json").write_text("{}")

    pusher = HeadPusher(tmp_path, ExportConfig(repo_id=REPO), write)
    pusher.offer(1, "first")
    assert pusher.finish(2, "last") is None
    assert "a push is not done after 0.2 s, and is left to itself" in capsys.readouterr().out
    may_end.set()
    monkeypatch.setattr(hub_module, "PATIENCE_S", 60)
    assert pusher.finish(2, "last")["step"] == 2
    assert asked == ["first", "last"]


def test_a_record_that_cannot_be_read_stops_nothing(tmp_path, hub):
    (tmp_path / "pushed.json").write_text("{")
    pusher = HeadPusher(tmp_path, ExportConfig(repo_id=REPO), lambda head, directory: (directory / "a").write_text("a"))
    assert pusher.finish(3, None)["step"] == 3


def test_a_bundle_keeps_its_head(tmp_path, hub, capsys):
    def nothing(head, directory: Path) -> None:
        raise AssertionError

    Waiting(endpoint=hub.url, token=hub.token).create_repo(REPO)
    hub.repositories[REPO].commit({"graft.json": b"{}"})
    pusher = HeadPusher(tmp_path, ExportConfig(repo_id=REPO), nothing)
    assert pusher.finish(3, None) is None
    assert "could not be pushed to someone/head: it holds a bundle" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("repo_id", "message"), [(None, "head.push_every=2 needs export.repo_id"), ("a b/c", "repo_id=a b/c is not a Hub")]
)
def test_a_push_without_a_repository_is_refused_before_any_work(tmp_path, repo_id, message):
    with pytest.raises(GraftError, match=message):
        distill(make_run(tmp_path, repo_id=repo_id, push_every=2))
    assert not (tmp_path / "run" / "head.partial").exists()
