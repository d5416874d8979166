"""The recipes as people start them: in a clone under accelerate, and as `graft` from installed wheels."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file
from torch import equal

from graft_train.cli import main
from graft_train.config import Config
from graft_train.road import ROAD, STAGES
from tests.graft_inference.tiny_bundle import write_target
from tests.graft_train.tiny_run import tiny_config, write_sources

ROOT = Path(__file__).parents[2]


def overrides(config: Config) -> list[str]:
    """A configuration as Hydra reads it from a command line."""

    def flat(prefix: str, value: Any) -> list[str]:
        if isinstance(value, dict):
            return [line for name, inner in value.items() for line in flat(f"{prefix}.{name}", inner)]
        return [f"{prefix}={json.dumps(value)}"]

    return [line for name, value in asdict(config).items() for line in flat(name, value)]


def run(*command: str | Path, cwd: Path = ROOT, **environment: str) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The commands of an environment that has this project's two wheels, and knows no clone of it."""
    root = tmp_path_factory.mktemp("installed")
    ignored = shutil.ignore_patterns(".*", "runs", "*.egg-info", "__pycache__", "tests")
    source = shutil.copytree(ROOT, root / "source", ignore=ignored)
    for project in (source / "inference", source):
        run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", root / "wheels", project)
    shutil.rmtree(source)
    venv.create(root / "venv", symlinks=True)
    site = sysconfig.get_path("purelib", "venv", {"base": str(root / "venv"), "platbase": str(root / "venv")})
    wheels = sorted((root / "wheels").glob("*.whl"))
    install = ["pip", "--python", root / "venv", "install", "--quiet", "--no-deps", "--no-index"]
    run(sys.executable, "-m", *install, *wheels)
    # What they depend on is this environment's. Its own .pth files, which lead to the clone, are not read.
    Path(site, "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    return root / "venv" / "bin"


def test_help_lists_the_stages_with_a_line_each(installed, tmp_path):
    said = run(installed / "graft", "--help", cwd=tmp_path)
    for name, line in STAGES.items():
        assert f"{name} " in said.replace("-", "_")
        assert f" {line}" in " ".join(said.split())


def test_what_a_report_is_made_of_is_installed(installed):
    found = {path.name for path in installed.parent.rglob("graft_train/report/page.*")}
    assert found == {"page.html.jinja", "page.css", "page.js"}


def test_the_installed_command_goes_the_road_and_accelerate_trains_the_same_head(installed, tmp_path):
    write_sources(tmp_path / "sources")
    settings = tiny_config(tmp_path / "run", tmp_path / "sources")
    write_target(tmp_path / "run" / "target")
    said = run(installed / "graft", "quickstart", *overrides(settings), cwd=tmp_path)
    for number, (name, line) in enumerate(ROAD.items(), start=1):
        assert f"[{number}/{len(ROAD)}] {name}: {line}" in said
    table, answer = said.split("evaluate: finished")[1].split(f"[{len(ROAD)}/")
    assert "autoregressive" in table
    assert "to go on: graft chat" in answer

    for stage in ("target", "data"):
        shutil.copytree(tmp_path / "run" / stage, tmp_path / "launched" / stage)
    settings = tiny_config(tmp_path / "launched", tmp_path / "sources")
    launch = (sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1")
    run(*launch, "recipes/distill.py", *overrides(settings))
    ours, launched = (load_file(tmp_path / name / "head" / "model.safetensors") for name in ("run", "launched"))
    assert all(equal(ours[name], launched[name]) for name in ours)


def test_the_installed_command_tells_a_mistake_in_one_line(installed, tmp_path):
    done = subprocess.run(
        [installed / "graft", "regenerate", "experiment=qwen3_8b", "target.name_or_path=."],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("begun", "completion"),
    [("cal", "calibrate"), ("distill experiment=qw", "experiment=qwen3_8b"), ("distill head.ep", "head.epochs=")],
)
def test_the_shell_completes_stages_experiments_and_settings(begun, completion):
    words = f"graft {begun}"
    environment = {"_GRAFT_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
    offered = CliRunner().invoke(main, env=environment, prog_name="graft").output
    assert completion in {line.split(",")[1] for line in offered.splitlines()}
