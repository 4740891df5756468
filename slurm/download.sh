#!/usr/bin/env bash
# On the login node, which has a network: fetch models into the shared cache, where jobs find them offline; with a
# model the vision tower that it names.
#
#   bash slurm/download.sh ORGANISATION/NAME …      # then MODEL=ORGANISATION/NAME sbatch slurm/llava_med.sh
#
# An interrupted download resumes when the command is repeated. A folder is checked, too: whatever is missing or cut
# off is listed, and the exit code is 1. PYTHON and HF_HOME must be those of the job script.
set -euo pipefail
[ $# -gt 0 ] || { echo "usage: bash slurm/download.sh MODEL …" >&2; exit 2; }

. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
PYTHONPATH=$repo exec "$PYTHON" -c '
import sys
from runtime import original_llava
for name in sys.argv[1:]:
    print(f"{name} is complete: {original_llava.find(name)}")' "$@"
