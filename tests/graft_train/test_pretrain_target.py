import json
import shutil
import subprocess
import sys
from unittest import mock

import pytest
import torch

import graft_train.pretrain_target as module
from graft_inference import GraftError
from graft_train.config import Config
from graft_train.config.data import DataConfig
from graft_train.config.pretrain_target import PretrainConfig
from graft_train.config.target import TargetConfig
from graft_train.pretrain_target import batch_rows, pretrain_target, rate
from tests.graft_train.distill.ranks import environment, torchrun
from tests.graft_train.tiny_run import tiny_config, write_sources


def test_every_epoch_visits_every_row_once():
    rows = torch.cat([batch_rows(step, rows=10, batch=4, seed=0) for step in range(5)])
    assert sorted(rows[:10].tolist()) == list(range(10))
    assert sorted(rows[10:].tolist()) == list(range(10))
    assert rows[:10].tolist() != rows[10:].tolist()


def test_rate_warms_up_holds_and_cools_down():
    settings = PretrainConfig(steps=100, warmup=10, cooldown=0.5)
    assert rate(0, settings) == pytest.approx(0.1)
    assert rate(30, settings) == 1.0
    assert rate(75, settings) == pytest.approx(0.5)
    assert rate(99, settings) == pytest.approx(0.02)


def test_resume_equals_no_interruption(tmp_path, monkeypatch):
    write_sources(tmp_path / "sources")
    whole = tiny_config(tmp_path / "whole", tmp_path / "sources")
    expected = weights(pretrain_target(whole))

    interrupted = tiny_config(tmp_path / "interrupted", tmp_path / "sources")
    save = module._checkpoint

    def die_after_saving(accelerator, directory, step):
        save(accelerator, directory, step)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "_checkpoint", die_after_saving)
        pretrain_target(interrupted)
    assert not (tmp_path / "interrupted" / "target").exists()
    found = weights(pretrain_target(interrupted))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not (tmp_path / "interrupted" / "target" / "checkpoint").exists()


SCRIPT = """
import sys
from pathlib import Path
from graft_train.pretrain_target import pretrain_target
from tests.graft_train.tiny_run import tiny_config

pretrain_target(tiny_config(Path(sys.argv[1]), Path(sys.argv[2])))
"""


def test_a_kill_while_the_last_checkpoint_was_deleted_is_got_over(tmp_path, monkeypatch):
    """Both lie there then, and the next checkpoint takes their places."""
    write_sources(tmp_path / "sources")
    config = tiny_config(tmp_path / "run", tmp_path / "sources")
    config.pretrain_target.checkpoint_every = 1
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "held_out_loss", mock.Mock(side_effect=KeyboardInterrupt))  # after the last step
        pretrain_target(config)
    partial = tmp_path / "run" / "target.partial"
    shutil.copytree(partial / "checkpoint", partial / "checkpoint.old")
    (partial / "checkpoint" / "step.json").write_text(json.dumps({"step": 2}))
    finished = pretrain_target(config)
    assert not list(finished.glob("checkpoint*"))


def test_two_processes_train_what_one_does(tmp_path):
    """Schedules and batches count the same; AdamW's first steps amplify roundings, so the loss is compared."""
    write_sources(tmp_path / "sources")
    alone = pretrain_target(tiny_config(tmp_path / "alone", tmp_path / "sources"))
    (tmp_path / "here.py").write_text(SCRIPT)
    run = subprocess.run(
        [sys.executable, *torchrun(2), str(tmp_path / "here.py"), str(tmp_path / "both"), str(tmp_path / "sources")],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    losses = [
        json.loads((directory / "pretraining.json").read_text())["held_out_loss"]
        for directory in (alone, tmp_path / "both" / "target")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_a_batch_that_processes_cannot_share_is_named(tmp_path, monkeypatch):
    write_sources(tmp_path / "sources")
    monkeypatch.setattr(module, "new_accelerator", lambda **_: mock.Mock(num_processes=3))
    with pytest.raises(GraftError, match=r"pretrain_target\.batch=4 sequences cannot be shared by 3 processes"):
        pretrain_target(tiny_config(tmp_path / "run", tmp_path / "sources"))


def weights(directory):
    from safetensors.torch import load_file

    return load_file(directory / "model.safetensors")


def test_a_target_of_ones_own_is_not_pretrained(tmp_path):
    config = Config(run_dir=str(tmp_path), target=TargetConfig(name_or_path="somewhere"), data=DataConfig())
    with pytest.raises(GraftError, match="there is no target to pretrain"):
        pretrain_target(config)
