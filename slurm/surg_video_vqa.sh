#!/usr/bin/env bash
# Train Qwen2-VL with Whisper's encoder under Slurm. Submit from any directory: MODEL, AUDIO_MODEL, DATA and OUT are
# relative to it, and the log is its logs/surg_video_vqa_JOB.out. What follows the script's name goes to
# train_surg_video_vqa.py. Without AUDIO_MODEL the model's own encoder is heard, or questions are read as text.
# Of SurgViVQA as published move eval_multivideo.jsonl away first: all its videos are in train (docs/surg_video_vqa.md).
#
#   export MODEL=models/qwen2-vl AUDIO_MODEL=models/whisper DATA=data/surgvivqa OUT=runs/surgvivqa
#   sbatch slurm/surg_video_vqa.sh --skip-bad --epochs 3 --grad-checkpoint   # one GPU; more, and seeds, as in llava_med.sh
#   sbatch --dependency=afterok:JOB slurm/surg_video_vqa.sh --skip-bad --eval-only --eval-split test # once it has ended
#
# job.sh is the rest; environment.sh has two more lines to adapt to a cluster.

# [1] what to ask for:
#SBATCH --nodes=1 --ntasks-per-node=1 --gpus-per-node=1 --cpus-per-task=8 --mem=64G --time=24:00:00
#SBATCH --job-name=surg_video_vqa --requeue --signal=USR1@180
#SBATCH --output=/dev/null  # Slurm would open it before logs/ exists; job.sh opens the log
set -euo pipefail

here=$(dirname "${BASH_SOURCE[0]}")
if [ ! -f "$here/job.sh" ]; then # sbatch runs a copy in its spool folder; Slurm's Command is the original, with arguments
    original=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=//p' | tail -n 1)
    here=$(dirname "${original%%.sh *}.sh")
    [ -f "$here/job.sh" ] || { echo "no job.sh in '$here'" >"$SLURM_JOB_NAME.$SLURM_JOB_ID.err"; exit 1; }
fi
trainer=train_surg_video_vqa.py
MODEL=${MODEL:-models/qwen2-vl} DATA=${DATA:-data/surgvivqa} OUT=${OUT:-runs/surg_video_vqa}
[ -z "${AUDIO_MODEL:-}" ] || set -- --audio-model "$AUDIO_MODEL" "$@"
. "$here/job.sh"
