#!/usr/bin/env bash
# Make what the tests need and run them. Arguments go to pytest; the slow tests: scripts/test.sh -m slow
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/install.sh test
if [ $# -eq 0 ]; then
    set -- -m "not slow" -n 2 --dist loadfile --durations=25
fi
exec "${VENV:-.venv}/bin/python" -m pytest "$@"
