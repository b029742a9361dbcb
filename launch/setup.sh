# shellcheck shell=bash
# Sourced by the launchers with the extra to install ("", "cuda", "test", "tpu" ...): makes the virtual environment and activates it.
# It installs the versions of launch/locks/EXTRA-PYTHON.txt. If there is no such file (for another extra or Python, or outside
# Linux on x86-64), it installs what setup.cfg allows. An environment that was made from the same files is reused as it is.
# EXTRAS names more extras of setup.cfg, such as EXTRAS=wandb,gcs. They are installed after the lock file, whose versions stay. With
# `--check` in place of the extra, it only checks these names.
# PYTHON chooses the interpreter, VENV the folder (.venv). Without PYTHON it is python3 if that has a version that is supported
# (on TPUs python3.12 comes first, so that all workers have the same), or python3.12, or python3.11. If there is none, uv
# downloads Python 3.12.
# It returns 2 if EXTRAS is wrong and 1 if something cannot be installed, also in a shell without `set -e`.
venv="${VENV:-.venv}"
extra="${1:-}"
more="${EXTRAS:-}"

# Checks the names in EXTRAS. pip only warns of one that it does not know, and the training would miss the package.
check_extras() {
  local word known
  [[ -n "$more" ]] || return 0
  known="$(sed -n '/^\[options.extras_require\]/,/^\[mypy\]/s/^\([a-z0-9]*\) =$/\1/p' setup.cfg)"
  for word in ${more//,/ }; do
    if ! grep -qxF -e "$word" <<< "$known"; then
      echo "error: EXTRAS=$more: setup.cfg has no extra $word; give names from ${known//$'\n'/, }" >&2
      return 2
    fi
  done
}

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
    if ! "$python" -m venv "$venv"; then
      echo "error: $python could not make the virtual environment $venv, for the reason above; mend that and start again" >&2
      return 1
    fi
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
  local lock="$1" pip=("$venv/bin/python" -m pip install --quiet)
  local package=(--no-deps --editable .) all="$extra${extra:+${more:+,}}$more"
  echo "== installing into $venv: ${lock:-the versions that setup.cfg allows, since there is no lock file}"
  if [[ -n "$lock" ]]; then
    # pip would compile every module; Python compiles those that are imported anyway, at their first import.
    [[ -z "$more" ]] || package=(--no-compile --constraint "$lock" --editable ".[$more]")
    "${pip[@]}" --no-compile --requirement "$lock" && "${pip[@]}" "${package[@]}" && return
  else
    "${pip[@]}" --editable ".${all:+[$all]}" && return
  fi
  echo "error: pip could not install everything into $venv, for the reason above; mend that and start again" >&2
  return 1
}

# Prints what decides what is installed.
wanted() {
  cat setup.cfg ${lock:+"$lock"}
  printf '%s' "$more"
}

check_extras || return
[[ "$extra" != --check ]] || return 0
# venv writes this file last: an environment without it is half made.
[[ -e "$venv/bin/activate" ]] || make_venv || return
lock="$(lock_file)"
stamp="$venv/installed-${extra:-base}"
if ! wanted | cmp -s - "$stamp"; then
  # The stamp says that everything is there, so it comes last.
  install_package "$lock" || return
  wanted > "$stamp"
fi
# shellcheck disable=SC1091  # written by venv
source "$venv/bin/activate"
