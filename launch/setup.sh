# shellcheck shell=bash
# Sourced with the extras to install ("", "cuda", "test" ...): makes the virtual environment and enters it.
# An environment made from the same setup.cfg with the same extras is reused as it is.
venv="${VENV:-.venv}"
stamp="$venv/installed-${1:-base}"
if ! cmp -s setup.cfg "$stamp"; then
  echo "== installing into $venv"
  [[ -e "$venv/bin/python" ]] || "${PYTHON:-python3}" -m venv "$venv"
  "$venv/bin/python" -m pip install --quiet --editable ".${1:+[$1]}"
  cp setup.cfg "$stamp"
fi
# shellcheck disable=SC1091  # written by venv
source "$venv/bin/activate"
