#!/usr/bin/env bash
# Make what the tests need and run those that are not slow, two at a time. Arguments go to pytest:
#   scripts/test.sh tests/unit            some of them
#   scripts/test.sh -m slow               the slow ones; with -n 0 one after the other
#   scripts/test.sh -m "not engine"       those that start no engine: a -m here takes the place of "not slow"
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/install.sh test
unset PYTHONDONTWRITEBYTECODE # engines and servers are processes of their own: compile what they import once
exec "${VENV:-.venv}/bin/python" -m pytest -m "not slow" -n 2 --dist loadfile --durations=25 "$@"
