#!/usr/bin/env bash
# Check clasp_vllm on this machine's GPU: are answers those of plain vLLM, and what do the parts of a round cost?
# Needs vLLM and clasp_vllm, and installs nothing. Options go to gpu_check.py:
#   scripts/gpu_check.sh                                  everything, in 420 seconds at most
#   scripts/gpu_check.sh --only equality --seconds 200    are answers the same? The first thing to know
#   scripts/gpu_check.sh --small --only segments --engines skip16_k4 --seconds 110    does it run at all?
#   scripts/gpu_check.sh --help                           all options
# OUT is the folder for results and logs (default gpu_check), PYTHON the interpreter (default python).
set -uo pipefail
OUT=${OUT:-gpu_check}
"${PYTHON:-python}" "$(dirname "$0")/gpu_check.py" "$@" --out "$OUT"
status=$?
if [ -f "$OUT/results.json" ]; then
    echo "results: $(cd "$OUT" && pwd)/results.json"
fi
exit $status
