"""The SLURM example, with stand-ins for what only a cluster has: two nodes of four GPUs."""

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
STUBS = {
    "scontrol": "printf 'node7\\nnode8\\n'",
    "srun": 'for node in 0 1; do SLURM_NODEID=$node "$@"; done',
    "accelerate": 'echo "$@"',
}


def test_every_node_launches_its_share_of_the_processes(tmp_path):
    for name, body in STUBS.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_NNODES": "2"}
    run = subprocess.run(
        ["bash", "conf/accelerate/slurm.sh", "experiment=qwen3_8b", "data.path=my chats.jsonl"],
        cwd=ROOT,
        env={**os.environ, **slurm, "SLURM_GPUS_ON_NODE": "4", "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    for rank, line in enumerate(run.stdout.splitlines()):
        assert line == (
            "launch --config_file conf/accelerate/ddp.yaml --num_machines 2 --num_processes 8 "
            f"--machine_rank {rank} --main_process_ip node7 --main_process_port 29500 "
            "--deepspeed_multinode_launcher standard recipes/distill.py experiment=qwen3_8b data.path=my chats.jsonl"
        )
    assert len(run.stdout.splitlines()) == 2
    assert (ROOT / "conf" / "accelerate" / "ddp.yaml").exists()
