#!/usr/bin/env bash
# `retnet` on several nodes of Slurm: one torchrun per node.
#
#   sbatch --nodes=2 --gpus-per-node=8 recipes/launch/slurm.sh train RECIPE.yaml [key=value ...]
#
# Run it in the root of the checkout, on a file system that all nodes see. Account, partition and time are options of
# sbatch, or its variables (SBATCH_ACCOUNT, SBATCH_PARTITION, SBATCH_TIMELIMIT). Settings, from the environment: those of
# torchrun.sh beside this file, but for NODES, NODE_RANK and MASTER_ADDR, which Slurm knows.
#
# Two minutes before the time is over, Slurm sends SIGTERM to the steps of the job: training saves a checkpoint and ends.
# With resume_from_checkpoint=auto the same command goes on there.
#SBATCH --job-name=retnet
#SBATCH --ntasks-per-node=1
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

: "${SLURM_JOB_NODELIST:?is not set; accepted: sbatch [options] recipes/launch/slurm.sh VERB [arguments]}"
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_ADDR=${hosts%%$'\n'*} # the first line
NODES=$SLURM_NNODES
MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))} # jobs that share a node have other ports
export MASTER_ADDR NODES MASTER_PORT

# NODE_RANK is different in each task.
srun --kill-on-bad-exit=1 bash -c 'NODE_RANK=$SLURM_NODEID exec bash recipes/launch/torchrun.sh "$@"' slurm.sh "$@"
