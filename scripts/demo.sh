#!/usr/bin/env bash
# Serve a model with plain vLLM and with CLaSp, ask both in turn over HTTP, print the answers and both speeds.
#   scripts/demo.sh                               SmolLM2-135M-Instruct, fetched once: 93 MB
#   scripts/demo.sh --tiny                        the tiny model in this repository, no assistant
#   scripts/demo.sh meta-llama/Meta-Llama-3-8B    any model of the Llama family, on a GPU
#   scripts/demo.sh --help                        all options
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/install.sh demo
exec "${VENV:-.venv}/bin/python" scripts/demo/demo.py "$@"
