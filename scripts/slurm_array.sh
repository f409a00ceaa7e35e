#!/usr/bin/env bash
# One run shared by the tasks of a SLURM array: independent workers, no communication, any of them may die.
#
#   sbatch --array=0-31 --gpus-per-task=1 --time=4:00:00 scripts/slurm_array.sh \
#       MODEL DATA --split 'validation[:2000]' --out /shared/run
#
# What is given after the script goes to `hf-coar attribute`; --out must be a folder that all machines share. Submit the
# same array again to go on after a time limit; a task that is done takes over what others have left.
# DRY_RUN=1 bash scripts/slurm_array.sh … prints the command with --dry-run, which says what it would cost.
#SBATCH --job-name=hf-coar
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --requeue
set -euo pipefail

# Arrays that do not begin at 0 count from their own first task.
worker="$((${SLURM_ARRAY_TASK_ID:?run this as a SLURM array} - ${SLURM_ARRAY_TASK_MIN:-0}))/${SLURM_ARRAY_TASK_COUNT:?}"
command=(python -m hf_coar attribute "$@" --worker "$worker")
if [[ -n "${DRY_RUN:-}" ]]; then
    echo "${command[@]@Q}" --dry-run
    exit
fi
exec "${command[@]}"
