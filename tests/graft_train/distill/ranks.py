"""Runs `distill` in processes of its own, some of which are killed."""

import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]

SCRIPT = """
import json, os, signal, sys
from pathlib import Path
from graft_train import stage
from graft_train.distill import checkpoint, distill, loop, state_source
from tests.graft_train.distill.test_distill import make_run

directory, changes, step, during = Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
real_step, real_json, real_file, taken = loop.train_step, checkpoint.write_json, state_source.save_file, 0

def counted(real, kind):
    def call(*arguments):
        global taken
        if taken == step and during == kind:
            os.kill(os.getpid(), signal.SIGKILL)
        taken += 1
        return real(*arguments)
    return call

def dying_write(path, value):
    # The last file of a checkpoint, before it gets its name.
    if taken == step:
        os.kill(os.getpid(), signal.SIGKILL)
    real_json(path, value)

if during == "states":
    state_source.save_file = counted(real_file, "states")
else:
    loop.train_step = counted(real_step, "step")
if during == "keeping":
    stage.remove = lambda path: None
if during == "saving":
    checkpoint.write_json = dying_write
state_source.SHARD_TOKENS = 60
distill(make_run(directory, **changes))
sys.stdout.flush()
os._exit(0)  # gloo's threads may still hold Python objects, and an interpreter that is ending aborts on them
"""


def run_ranks(
    directory: Path, changes: str = "{}", launcher: tuple[str, ...] = (), kill: int = -1, during: str = "step"
) -> subprocess.CompletedProcess[str]:
    """Runs the stage on `make_run(directory, **changes)`.

    Args:
        kill: before this step it dies (during="step"), saving it ("saving"), or before writing this shard of
            target states ("states").
        during: "keeping" keeps the checkpoints of a training that has ended.
    """
    script = directory / "distill_here.py"
    script.write_text(SCRIPT)
    return subprocess.run(
        [sys.executable, *launcher, str(script), str(directory), changes, str(kill), during],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        cwd=directory,
    )


def environment() -> dict[str, str]:
    paths = [str(ROOT), str(ROOT / "inference"), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


def was_killed(run: subprocess.CompletedProcess[str]) -> bool:
    return run.returncode == -signal.SIGKILL


def torchrun(processes: int) -> tuple[str, ...]:
    return ("-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--master_port=0", "--standalone")


def deepspeed(stage: int, processes: int) -> tuple[str, ...]:
    config = str(ROOT / "recipes" / "launch" / f"zero{stage}.yaml")
    launch = ("-m", "accelerate.commands.launch", "--config_file", config, "--num_processes", str(processes))
    return (*launch, "--main_process_port", "0")
