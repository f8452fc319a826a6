#!/bin/bash
# Two nodes of eight GPUs:
#
#     sbatch --nodes=2 slurm.sh config/minicpm_1b.py --out_dir=/shared/minicpm-1b
#
# One torchrun per node starts one process per GPU. If a process fails, torchrun restarts all of
# them from the last checkpoint. If a node is lost, the job step ends; --requeue queues the job
# again, and the same command continues the run. 300 s before the time limit Slurm sends SIGTERM:
# the processes finish their step, save, and exit. torchrun gives them 240 s for that (by default
# 30 s) and then kills them. Raise both numbers if a save takes longer (save_pause_s in
# metrics.jsonl); for preemption the partition's GraceTime must be as long.
#SBATCH --job-name=minicpm
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# Use a new rendezvous store for every restart: a shared one keeps the addresses of dead processes.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export PYTORCH_ALLOC_CONF=expandable_segments:True      # fewer holes in the memory of a GPU
export TORCH_NCCL_DUMP_ON_TIMEOUT=1                     # which collective each rank waited for
export TORCH_FR_DUMP_TEMP_FILE="$PWD/nccl-$SLURM_JOB_ID-rank"
ulimit -n "$(ulimit -Hn)"                               # rank 0 has several sockets per process
# If NCCL or gloo take the wrong network interface:
# export NCCL_SOCKET_IFNAME=eth0 GLOO_SOCKET_IFNAME=eth0
export OMP_NUM_THREADS=$((SLURM_CPUS_PER_TASK / 8))
srun --kill-on-bad-exit=1 torchrun --nnodes="$SLURM_NNODES" --nproc_per_node=8 --max-restarts=20 \
    --shutdown-timeout=240 --rdzv-backend=c10d --rdzv-endpoint="$head:29500" \
    --rdzv-id="$SLURM_JOB_ID" train.py "$@"
