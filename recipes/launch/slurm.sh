#!/usr/bin/env bash
# Distils on several nodes, once `regenerate` has run; accelerate must be on the PATH:
#   sbatch --nodes 4 recipes/launch/slurm.sh experiment=qwen3_8b head.batches_per_step=32
# One launcher a node, one process a GPU. CONFIG chooses ddp (default), zero2 or zero3.
#SBATCH --job-name=distill
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --signal=B:USR1@60
#SBATCH --requeue
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?run this with sbatch}"

export MAIN_ADDRESS GPUS CONFIG
# Not `| head`: it may leave before scontrol has written all, which pipefail takes for a failure.
mapfile -t NODES < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
MAIN_ADDRESS=${NODES[0]}
GPUS=${SLURM_GPUS_ON_NODE:-8}
CONFIG=${CONFIG:-ddp}

# In single quotes: each node fills in its own SLURM_NODEID. run_dir must lie on a disk that all nodes see.
# Requeued a minute before the time limit, the same command goes on from the last checkpoint.
trap 'scontrol requeue "$SLURM_JOB_ID"; exit 1' USR1
srun bash -c 'exec accelerate launch \
  --config_file "recipes/launch/$CONFIG.yaml" \
  --num_machines "$SLURM_NNODES" --num_processes "$((SLURM_NNODES * GPUS))" --machine_rank "$SLURM_NODEID" \
  --main_process_ip "$MAIN_ADDRESS" --main_process_port 29500 --deepspeed_multinode_launcher standard \
  recipes/distill.py "$@"' distill "$@" &
wait $!  # a shell hears a signal while it waits, not while a command runs
