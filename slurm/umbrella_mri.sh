#!/usr/bin/env bash
# Train a LLaVA on brain MRI conversations under Slurm. Submit from any directory: MODEL, DATA and OUT are relative to
# it, and the log is its logs/umbrella_mri_JOB.out. What follows the script's name goes to train_umbrella_mri.py.
#
#   export MODEL=models/llava-interleave-qwen DATA=data/umbrella OUT=runs/umbrella
#   sbatch slurm/umbrella_mri.sh --lr 1e-3 --epochs 10 --workers 8   # one GPU; more, and seeds, as in llava_med.sh
#   sbatch --dependency=afterok:JOB slurm/umbrella_mri.sh --eval-only --eval-split test # once it has ended
#
# job.sh is the rest; environment.sh has two more lines to adapt to a cluster.

# [1] what to ask for:
#SBATCH --nodes=1 --ntasks-per-node=1 --gpus-per-node=1 --cpus-per-task=8 --mem=64G --time=24:00:00
#SBATCH --job-name=umbrella_mri --requeue --signal=USR1@180
#SBATCH --output=/dev/null  # Slurm would open it before logs/ exists; job.sh opens the log
set -euo pipefail

here=$(dirname "${BASH_SOURCE[0]}")
if [ ! -f "$here/job.sh" ]; then # sbatch runs a copy in its spool folder; Slurm's Command is the original, with arguments
    original=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=//p' | tail -n 1)
    here=$(dirname "${original%%.sh *}.sh")
    [ -f "$here/job.sh" ] || { echo "no job.sh in '$here'" >"$SLURM_JOB_NAME.$SLURM_JOB_ID.err"; exit 1; }
fi
trainer=train_umbrella_mri.py
MODEL=${MODEL:-models/llava-interleave-qwen} DATA=${DATA:-data/umbrella} OUT=${OUT:-runs/umbrella_mri}
. "$here/job.sh"
