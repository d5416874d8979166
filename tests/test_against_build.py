"""`benchmarks/against_build.py`: this checkout beside itself."""

import os
import subprocess
import sys
from pathlib import Path

from .graft_inference.tiny_bundle import write_target

ROOT = Path(__file__).parents[1]


def test_a_build_beside_itself_emits_the_same_in_as_many_rounds(tmp_path):
    arguments = ["--target", write_target(tmp_path / "target"), "--prompts", "2", "--tokens", "8", "--repeats", "1"]
    done = subprocess.run(
        [sys.executable, "benchmarks/against_build.py", ROOT, *arguments],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'inference'}", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines()[-4:]]
    assert [row[0] for row in rows] == ["autoregressive", "eagle3", "graft", "train_step"]
    for *_, pairs, rounds, same in rows:
        assert (pairs, same) == ("2", "yes")
        ours, theirs = rounds.split(" / ")
        assert ours == theirs
    assert rows[0][-2] == "14 / 14"
