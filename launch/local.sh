#!/usr/bin/env bash
# Trains on this machine, on its CPU or on one GPU if it has any. Needs only python3 and pip.
#
#   bash launch/local.sh                                             the recipe local, on text of this Python installation
#   bash launch/local.sh --config=configs/X.py --config.key=value    any recipe and values; --workdir=DIR chooses the folder
#
# Run again, it reuses the virtual environment and the data, and the run continues from its newest checkpoint.
# Environment variables: PYTHON, the interpreter (python3); VENV, the folder of the virtual environment (.venv); EXTRAS=wandb,gcs
# installs these extras of setup.cfg too, here for Weights & Biases and gs://.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

config=""
workdir=""
data=""
for argument in "$@"; do
  case "$argument" in
    -h | --help)
      sed -n '2,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
      exit 0
      ;;
    --config=*) config="${argument#*=}" ;;
    --workdir=*) workdir="${argument#*=}" ;;
    --config.data.dir=*) data="${argument#*=}" ;;
  esac
done
if [[ -z "$config" ]]; then
  config=configs/local.py
  set -- "--config=$config" "$@"
fi
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
  echo "== preparing text of this Python installation in data/python"
  python -m contrastive_jax prepare --python --output=data/python --vocab_size=16384 --validation_fraction=0.1
fi

# XLA's CPU client allocates fresh memory for every buffer. Huge pages that are kept, not given back, halve the page faults' cost.
tunables=glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=34359738368:glibc.malloc.arena_max=1
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-$tunables}"
export CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-0}"

echo "== training $config in $workdir"
python -m contrastive_jax train "$@"

echo "== the query-key test"
python -m contrastive_jax evaluate "--model=$workdir" --tasks=query_key --baselines
echo
echo "checkpoints:  $workdir/checkpoints"
echo "results:      $workdir/query_key.json"
printf 'curves:       %q --logdir=%q\n' "$VIRTUAL_ENV/bin/tensorboard" "$workdir"
printf 'export:       %q -m contrastive_jax export --model=%q --output=%q\n' "$VIRTUAL_ENV/bin/python" "$workdir" "exported/$name${variant/:/-}"
