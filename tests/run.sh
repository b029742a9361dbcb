#!/usr/bin/env bash
# Installs what the tests need and runs them: ruff, mypy, pytest. Arguments go to pytest (-m slow: the long ones).
# PYTHON chooses the interpreter, VENV the virtual environment (.venv). Two tests run side by side (WORKERS=N: another number).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/setup.sh
source launch/setup.sh test
ruff format --check .
ruff check .
mypy
# A worker takes the tests of one half in their order, and the rest of the other half when it is done: fixtures of a file are made once.
python -m pytest --numprocesses="${WORKERS:-2}" --dist=worksteal "$@"
