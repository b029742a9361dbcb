#!/usr/bin/env bash
# Installs what the tests need and runs them: ruff, mypy, pytest. Arguments go to pytest (-m slow: the long ones).
# PYTHON chooses the interpreter, VENV the virtual environment (.venv).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/setup.sh
source launch/setup.sh test
ruff format --check .
ruff check .
mypy
python -m pytest "$@"
