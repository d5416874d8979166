"""A process of a training of several is killed: the others end with a clear error, and the training goes on later."""

import json
import random
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from graft_train.distill import distill
from tests.graft_train.distill.ranks import environment
from tests.graft_train.distill.test_distill import make_run

from .injected import contents
from .road import ALL

PATIENCE = 60
"""Seconds in which the others must have ended."""
CHANGES = {"epochs": 40, "checkpoint_every": 2, "keep_checkpoints": 1}
KILLS = 4 if ALL else 1
SCRIPT = """
import json, os, sys
from pathlib import Path
from graft_inference.errors import GraftError
from graft_train.distill import distill
from tests.graft_train.distill.test_distill import make_run
try:
    distill(make_run(Path(sys.argv[1]), **json.loads(sys.argv[2])))
except GraftError as error:
    print(f"error: {error}", file=sys.stderr)
    os._exit(2)
os._exit(0)  # gloo's threads may still hold Python objects
"""


def started(directory: Path, rank: int, port: int) -> subprocess.Popen[str]:
    """One of two processes, with nobody that watches over them."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(directory), json.dumps(CHANGES)],
        env=environment() | {name: str(value) for name, value in place.items()},
        stderr=subprocess.PIPE,
        text=True,
        cwd=directory,
    )


def both(directory: Path) -> list[subprocess.Popen[str]]:
    make_run(directory, **CHANGES)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [started(directory, rank, port) for rank in (0, 1)]


def steps_of(directory: Path) -> int:
    """Of the last whole checkpoint."""
    found = sorted((directory / "run" / "head.partial" / "checkpoints").glob("step-*[0-9]"))
    return int(found[-1].name.removeprefix("step-")) if found else 0


def whole(processes: list[subprocess.Popen[str]]) -> None:
    for one in processes:
        said = one.communicate()[1]
        assert one.returncode == 0, said[-3000:]


@pytest.mark.parametrize("killed", [1, 0] if ALL else [1])
def test_who_is_left_of_a_training_is_told_and_the_run_resumes(tmp_path, tally, killed):
    """Whether the one that writes is killed or the other; nobody ends who is left, as a launcher would."""
    disturbed, moments = tmp_path / "disturbed", random.Random(killed)
    for _ in range(KILLS):
        disturbed.mkdir(exist_ok=True)
        processes, before = both(disturbed), steps_of(disturbed)
        while steps_of(disturbed) == before:
            assert all(one.poll() is None for one in processes), [one.communicate()[1][-3000:] for one in processes]
            time.sleep(0.02)
        time.sleep(moments.uniform(0, 0.2))
        processes[killed].kill()
        _, said = processes[1 - killed].communicate(timeout=PATIENCE)
        assert processes[1 - killed].returncode == 2, said[-3000:]
        [told] = [line for line in said.splitlines() if line.startswith("error: ")]
        assert told.startswith("error: another process of this launch has ended")
        assert "run the same command again" in told
        processes[killed].communicate()
        tally("worker killed, the other told in a minute", "head")
    if not ALL:
        assert distill(make_run(disturbed, **CHANGES)) == disturbed / "run" / "head"
        return
    whole(both(disturbed))
    (tmp_path / "alone").mkdir()
    whole(both(tmp_path / "alone"))
    heads = [contents(directory / "run" / "head") for directory in (disturbed, tmp_path / "alone")]
    assert heads[0]["model.safetensors"] == heads[1]["model.safetensors"]
    tally("training with killed workers, resumed to the bit", "head")
