# shellcheck shell=bash
# Which Python and which cache; read by job.sh and download.sh. Two lines to adapt to a cluster: [2], [3].

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ -z "${PYTHON:-}" ]; then # the repository's, or that of the active environment
    for folder in "$repo/.venv" ${VIRTUAL_ENV:+"$VIRTUAL_ENV"} ${CONDA_PREFIX:+"$CONDA_PREFIX"}; do
        [ ! -x "$folder/bin/python" ] || { PYTHON=$folder/bin/python && break; }
    done
    export PYTHON=${PYTHON:-python3} # [2] which Python, where there is neither
    echo "Python: $PYTHON" >&2
fi
export HF_HOME=${HF_HOME:-$HOME/.cache/huggingface} # [3] the shared cache that download.sh fills
