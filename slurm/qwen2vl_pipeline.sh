#!/usr/bin/env bash
# Qwen2-VL from data to figures: four jobs, each started once the one before it has succeeded. Run it on a login node;
# MODEL, DATA and OUT are as in qwen2vl_sentinel.sh, and what follows the script's name goes to the trainer, four times.
#
#   export MODEL=models/qwen2-vl DATA=data/kvasir_vqa OUT=runs/kvasir
#   bash slurm/qwen2vl_pipeline.sh --skip-bad --epochs 3
#   bash slurm/qwen2vl_pipeline.sh --dry-run --skip-bad --epochs 3  # refuses in seconds what would end the first job
#   SBATCH="--ntasks-per-node=4 --gpus-per-node=4 --mem=256G" bash slurm/qwen2vl_pipeline.sh --skip-bad
#
#   check      every example is built and decoded again; no weights are read
#   overfit    OVERFIT examples (64) are overfit in at most 200 steps, or nothing else is started
#   train      the run itself; it ends with answers to the validation split, whose table stays in its log
#   evaluate   answers to the test split; their table: logs/qwen2vl_evaluate_JOB.out, and OUT/results.json
set -euo pipefail
script=$(dirname "${BASH_SOURCE[0]}")/qwen2vl_sentinel.sh
flags=("$@")
[[ " $* " != *" --dry-run "* ]] || exec bash "$script" "$@" # all four begin alike

submit() { # submit NAME JOB_BEFORE FLAG…
    # shellcheck disable=SC2086 # SBATCH is several words
    sbatch --parsable --job-name="qwen2vl_$1" ${2:+--dependency=afterok:$2 --kill-on-invalid-dep=yes} ${SBATCH:-} \
        "$script" "${flags[@]}" "${@:3}" | cut -d ";" -f 1 # JOB;CLUSTER where there are several clusters
}

check=$(submit check "" --check)
overfit=$(submit overfit "$check" --overfit "${OVERFIT:-64}" --max-steps 200) # whatever --max-steps the training has
train=$(submit train "$overfit" --eval-split val)
evaluate=$(submit evaluate "$train" --eval-only --eval-split test)
echo "jobs: check $check, overfit $overfit, train $train, evaluate $evaluate"
echo "the table will stand at the end of logs/qwen2vl_evaluate_$evaluate.out, and in ${OUT:-runs/qwen2vl_sentinel}/results.json"
