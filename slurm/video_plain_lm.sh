#!/usr/bin/env bash
# Train a small video-language model under Slurm. Submit from any directory: MODEL, VISION_MODEL, DATA, OUT and CACHE
# are relative to it, and the log is its logs/video_plain_lm_JOB.out. What follows the script's name goes to
# train_video_plain_lm.py. Without VISION_MODEL it is the model's own tower, or facebook/dinov2-large.
#
#   bash slurm/download.sh openai-community/gpt2 facebook/dinov2-large       # on the login node, once
#   export DATA=data/videos OUT=runs/videos CACHE=cache/dinov2               # CACHE: where the tower's features are kept
#   sbatch slurm/video_plain_lm.sh --epochs 3                                # one GPU; more, and seeds, as in llava_med.sh
#   sbatch --dependency=afterok:JOB slurm/video_plain_lm.sh --eval-only --eval-split test # once it has ended
#
# job.sh is the rest; environment.sh has two more lines to adapt to a cluster.

# [1] what to ask for:
#SBATCH --nodes=1 --ntasks-per-node=1 --gpus-per-node=1 --cpus-per-task=8 --mem=64G --time=24:00:00
#SBATCH --job-name=video_plain_lm --requeue --signal=USR1@180
#SBATCH --output=/dev/null  # Slurm would open it before logs/ exists; job.sh opens the log
set -euo pipefail

here=$(dirname "${BASH_SOURCE[0]}")
if [ ! -f "$here/job.sh" ]; then # sbatch runs a copy in its spool folder; Slurm's Command is the original, with arguments
    original=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=//p' | tail -n 1)
    here=$(dirname "${original%%.sh *}.sh")
    [ -f "$here/job.sh" ] || { echo "no job.sh in '$here'" >"$SLURM_JOB_NAME.$SLURM_JOB_ID.err"; exit 1; }
fi
trainer=train_video_plain_lm.py
MODEL=${MODEL:-openai-community/gpt2} DATA=${DATA:-data/videos} OUT=${OUT:-runs/video_plain_lm}
[ -z "${VISION_MODEL:-}" ] || set -- --vision-model "$VISION_MODEL" "$@"
[ -z "${CACHE:-}" ] || set -- --cache-features "$CACHE" "$@"
. "$here/job.sh"
