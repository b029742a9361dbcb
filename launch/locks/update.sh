#!/usr/bin/env bash
# Writes EXTRA-PYTHON.txt in this folder: every version that launch/setup.sh installs on Linux x86-64, from the ranges in setup.cfg.
#
#   pip install uv && bash launch/locks/update.sh           the newest versions that are a week old: mirrors have them, bad ones are gone
#   pip install uv && bash launch/locks/update.sh --keep    the versions of the files as they are, where setup.cfg allows them
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
newest=(--upgrade --exclude-newer "7 days")
[[ "${1:-}" != --keep ]] || newest=()
for python in 3.11 3.12; do
  for extra in base cuda cuda13 test tpu; do
    options=(--python-version "$python" --python-platform x86_64-manylinux_2_31 --no-annotate --no-emit-index-url --quiet)
    [[ "$extra" == base ]] || options+=(--extra "$extra")
    uv pip compile setup.cfg "${options[@]}" "${newest[@]}" --custom-compile-command "bash launch/locks/update.sh" \
      --output-file "launch/locks/$extra-$python.txt" > /dev/null
  done
done
