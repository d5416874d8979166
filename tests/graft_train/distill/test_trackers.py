"""Each tracker, where it is installed, is sent what metrics.jsonl has."""

import json
import math

import pytest

from graft_inference import GraftError
from graft_train.distill import distill

from .test_distill import make_run


def check_wandb(directory, expected):
    """What runs offline keeps values as JSON in a file of records."""
    (path,) = (directory / "wandb").glob("offline-run-*/run-*.wandb")
    kept = path.read_bytes()
    for _, *values in expected:
        assert all(json.dumps(value).encode() in kept for value in values)


def check_tensorboard(directory, expected):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory / "graft-train")).Reload()
    lengths, losses = events.Scalars("acceptance_length"), events.Scalars("loss/0")
    check([(one.step, one.value, loss.value) for one, loss in zip(lengths, losses, strict=True)], expected)


def check_trackio(directory, expected):
    from trackio.sqlite_storage import SQLiteStorage

    (run,) = SQLiteStorage.get_runs("graft-train")
    logs = SQLiteStorage.get_logs("graft-train", run)
    check([(one["step"], one["acceptance_length"], one["loss/0"]) for one in logs if "loss/0" in one], expected)


def check(found, expected):
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert all(math.isclose(a, b, rel_tol=1e-6) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("name", ["wandb", "tensorboard", "trackio"])
def test_a_tracker_has_every_logged_step(tmp_path, monkeypatch, capsys, name):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # which is read when trackio is imported
    pytest.importorskip(name)
    directory = distill(make_run(tmp_path, trackers=[name], max_steps=3))
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    expected = [(one["step"], one["acceptance_length"], one["loss"][0]) for one in lines if "loss" in one]
    assert len(expected) == 3
    {"wandb": check_wandb, "tensorboard": check_tensorboard, "trackio": check_trackio}[name](directory, expected)
    assert "which failed" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("clearml", r"head\.trackers names clearml, which is not installed: pip install clearml"),
        ("comet_ml", r"head\.trackers names comet_ml, which is not installed: pip install comet-ml"),
        (
            "diary",
            r"head\.trackers names diary, which accelerate does not know: choose of .*tensorboard, trackio, wandb",
        ),
        ("all", r"head\.trackers names all, which accelerate does not know"),
    ],
)
def test_a_tracker_that_is_not_there_is_named_before_anything_runs(tmp_path, name, says):
    with pytest.raises(GraftError, match=says):
        distill(make_run(tmp_path, trackers=["wandb", name]))
