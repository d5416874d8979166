"""Stages are built once, resumed when interrupted, reused while nothing changed, refused when it did."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from graft_inference.errors import GraftError
from graft_train.data.target import TargetConfig
from graft_train.stage import run_stage


def stage(run_dir: Path, build: Any, rate: float = 0.1, inputs: Any = (), target: str | None = None) -> Path:
    config: Any = SimpleNamespace(run_dir=str(run_dir), target=TargetConfig(name_or_path=target))
    return run_stage(config, "distill", "head", {"head": {"lr": rate}}, inputs, build)


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


def test_a_mistake_found_before_the_first_write_can_be_mended_by_other_settings(tmp_path):
    def mistaken(directory: Path) -> None:
        raise GraftError("bad record")

    with pytest.raises(GraftError, match="bad record"):
        stage(tmp_path, mistaken)
    stage(tmp_path, lambda directory: None, rate=0.2)
    assert json.loads((tmp_path / "head/stage.json").read_text())["settings"]["head"]["lr"] == 0.2


def test_missing_input_names_the_recipe_before_a_target_is_downloaded(tmp_path):
    with pytest.raises(GraftError, match=r"recipes/regenerate\.py"):
        stage(tmp_path, lambda directory: pytest.fail("built"), inputs=["target", "data"], target="some/target")
    assert list(tmp_path.iterdir()) == []


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
