"""`benchmarks/gpu_road.py` on a machine that has torch and transformers and little else."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from graft_inference import METHODS

from .graft_inference.tiny_bundle import write_target
from .graft_train.tiny_run import write_sources

ROOT = Path(__file__).parents[1]
ABSENT = ("hydra", "omegaconf", "datasets", "wandb", "deepspeed", "accelerate", "pyarrow", "duckdb", "matplotlib")
HIDDEN = f"""
import sys, runpy
sys.modules.update(dict.fromkeys({ABSENT}))  # an import of one of them is an ImportError
sys.argv = ["gpu_road.py", *sys.argv[1:]]
runpy.run_path("benchmarks/gpu_road.py", run_name="__main__")
"""


@pytest.fixture(scope="module")
def road(tmp_path_factory):
    """What the road printed, and its run."""
    place = tmp_path_factory.mktemp("road")
    write_sources(place / "sources")
    target = write_target(place / "target")
    arguments = ["--tiny", "--run", place / "run", "--sources", place / "sources", "--target", target]
    done = run_python("-c", HIDDEN, *arguments)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout, place / "run"


def run_python(*arguments) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'inference'}", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_the_road_needs_none_of_the_packages_that_a_bare_machine_lacks(road):
    printed, run = road
    evaluation = json.loads((run / "evaluation" / "evaluation.json").read_text())
    assert evaluation["lossless"] == dict.fromkeys(METHODS, True)
    assert "no report.png: matplotlib is not installed" in printed


def ablated(run: Path) -> dict[str, list[str]]:
    """Cells of the table by what is left out."""
    done = run_python("benchmarks/ablation.py", "--run", run)
    assert done.returncode == 0, done.stderr[-4000:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines()]
    return {name: cells for name, *cells in rows[2:]}


def test_the_ablation_begins_with_what_calibrate_chose(road):
    _, run = road
    predicted = json.loads((run / "policy" / "report.json").read_text())["predicted_when_chosen"]
    found = ablated(run)
    assert found["nothing"][0] == f"{predicted['learned']:.1f}"
    assert found["the head"][0] == f"{predicted['retrieve_only']:.1f}"


def test_an_ablation_leaves_one_piece_out(road, tmp_path):
    shutil.copytree(road[1] / "policy", tmp_path / "policy")
    latency = json.loads((tmp_path / "policy" / "latency.json").read_text())
    # Where a pass of the target is dear and all else nearly free, everything that may be accepted pays.
    free = {"draft_ms": [0.0, 0.1, 0.2, 0.3], "build_ms": 0.0, "commit_ms": 0.0, "read_ms": 0.0}
    latency |= free | {"verify_ms": [[10.0] * len(row) for row in latency["verify_ms"]]}
    latency["source_ms"] = dict.fromkeys(latency["source_ms"], 0.0)
    (tmp_path / "policy" / "latency.json").write_text(json.dumps(latency))
    stage = json.loads((tmp_path / "policy" / "stage.json").read_text())
    stage["settings"]["num_draft_tokens"] = [1, 4, 8, 40]  # room for what every proposer has
    (tmp_path / "policy" / "stage.json").write_text(json.dumps(stage))
    plans = {name: cells[-1] for name, cells in ablated(tmp_path).items()}
    assert plans["nothing"].endswith("(matrix, lookup)")
    assert plans["the matrix"].endswith("(lookup)")
    assert plans["the lookup"].endswith("(matrix)")
    assert plans["the head"].startswith("0: ")
    assert "<=" not in plans["early stops"]
    assert ">" not in plans["leaving out the head"]
    assert plans["the learned template"].endswith("lookup)")
