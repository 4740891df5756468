#!/usr/bin/env bash
# Train Qwen2-VL under Slurm. Submit from any directory: MODEL, DATA and OUT are relative to it, and the log is its
# logs/qwen2vl_sentinel_JOB.out. What follows the script's name goes to train_qwen2vl_sentinel.py.
#
#   export MODEL=models/qwen2-vl DATA=data/kvasir_vqa OUT=runs/kvasir
#   sbatch slurm/qwen2vl_sentinel.sh --skip-bad --epochs 3              # one GPU; more, and seeds, as in llava_med.sh
#   bash slurm/qwen2vl_pipeline.sh --skip-bad --epochs 3                # check, overfit, train and evaluate, in a chain
#
# job.sh is the rest; environment.sh has two more lines to adapt to a cluster.

# [1] what to ask for:
#SBATCH --nodes=1 --ntasks-per-node=1 --gpus-per-node=1 --cpus-per-task=8 --mem=64G --time=24:00:00
#SBATCH --job-name=qwen2vl_sentinel --requeue --signal=USR1@180
#SBATCH --output=/dev/null  # Slurm would open it before logs/ exists; job.sh opens the log
set -euo pipefail

here=$(dirname "${BASH_SOURCE[0]}")
if [ ! -f "$here/job.sh" ]; then # sbatch runs a copy in its spool folder; Slurm's Command is the original, with arguments
    original=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=//p' | tail -n 1)
    here=$(dirname "${original%%.sh *}.sh")
    [ -f "$here/job.sh" ] || { echo "no job.sh in '$here'" >"$SLURM_JOB_NAME.$SLURM_JOB_ID.err"; exit 1; }
fi
trainer=train_qwen2vl_sentinel.py
MODEL=${MODEL:-models/qwen2-vl} DATA=${DATA:-data/kvasir_vqa} OUT=${OUT:-runs/qwen2vl_sentinel}
. "$here/job.sh"
