"""Stages are built once, resumed when interrupted, reused while nothing changed, refused when it did."""

import errno
import fcntl
import json
import os
import shutil
import time
from pathlib import Path
from threading import Event, Thread
from types import SimpleNamespace
from typing import Any

import pytest

from graft_inference.errors import GraftError
from graft_train.config.target import TargetConfig
from graft_train.stage import run_stage


def stage(
    run_dir: Path,
    build: Any,
    rate: float = 0.1,
    inputs: Any = (),
    target: str | None = None,
    scratch: Any = (),
    alone: bool = False,
) -> Path:
    config: Any = SimpleNamespace(run_dir=str(run_dir), target=TargetConfig(name_or_path=target))
    return run_stage(config, "distill", "head", {"head": {"lr": rate}}, inputs, build, scratch, alone)


def test_builds_once_and_then_reuses(tmp_path, capsys):
    built: list[Path] = []
    for _ in range(2):
        assert stage(tmp_path, built.append) == tmp_path / "head"
    assert built == [tmp_path / "head.partial"]
    assert f"distill: reusing {tmp_path / 'head'}" in capsys.readouterr().out
    assert {"fingerprint", "seconds", "versions"} <= json.loads((tmp_path / "head/stage.json").read_text()).keys()


def test_resumes_inside_what_an_interruption_left(tmp_path):
    def interrupted(directory: Path) -> None:
        (directory / "half").write_text("work")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stage(tmp_path, interrupted)
    assert not (tmp_path / "head").exists()
    stage(tmp_path, lambda directory: (directory / "half").rename(directory / "whole"))
    assert (tmp_path / "head/whole").read_text() == "work"


@pytest.mark.parametrize("finished", [True, False])
def test_other_settings_are_refused_and_nothing_is_touched(tmp_path, finished):
    def build(directory: Path) -> None:
        (directory / "weights").write_text("dear")
        if not finished:
            raise KeyboardInterrupt

    if finished:
        stage(tmp_path, build)
    else:
        with pytest.raises(KeyboardInterrupt):
            stage(tmp_path, build)
    with pytest.raises(GraftError, match=r"head\.lr: 0\.1 -> 0\.2.*another run_dir"):
        stage(tmp_path, lambda directory: pytest.fail("built"), rate=0.2)
    where = "head" if finished else "head.partial"
    assert (tmp_path / where / "weights").read_text() == "dear"


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"fingerprint": 3}', "[" * 100_000, '{"fingerprint": NaN}'])
def test_a_damaged_record_is_told(tmp_path, content):
    stage(tmp_path, lambda directory: None)
    (tmp_path / "head" / "stage.json").write_text(content)
    with pytest.raises(GraftError, match=r"stage\.json .*delete .*head and build it anew"):
        stage(tmp_path, lambda directory: pytest.fail("built"))


def test_a_mistake_found_before_the_first_write_can_be_mended_by_other_settings(tmp_path):
    def mistaken(directory: Path) -> None:
        raise GraftError("bad record")

    with pytest.raises(GraftError, match="bad record"):
        stage(tmp_path, mistaken)
    stage(tmp_path, lambda directory: None, rate=0.2)
    assert json.loads((tmp_path / "head/stage.json").read_text())["settings"]["head"]["lr"] == 0.2


@pytest.mark.parametrize("left", [(), (".stage.json.partial",), ("stage.json", ".tmpX3f9"), ("stage.json", ".a/b")])
def test_what_a_kill_leaves_of_the_first_writes_is_begun_anew(tmp_path, left):
    (tmp_path / "head.partial").mkdir()
    for name in left:
        path = tmp_path / "head.partial" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text('{"fingerprint": "of other settings"}' if name == "stage.json" else "torn")
    stage(tmp_path, lambda directory: None)
    assert [path.name for path in (tmp_path / "head").iterdir()] == ["stage.json"]


def test_a_stage_killed_before_its_last_renaming_is_not_built_again(tmp_path):
    stage(tmp_path, lambda directory: (directory / "weights").write_text("dear"), scratch=["half"])
    (tmp_path / "head").rename(tmp_path / "head.partial")
    (tmp_path / "head.partial" / "half").mkdir()
    stage(tmp_path, lambda directory: pytest.fail("built"), scratch=["half"])
    assert sorted(path.name for path in (tmp_path / "head").iterdir()) == ["stage.json", "weights"]


def make_run_dir_a_file(run_dir: Path) -> None:
    run_dir.write_text("mine")


def make_run_dir_dangle(run_dir: Path) -> None:
    run_dir.symlink_to("nowhere")


def make_the_directory_dangle(run_dir: Path) -> None:
    run_dir.mkdir()
    (run_dir / "head").symlink_to("nowhere")


def make_the_directory_a_file(run_dir: Path) -> None:
    run_dir.mkdir()
    (run_dir / "head").write_text("mine")


def make_the_partial_directory_a_file(run_dir: Path) -> None:
    run_dir.mkdir()
    (run_dir / "head.partial").write_text("mine")


@pytest.mark.parametrize(
    "make",
    [
        make_run_dir_a_file,
        make_run_dir_dangle,
        make_the_directory_dangle,
        make_the_directory_a_file,
        make_the_partial_directory_a_file,
    ],
)
def test_a_path_that_cannot_be_a_directory_is_told_before_anything_is_built(tmp_path, make):
    make(tmp_path / "run")
    with pytest.raises(GraftError, match=rf"{tmp_path / 'run'}.*use another run_dir"):
        stage(tmp_path / "run", lambda directory: pytest.fail("built"))


def test_a_directory_removed_while_its_stage_runs_is_told(tmp_path):
    with pytest.raises(GraftError, match=r"head\.partial.*No such file.*whether something else changed it"):
        stage(tmp_path, shutil.rmtree)


def test_what_is_no_fault_of_the_disk_keeps_its_traceback(tmp_path):
    def fails(directory: Path) -> None:
        (tmp_path.parent / "elsewhere" / "x").read_text()

    with pytest.raises(FileNotFoundError):
        stage(tmp_path / "run", fails)


GONE = [
    "[gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:27574: Connection reset by peer. This is typically",
    "[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4711",
    "NCCL error: remote process exited or there was a network error\nncclRemoteError: A call failed possibly due to",
]


@pytest.mark.parametrize("said", GONE)
def test_that_another_process_has_ended_is_told_and_no_other_mistake_is_taken_for_it(tmp_path, said):
    def fails(directory: Path) -> None:
        raise RuntimeError(said)

    with pytest.raises(GraftError, match=r"another process of this launch has ended.*run the same command again"):
        stage(tmp_path, fails)
    said = "shapes do not match"
    with pytest.raises(RuntimeError, match="shapes"):
        stage(tmp_path, fails)


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_stops_no_stage(tmp_path, monkeypatch, code):
    def unsupported(descriptor: int, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    assert stage(tmp_path, lambda directory: None) == tmp_path / "head"
    assert [path.name for path in tmp_path.iterdir()] == ["head"]


def test_a_lock_that_the_dead_left_is_nobodys(tmp_path):
    (tmp_path / ".head.lock").write_text("process 1 on elsewhere")
    stage(tmp_path, lambda directory: None)
    assert [path.name for path in tmp_path.iterdir()] == ["head"]


def test_processes_other_than_the_main_one_build_under_its_lock(tmp_path, monkeypatch):
    def build(directory: Path) -> None:
        with monkeypatch.context() as patch:
            patch.setenv("RANK", "1")
            stage(tmp_path, built.append)

    built: list[Path] = []
    stage(tmp_path, build)
    assert built == [tmp_path / "head.partial"]


def test_what_the_main_process_builds_alone_the_others_wait_for(tmp_path, monkeypatch):
    waits, found = Event(), []

    def sleep(seconds: float) -> None:
        waits.set()
        time.sleep(seconds)

    def other() -> None:
        found.append(stage(tmp_path, lambda directory: pytest.fail("built twice"), alone=True))

    def build(directory: Path) -> None:
        with monkeypatch.context() as patch:
            patch.setenv("RANK", "1")
            thread.start()
            assert waits.wait(20)
        assert not found
        (directory / "made").write_text("by the main process")

    thread = Thread(target=other)
    monkeypatch.setattr("graft_train.stage.time", SimpleNamespace(sleep=sleep, perf_counter=time.perf_counter))
    stage(tmp_path, build, alone=True)
    thread.join(20)
    assert found == [tmp_path / "head"]
    assert (found[0] / "made").read_text() == "by the main process"


def test_missing_input_names_the_recipe_before_a_target_is_downloaded(tmp_path):
    with pytest.raises(GraftError, match=r"graft regenerate"):
        stage(tmp_path, lambda directory: pytest.fail("built"), inputs=["target", "data"], target="some/target")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["data", "head", "corpus", "policy", "bundle"])
def test_what_lost_its_record_is_no_other_stages_input(tmp_path, name):
    """A head or a bundle is none of this run's then, though it could be read: the next stage would go on from it."""
    (tmp_path / name).mkdir()
    (tmp_path / name / "config.json").write_text("{}")
    with pytest.raises(GraftError, match=rf"{name} was not made by a stage \(no stage\.json\): put that back.*graft "):
        stage(tmp_path, lambda directory: pytest.fail("built"), inputs=[name])


def test_a_directory_without_a_model_is_no_target(tmp_path):
    (tmp_path / "mine").mkdir()
    with pytest.raises(GraftError, match=r"there is no model in .*mine \(no config\.json\)"):
        stage(tmp_path / "run", lambda out: pytest.fail("built"), inputs=["target"], target=str(tmp_path / "mine"))


def test_a_changed_input_is_noticed(tmp_path):
    target = tmp_path / "mine"
    target.mkdir()
    (target / "config.json").write_text("{}")
    stage(tmp_path / "run", lambda directory: None, inputs=["target"], target=str(target))
    renamed = target.rename(tmp_path / "renamed")
    stage(tmp_path / "run", lambda directory: pytest.fail("built"), inputs=["target"], target=str(renamed))
    renamed.rename(target)
    (target / "config.json").write_text('{"a": 1}')
    with pytest.raises(GraftError, match=r"input\.target"):
        stage(tmp_path / "run", lambda directory: None, inputs=["target"], target=str(target))
