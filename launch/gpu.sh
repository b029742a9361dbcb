#!/usr/bin/env bash
#SBATCH --job-name=contrastive_jax
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --signal=B:TERM@300
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
# Trains on the GPUs of one node or of several; one process a node drives all of its GPUs.
#
#   bash launch/gpu.sh --config=configs/X.py --workdir=DIR [--config.key=value ...]       this node
#   bash launch/gpu.sh --coordinator=HOST:PORT --num_processes=N --process_id=I ...       on each of N nodes; HOST is the first
#   sbatch --nodes=4 --gpus-per-node=8 --cpus-per-task=64 --time=24:00:00 launch/gpu.sh ...       under SLURM
#
# Under SLURM submit from the repository's root, in a folder that all nodes share. Before the time limit, or when the job is
# preempted, the run saves and ends, and the job goes back into the queue; it then goes on from its workdir.
# PYTHON chooses the interpreter, VENV the virtual environment (.venv). JAX_PLATFORMS=cpu: try it without GPUs.
set -euo pipefail

PREEMPTED=75 # the training saved and ended because it was told to (contrastive_jax/train.py)

# SLURM runs a copy of this file from elsewhere.
cd "${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/..}"
if [[ ! -e launch/gpu.sh ]]; then
  echo "error: submit from the repository's root: cd REPOSITORY && sbatch launch/gpu.sh ..." >&2
  exit 2
fi
case "${1:-}" in
  "" | -h | --help)
    sed -n '8,17s/^# \{0,1\}//p' launch/gpu.sh
    exit 0
    ;;
esac

# JAX would take three quarters of the memory: the plan counts on this share (contrastive_jax/planning/hardware.py).
export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-.92}"

extra=cuda
if [[ "${JAX_PLATFORMS:-}" == cpu ]]; then
  extra=""
fi

# One process of a job: on its node, with all GPUs of the node (JAX would give it only the one of its local rank).
if [[ -n "${SLURM_STEP_ID:-}" ]]; then
  # shellcheck source=launch/setup.sh
  source launch/setup.sh "$extra"
  if [[ -n "$extra" ]]; then
    count="$(nvidia-smi --list-gpus | grep -c GPU)" || {
      echo "error: no GPU on $(hostname); ask for them with --gpus-per-node" >&2
      exit 2
    }
    JAX_LOCAL_DEVICE_IDS="$(seq -s, 0 "$((count - 1))")"
    export JAX_LOCAL_DEVICE_IDS
  fi
  exec python -m contrastive_jax.train --cluster "$@"
fi

# The batch script: installs once, starts a process on each node, and puts the job back into the queue after a preemption.
if [[ -n "${SLURM_JOB_ID:-}" ]]; then
  # shellcheck source=launch/setup.sh
  source launch/setup.sh "$extra"
  echo "== job $SLURM_JOB_ID on ${SLURM_JOB_NODELIST:-?}, start ${SLURM_RESTART_COUNT:-0}: $*"
  srun --kill-on-bad-exit=1 bash launch/gpu.sh "$@" &
  step=$!
  # --signal=B:TERM reaches this script alone.
  trap 'echo "== SIGTERM: asking the run to save"; scancel --signal=TERM "$SLURM_JOB_ID"' TERM
  status=0
  wait "$step" || status=$?
  while kill -0 "$step" 2> /dev/null; do # a wait that the signal interrupted
    status=0
    wait "$step" || status=$?
  done
  if ((status == PREEMPTED)); then
    echo "== saved; back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
  fi
  exit "$status"
fi

if [[ -n "$extra" ]] && ! nvidia-smi --list-gpus > /dev/null; then
  echo "error: no GPU answers on this machine (nvidia-smi); JAX_PLATFORMS=cpu tries it without" >&2
  exit 2
fi
# shellcheck source=launch/setup.sh
source launch/setup.sh "$extra"
echo "== training on $(hostname): $*"
exec python -m contrastive_jax.train "$@"
