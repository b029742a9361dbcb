# shellcheck shell=bash
# Sourced by the launchers with the extra to install ("", "cuda", "test", "tpu" ...): makes the virtual environment and activates it.
# It installs the versions of launch/locks/EXTRA-PYTHON.txt. If there is no such file (for another extra or Python, or outside
# Linux on x86-64), it installs what setup.cfg allows. An environment that was made from the same files is reused as it is.
# PYTHON chooses the interpreter, VENV the folder (.venv). Without PYTHON it is python3 if that has a version that is supported
# (on TPUs python3.12 comes first, so that all workers have the same), or python3.12, or python3.11. If there is none, uv
# downloads Python 3.12.
venv="${VENV:-.venv}"
extra="${1:-}"

# Prints the interpreter to use; nothing if there is none.
find_python() {
  local candidate
  for candidate in $([[ "$extra" != tpu ]] || echo python3.12) python3 python3.12 python3.11 python3.13; do
    if is_supported "$candidate"; then
      echo "$candidate"
      return
    fi
  done
}

is_supported() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2> /dev/null; }

make_venv() {
  local python="${PYTHON:-$(find_python)}"
  if [[ -n "${PYTHON:-}" ]] && ! is_supported "$python"; then
    echo "error: PYTHON=$PYTHON is not Python 3.11, 3.12 or 3.13; choose one of these" >&2
    return 1
  fi
  # Ubuntu's Python has no ensurepip unless python3-venv is installed.
  if [[ -n "$python" ]] && "$python" -c 'import ensurepip, venv' 2> /dev/null; then
    "$python" -m venv "$venv"
    return
  fi
  if ! python3 -m pip install --quiet --user uv; then
    echo "error: ${python:-python3} cannot make a virtual environment, and pip could not install uv;" \
      "install python3.12 with its venv (Ubuntu: sudo add-apt-repository ppa:deadsnakes/ppa && sudo apt install python3.12-venv)" >&2
    return 1
  fi
  if ! python3 -m uv venv --quiet --seed --python "${python:-3.12}" "$venv"; then
    echo "error: no Python 3.11 to 3.13 is installed, and uv could not download one from github.com; install python3.12-venv" \
      "(Ubuntu: ppa:deadsnakes/ppa), or name a mirror in UV_PYTHON_INSTALL_MIRROR (launch/tpu.sh --env=...)" >&2
    return 1
  fi
}

# Prints the lock file for the extra and this Python; nothing if there is none.
lock_file() {
  local file
  file="launch/locks/${extra:-base}-$("$venv/bin/python" -c 'import sys; print("%d.%d" % sys.version_info[:2])').txt"
  [[ "$(uname -sm)" != "Linux x86_64" || ! -e "$file" ]] || echo "$file"
}

install_package() {
  local lock="$1"
  echo "== installing into $venv: ${lock:-the versions that setup.cfg allows, since there is no lock file}"
  if [[ -n "$lock" ]]; then
    # pip would compile every module; Python compiles those that are imported anyway, at their first import.
    "$venv/bin/python" -m pip install --quiet --no-compile --requirement "$lock"
    "$venv/bin/python" -m pip install --quiet --no-deps --editable .
  else
    "$venv/bin/python" -m pip install --quiet --editable ".${extra:+[$extra]}"
  fi
}

[[ -e "$venv/bin/python" ]] || make_venv
lock="$(lock_file)"
stamp="$venv/installed-${extra:-base}"
if ! cat setup.cfg ${lock:+"$lock"} | cmp -s - "$stamp"; then
  install_package "$lock"
  cat setup.cfg ${lock:+"$lock"} > "$stamp"
fi
# shellcheck disable=SC1091  # written by venv
source "$venv/bin/activate"
