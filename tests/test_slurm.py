"""The SLURM example, with stand-ins for what only a cluster has: two nodes of four GPUs."""

import os
import signal
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
STUBS = {
    "scontrol": "printf 'node7\\nnode8\\n'",
    "srun": 'for node in 0 1; do SLURM_NODEID=$node "$@"; done',
    "accelerate": 'echo "$@"',
}


def launched(directory, stubs, *arguments):
    """The script with these stand-ins on its path."""
    for name, body in stubs.items():
        (directory / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (directory / name).chmod(0o755)
    slurm = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "5"}
    return subprocess.Popen(
        ["bash", "recipes/launch/slurm.sh", *arguments],
        cwd=ROOT,
        env={**os.environ, **slurm, "SLURM_GPUS_ON_NODE": "4", "PATH": f"{directory}:{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        text=True,
    )


def test_a_job_is_requeued_when_its_time_ends(tmp_path):
    requeue = f'[ "$1" = requeue ] && echo "$2" > {tmp_path}/requeued || {STUBS["scontrol"]}'
    run = launched(tmp_path, STUBS | {"scontrol": requeue, "srun": "echo begun; exec sleep 60"})
    assert run.stdout.readline() == "begun\n"
    run.send_signal(signal.SIGUSR1)
    assert run.wait(20) != 0
    assert (tmp_path / "requeued").read_text() == "5\n"


def test_every_node_launches_its_share_of_the_processes(tmp_path):
    run = launched(tmp_path, STUBS, "experiment=qwen3_8b", "data.path=my chats.jsonl")
    lines = run.communicate(timeout=60)[0].splitlines()
    assert run.returncode == 0
    for rank, line in enumerate(lines):
        assert line == (
            "launch --config_file recipes/launch/ddp.yaml --num_machines 2 --num_processes 8 "
            f"--machine_rank {rank} --main_process_ip node7 --main_process_port 29500 "
            "--deepspeed_multinode_launcher standard recipes/distill.py experiment=qwen3_8b data.path=my chats.jsonl"
        )
    assert len(lines) == 2
    assert (ROOT / "recipes" / "launch" / "ddp.yaml").exists()
