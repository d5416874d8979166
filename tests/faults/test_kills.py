"""SIGKILL at random moments, from outside: in the midst of a pass of the target, of a write in C++, of anything."""

import json
import os
import random

import pytest

from .injected import FREEING, run
from .road import ALL, CHOSEN, Road

KILLS = 20 if ALL else 1
KEPT = {
    "head": "checkpoints/step-*[0-9]",
    "corpus": "counts/[0-9]*.parquet",
    "policy": "traces.safetensors",
    "evaluation": "timed.json",
}
"""What a stage that goes on has not to make again. Answers of `data` are lines of one file."""


@pytest.mark.parametrize(("stage", "directory"), CHOSEN)
def test_a_stage_killed_at_random_moments_resumes_to_the_same_bits(road, tally, stage, directory):
    moments, killed = random.Random(directory), 0
    while killed < KILLS:
        road.restore(road.before(directory))
        moment = moments.uniform(0, road.seconds[directory])
        if not run(stage, road.config, kill_after=moment).killed:
            continue  # it was done before
        killed += 1
        road.assert_whole(directory, moment)
        done = [path.name for path in road.run_dir.glob(f"{directory}.partial/{KEPT.get(directory)}")]
        answered = answered_bytes(road)
        ran = road.assert_resumes(stage, directory, moment, fault=below(road, answered))
        again = [one for one in ran.operations if not one.startswith(FREEING) and any(name in one for name in done)]
        assert again == []
        assert not (road.run_dir / "cut").exists()
        tally("killed at a random moment", directory)
        if done or (answered and directory == "data"):
            tally("of these, with finished work, which was kept", directory)


def answered_bytes(road: Road) -> int:
    """Bytes of the whole answers that an interrupted `regenerate` has left; prompts without one stand behind them."""
    path, size = road.run_dir / "data.partial" / "samples.jsonl", 0
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
        if not line.endswith(b"\n") or json.loads(line)["split"] != "train":
            break
        size += len(line)
    return size


def below(road: Road, size: int):
    """Makes a file `cut` where answers of so many bytes are cut off."""
    answers = road.run_dir / "data.partial" / "samples.jsonl"

    def look(number: int, event: str, path: str) -> None:
        if path == str(answers) and answers.exists() and os.path.getsize(answers) < size:
            (road.run_dir / "cut").touch()  # no file of a run

    return look
