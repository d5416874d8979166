"""`benchmarks/gpu_road.py` on a machine that has torch and transformers and little else."""

import json
import os
import subprocess
import sys
from pathlib import Path

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


def test_the_road_needs_none_of_the_packages_that_a_bare_machine_lacks(tmp_path):
    write_sources(tmp_path / "sources")
    target = write_target(tmp_path / "target")
    arguments = ["--tiny", "--run", tmp_path / "run", "--sources", tmp_path / "sources", "--target", target]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'inference'}", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", HIDDEN, *map(str, arguments)],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    evaluation = json.loads((tmp_path / "run" / "evaluation" / "evaluation.json").read_text())
    assert evaluation["lossless"] == dict.fromkeys(METHODS, True)
    assert "no report.png: matplotlib is not installed" in done.stdout
