# shellcheck shell=bash
# Sourced with the extras to install ("", "cuda", "test" ...): makes the virtual environment and enters it.
# An environment made from the same setup.cfg with the same extras is reused as it is.
# PYTHON chooses the interpreter; where python3 is older than 3.11 (TPU VM images), uv brings one.
venv="${VENV:-.venv}"
stamp="$venv/installed-${1:-base}"

make_venv() {
  local python="${PYTHON:-python3}"
  if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    "$python" -m venv "$venv"
  elif [[ -n "${PYTHON:-}" ]]; then
    echo "error: PYTHON=$PYTHON is older than 3.11; choose a newer one" >&2
    return 1
  else
    "$python" -m pip install --quiet --user uv
    "$python" -m uv venv --quiet --seed --python '>=3.11' "$venv"
  fi
}

if ! cmp -s setup.cfg "$stamp"; then
  echo "== installing into $venv"
  [[ -e "$venv/bin/python" ]] || make_venv
  "$venv/bin/python" -m pip install --quiet --editable ".${1:+[$1]}"
  cp setup.cfg "$stamp"
fi
# shellcheck disable=SC1091  # written by venv
source "$venv/bin/activate"
