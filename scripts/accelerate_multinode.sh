#!/usr/bin/env bash
# One run on the GPUs of several machines, with accelerate's launcher: one process a GPU, units dealt out by rank.
#
#   sbatch --nodes=4 --ntasks-per-node=1 --gpus-per-node=8 --time=4:00:00 \
#       --wrap "srun scripts/accelerate_multinode.sh MODEL DATA --split 'validation[:2000]' --out /shared/run"
#
# What is given after the script goes to `hf-coar attribute`; --out must be a folder that all machines share. Without
# SLURM: set SLURM_NNODES, SLURM_NODEID (from 0) and HEAD (the first machine's name) by hand on every machine.
# A process that dies ends the job of its launcher; start the same command again and it goes on. Where machines come and
# go, independent workers (slurm_array.sh) are the better way. The settings of accelerate are in accelerate_multinode.yaml.
# DRY_RUN=1 prints the command with --dry-run, which says what it would cost.
set -euo pipefail

here="$(dirname "${BASH_SOURCE[0]}")"
head="${HEAD:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}"
gpus="${SLURM_GPUS_ON_NODE:-$( (nvidia-smi --list-gpus 2>/dev/null || true) | wc -l)}"
launch=(accelerate launch --config_file "$here/accelerate_multinode.yaml" --num_machines "${SLURM_NNODES:?}"
    --num_processes "$((SLURM_NNODES * gpus))" --machine_rank "${SLURM_NODEID:?}"
    --main_process_ip "$head" --main_process_port "${PORT:-29500}")
command=("${launch[@]}" -m hf_coar attribute "$@")
if [[ -n "${DRY_RUN:-}" ]]; then
    echo "${command[@]@Q}" --dry-run
    exit
fi
exec "${command[@]}"
