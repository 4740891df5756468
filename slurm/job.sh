# shellcheck shell=bash disable=SC2154
# What every job script of this folder does once it has said what it is; read by them, not started.
# They set here (this folder), trainer, and the defaults of MODEL, DATA and OUT; $@ goes to the trainer.
#
# Three minutes before the time limit Slurm signals the trainer, which saves and leaves with code 85; the job then
# goes back into the queue, and resumes from there. --dry-run: what would stop the job at its start is found in seconds.

job= # the name of the Slurm job; empty without Slurm, and inside a step such as the shell of srun --pty
if [ -n "${SLURM_JOB_ID:-}" ] && [ -z "${SLURM_STEP_ID:-}" ]; then
    # in an array one of the tasks has the SLURM_JOB_ID of them all
    job=${SLURM_ARRAY_TASK_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
    job=${job:-$SLURM_JOB_ID}
    faults=
    for folder in logs "$OUT" ~; do # where logs/ cannot be written, the log is in the run folder, or at home
        log=$folder/${SLURM_JOB_NAME}_$job.out
        fault=$( (mkdir -p "$folder" && date '+%F %T' >>"$log") 2>&1) && break
        faults+="no log in $folder: $fault"$'\n'
    done
    exec >>"$log" 2>&1
    printf %s "$faults"
fi

. "$here/environment.sh"
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1} # compute nodes have no network
export PYTHONUNBUFFERED=1                  # or the log lags behind

dry_run=""
for word in "$@"; do # all others go to the trainer
    shift
    if [ "$word" = --dry-run ]; then dry_run=1; else set -- "$@" "$word"; fi
done
out=$OUT
flags=(--model "$MODEL" --data "$DATA")
if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
    out=$out/seed_$SLURM_ARRAY_TASK_ID
    flags+=(--seed "$SLURM_ARRAY_TASK_ID")
fi
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$SLURM_CPUS_PER_TASK}
    flags+=(--workers $((SLURM_CPUS_PER_TASK - 1))) # one core is the trainer's own
fi
command=("$PYTHON" "$repo/$trainer" "${flags[@]}" --out "$out" "$@") # of a flag given twice the last counts
# a job that is started again resumes from its own newest checkpoint, whatever --resume named at first
[ "${SLURM_RESTART_COUNT:-0}" = 0 ] || [[ " $* " = *" --eval-only "* ]] || command+=(--resume auto)

if [ -n "$dry_run" ]; then
    if ! fault=$("$PYTHON" -c 'import sys; assert sys.version_info >= (3, 11), sys.version.split()[0]
import importlib.metadata; [importlib.metadata.version(name) for name in ("torch", "transformers")]' 2>&1); then
        echo "$PYTHON cannot train (${fault##*$'\n'}): set PYTHON to one of 3.11 or newer with requirements.txt" >&2
        exit 1
    fi
    mkdir -p "$out"
    scratch=$(mktemp -d "$out/dry_run.XXXXXX")
    trap 'rm -r "$scratch"' EXIT
    # the weights' headers; of a model trained --from-scratch only the configuration is read
    [[ " $* " = *" --from-scratch "* ]] ||
        bash "$here/download.sh" "$MODEL" ${AUDIO_MODEL:+"$AUDIO_MODEL"} ${VISION_MODEL:+"$VISION_MODEL"}
    few=(--check --limit 8 --device cpu --out "$scratch")
    [[ " $* " != *" --skip-bad"* ]] || few+=(--skip-bad 100%) # how many it leaves out, the complete data check says
    "${command[@]}" "${few[@]}"
    echo "dry run: no fault in the first examples of each split; the job would run ${command[*]}"
    exit
fi
[ -n "$job" ] || exec "${command[@]}"

hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR=${hosts%%$'\n'*} MASTER_PORT=$((20000 + SLURM_JOB_ID % 12000)) # below those that Linux gives away
echo "job $job, restart ${SLURM_RESTART_COUNT:-0}, on ${hosts//$'\n'/ }"
nvidia-smi --query-gpu=name,memory.total --format=csv,noheader 2>/dev/null || echo "no nvidia-smi"
echo "commit $(git -C "$repo" rev-parse HEAD 2>/dev/null || echo unknown): ${command[*]}"

# Each task is a rank. Not torchrun: it ends with 1 whatever its ranks end with, and keeps USR1 to itself.
# srun --wait ends the other ranks a minute after one has left; not srun --kill-on-bad-exit, by which the first to
# leave with 85 would have those killed that still save. srun --cpus-per-task and --export are not always sbatch's.
code=0
# shellcheck disable=SC2016 # each task expands its own
srun --wait=60 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --export=ALL bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
    echo "rank $RANK of $WORLD_SIZE on $(hostname)"
    exec "$@"' rank "${command[@]}" || code=$? # the largest of all ranks

# 85 is runtime.signals.EXIT_STOPPED: a signal came, the last step is saved. A job that can never end, because
# answering takes longer than the time limit, is not restarted for ever.
if [ "$code" = 85 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt "${MAX_RESTARTS:-100}" ]; then
    echo "code 85: back into the queue"
    scontrol requeue "$job" || echo "scontrol requeue failed: submit the same command again"
fi
exit "$code"
