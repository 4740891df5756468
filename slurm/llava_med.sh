#!/usr/bin/env bash
# Train LLaVA-Med under Slurm. Submit from any directory: MODEL, DATA and OUT are relative to it, and the log is its
# logs/llava_med_JOB.out. What follows the script's name goes to train_llava_med.py.
#
#   export MODEL=models/llava-med DATA=data/kvasir_vqa OUT=runs/kvasir
#   sbatch slurm/llava_med.sh --skip-bad --epochs 3                                         # one GPU
#   sbatch --ntasks-per-node=4 --gpus-per-node=4 --mem=256G slurm/llava_med.sh              # four GPUs of a node
#   sbatch --nodes=2 --ntasks-per-node=4 --gpus-per-node=4 --mem=256G slurm/llava_med.sh    # two such nodes
#   sbatch --array=0-4 slurm/llava_med.sh                                                   # five seeds, OUT/seed_0 …
#   sbatch --dependency=afterok:JOB slurm/llava_med.sh --eval-only --eval-split test     # once JOB has succeeded
#   bash slurm/llava_med.sh --epochs 3                                                      # without Slurm
#   bash slurm/llava_med.sh --dry-run --epochs 3         # what would stop the job at its start, in seconds and unqueued
#
# job.sh is the rest; environment.sh has two more lines to adapt to a cluster.

# [1] what to ask for:
#SBATCH --nodes=1 --ntasks-per-node=1 --gpus-per-node=1 --cpus-per-task=8 --mem=64G --time=24:00:00
#SBATCH --job-name=llava_med --requeue --signal=USR1@180
#SBATCH --output=/dev/null  # Slurm would open it before logs/ exists; job.sh opens the log
set -euo pipefail

here=$(dirname "${BASH_SOURCE[0]}")
if [ ! -f "$here/job.sh" ]; then # sbatch runs a copy in its spool folder; Slurm's Command is the original, with arguments
    original=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=//p' | tail -n 1)
    here=$(dirname "${original%%.sh *}.sh")
    [ -f "$here/job.sh" ] || { echo "no job.sh in '$here'" >"$SLURM_JOB_NAME.$SLURM_JOB_ID.err"; exit 1; }
fi
trainer=train_llava_med.py
MODEL=${MODEL:-models/llava-med} DATA=${DATA:-data/kvasir_vqa} OUT=${OUT:-runs/llava_med}
. "$here/job.sh"
