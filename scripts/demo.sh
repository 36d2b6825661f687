#!/usr/bin/env bash
# Serve a model with plain vLLM and with CLaSp, query both over HTTP, print the answers and both speeds.
#   scripts/demo.sh                               the demo model in this repository
#   scripts/demo.sh meta-llama/Meta-Llama-3-8B    any model of the Llama family, on a GPU
#   scripts/demo.sh --help                        all options
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/install.sh
exec "${VENV:-.venv}/bin/python" scripts/demo/demo.py "$@"
