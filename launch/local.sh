#!/usr/bin/env bash
# Trains on this machine: CPU, or one GPU where one is. Nothing else is needed than python3 and pip.
#
#   bash launch/local.sh                                          the debug recipe on the embedded data
#   bash launch/local.sh --config=configs/X.py --config.key=value anything else; --workdir=DIR to choose the folder
#
# What is there is reused: the virtual environment, the data, and a run's checkpoints (it resumes).
# PYTHON chooses the interpreter, VENV the virtual environment (.venv).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

config=configs/debug.py
workdir=""
data=""
for argument in "$@"; do
  case "$argument" in
    -h | --help)
      sed -n '2,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
      exit 0
      ;;
    --config=*) config="${argument#*=}" ;;
    --workdir=*) workdir="${argument#*=}" ;;
    --config.data.dir=*) data="${argument#*=}" ;;
  esac
done
name="$(basename "${config%%:*}" .py)"
variant="${config#"${config%%:*}"}"
if [[ -z "$workdir" ]]; then
  workdir="runs/$name${variant/:/-}"
  set -- "--workdir=$workdir" "$@"
fi

extra=""
if command -v nvidia-smi > /dev/null && nvidia-smi -L 2> /dev/null | grep -q GPU; then
  extra="cuda"
fi
# shellcheck source=launch/setup.sh
source launch/setup.sh "$extra"

if [[ -z "$data" && ! -e data/python/manifest.json ]]; then
  echo "== preparing the embedded data in data/python"
  python -m contrastive_jax.prepare --python --output=data/python --vocab_size=8192 --validation_fraction=0.1
fi

# XLA's CPU client takes fresh memory for every buffer. Huge pages, kept instead of given back, halve the cost of the page faults.
tunables=glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=34359738368:glibc.malloc.arena_max=1
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-$tunables}"
export CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-0}"

echo "== training $config in $workdir"
python -m contrastive_jax.train "$@"

echo "== the query-key test"
python -m contrastive_jax.evaluate "--model=$workdir" --tasks=query_key --baselines
echo
echo "checkpoints:  $workdir/checkpoints"
echo "results:      $workdir/query_key.json"
echo "curves:       $VIRTUAL_ENV/bin/tensorboard --logdir=$workdir"
