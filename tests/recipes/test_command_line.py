"""The recipes as people start them."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import equal

from graft_train.config import Config
from tests.graft_train.tiny_run import tiny_config, write_sources

ROOT = Path(__file__).parents[2]


def overrides(config: Config) -> list[str]:
    """A configuration as Hydra reads it from a command line."""

    def flat(prefix: str, value: Any) -> list[str]:
        if isinstance(value, dict):
            return [line for name, inner in value.items() for line in flat(f"{prefix}.{name}", inner)]
        return [f"{prefix}={json.dumps(value)}"]

    return [line for name, value in asdict(config).items() for line in flat(name, value)]


def run(*command: str) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_road_and_one_stage_of_it_under_accelerate(tmp_path):
    write_sources(tmp_path / "sources")
    settings = tiny_config(tmp_path / "run", tmp_path / "sources")
    said = run(sys.executable, "recipes/quickstart.py", *overrides(settings))
    assert "evaluate: finished" in said
    assert "autoregressive" in said.split("evaluate: finished")[1], "ends with the table"

    for stage in ("target", "data"):
        shutil.copytree(tmp_path / "run" / stage, tmp_path / "launched" / stage)
    settings = tiny_config(tmp_path / "launched", tmp_path / "sources")
    launch = (sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1")
    run(*launch, "recipes/distill.py", *overrides(settings))
    ours, launched = (load_file(tmp_path / name / "head" / "model.safetensors") for name in ("run", "launched"))
    assert all(equal(ours[name], launched[name]) for name in ours)
