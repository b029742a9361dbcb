#!/usr/bin/env bash
#SBATCH --job-name=contrastive_jax
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --signal=B:TERM@300
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
# Trains on the GPUs of one or several nodes.
#
#   bash launch/gpu.sh --config=configs/X.py --workdir=DIR [--config.key=value ...]       on this node
#   bash launch/gpu.sh --coordinator=HOST:PORT --num_processes=N --process_id=I ...       on each of N nodes; HOST is node 0
#   sbatch --nodes=4 --gpus-per-node=8 --exclusive --time=24:00:00 launch/gpu.sh ...      under SLURM
#
# With `bash` it trains on this node alone, also in a shell or a session that SLURM gave (srun --pty bash, Open OnDemand), and never
# puts that job back into the queue. Only `sbatch launch/gpu.sh` trains on all nodes of a job.
#
# Options, among the arguments of the training:
#   --processes=node|gpu   one process per node, which drives all of its GPUs (the default), or one per GPU
#   --retries=N            how often a failed job starts again without a newer checkpoint in between (default 10)
#
# Under SLURM, submit from the repository's root, in a folder that all nodes share. Five minutes before the time limit, or when
# the job is preempted, the run saves a checkpoint and ends, and the job returns to the queue, as it does after a failure of a
# machine. It then continues from its workdir. Bad input and a run that no longer trains end the job. The processes of a node
# share the cores that the job has there: all with --exclusive, or those of --cpus-per-task.
# Environment variables: PYTHON, the interpreter (python3); VENV, the folder of the virtual environment (.venv); CUDA=13 installs
# CUDA 13 in place of 12; EXTRAS=wandb,gcs installs these extras of setup.cfg too, here for Weights & Biases and gs://;
# CONTAINER=IMAGE.sif runs in that Apptainer image, and nothing is installed (launch/container.md);
# CPU_BIND, how srun binds each process (cores); JAX_PLATFORMS=cpu runs it without GPUs.
set -euo pipefail

PREEMPTED=75 # exit status of a training that saved and ended because it was told to (contrastive_jax/runtime/processes.py)

# As the script of a job, SLURM runs a copy of this file, which lies in no checkout.
root="$(dirname "${BASH_SOURCE[0]}")/.." job_script=""
if [[ ! -e "$root/launch/gpu.sh" || ! -e "$root/setup.cfg" ]]; then
  root="${SLURM_SUBMIT_DIR:-.}" job_script=1
fi
cd "$root"
if [[ ! -e launch/gpu.sh ]]; then
  echo "error: submit from the repository's root: cd REPOSITORY && sbatch launch/gpu.sh ..." >&2
  exit 2
fi

fail() {
  echo "error: $*" >&2
  exit 2
}

processes=node retries=10 training=()
for argument in "$@"; do
  case "$argument" in
    -h | --help) training=() && break ;;
    --processes=*) processes="${argument#*=}" ;;
    --retries=*) retries="${argument#*=}" ;;
    *) training+=("$argument") ;;
  esac
done
if ((!${#training[@]})); then
  sed -n '8,/^set /{/^set /d;s/^# \{0,1\}//;p}' launch/gpu.sh
  exit 0
fi
[[ "$processes" == node || "$processes" == gpu ]] || fail "--processes=$processes: give node or gpu"
[[ "$retries" =~ ^[0-9]+$ ]] || fail "--retries=$retries: give a whole number"

# JAX's default is three quarters of the memory; `plan` assumes this share (contrastive_jax/planning/hardware.py).
export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-.92}"

case "${JAX_PLATFORMS:-},${CUDA:-12}" in
  cpu,*) extra="" ;;
  *,12*) extra=cuda ;;
  *,13*) extra=cuda13 ;;
  *) fail "CUDA=$CUDA: give 12 or 13" ;;
esac

# Installs the package, unless a container has it, and sets `python`, the command of its interpreter.
install() {
  python=(python)
  if [[ -n "${CONTAINER:-}" ]]; then
    [[ -e "$CONTAINER" ]] || fail "CONTAINER=$CONTAINER: no such file; launch/container.md says how to make it"
    python=(apptainer exec "--nv" "$CONTAINER" python)
  else
    # shellcheck source=launch/setup.sh
    source launch/setup.sh "$extra"
  fi
}

# Prints the number of GPUs that this process sees.
count_gpus() {
  if [[ -z "$extra" ]]; then
    echo "${SLURM_GPUS_ON_NODE:-1}"
  else
    nvidia-smi --list-gpus | grep -c GPU
  fi
}

# Prints the exit status of a run from those of its processes: who saved decides, then who refused, then who did not join.
status_of_run() {
  local wanted status=0
  for wanted in "$PREEMPTED" 2 3 4 1; do
    if [[ " $* " == *" $wanted "* ]]; then
      echo "$wanted"
      return
    fi
  done
  for status in "$@"; do
    ((status == 0)) || break
  done
  echo "$status"
}

# One process of a job. Its status goes into a file: srun gives only one status for all.
run_task() {
  local status=0 count
  install
  if [[ -n "$extra" ]]; then
    count="$(count_gpus)" || fail "$(hostname) has no GPU; ask for GPUs with sbatch --gpus-per-node"
    # JAX's own choice would be the GPU of the process's rank on the node, even for one process per node.
    JAX_LOCAL_DEVICE_IDS="$(seq -s, 0 "$((count - 1))")"
    [[ "$processes" == node || "$count" == 1 ]] || JAX_LOCAL_DEVICE_IDS="$SLURM_LOCALID"
    export JAX_LOCAL_DEVICE_IDS
  fi
  trap : TERM # the training has it too, and this shell must outlive it
  "${python[@]}" -m contrastive_jax train --cluster "${training[@]}" || status=$?
  echo "$status" > "$job/status-$SLURM_PROCID"
  # srun kills the other processes as soon as one has failed: those that still save must not count as failed.
  ((status != PREEMPTED)) || exit 0
  exit "$status"
}

# Starts all processes of a job and waits for them; sets `status`.
run_step() {
  local per_node=1 available="${SLURM_CPUS_ON_NODE:-1}" step
  [[ "$processes" == node ]] || per_node="$(count_gpus)" || fail "$(hostname) has no GPU; ask with sbatch --gpus-per-node"
  if [[ -n "${SLURM_CPUS_PER_TASK:-}" ]]; then
    available=$((SLURM_CPUS_PER_TASK * ${SLURM_NTASKS_PER_NODE:-1}))
  elif ((available < $(nproc --all))); then
    echo "warning: the job has $available of the $(nproc --all) cores of $(hostname), since it asked for none: take sbatch" \
      "--exclusive, or --cpus-per-task" >&2
  fi
  local cores=$((available / per_node > 0 ? available / per_node : 1))
  echo "== $SLURM_JOB_NUM_NODES nodes × $per_node processes × $cores cores"
  rm -f "$job"/status-*
  # Since SLURM 22.05 srun does not take --cpus-per-task from sbatch: without it a process has one core.
  srun --kill-on-bad-exit=1 --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$((SLURM_JOB_NUM_NODES * per_node))" \
    --ntasks-per-node="$per_node" --cpus-per-task="$cores" --cpu-bind="${CPU_BIND:-cores}" \
    env CONTRASTIVE_JAX_TASK=1 bash launch/gpu.sh --processes="$processes" "${training[@]}" &
  step=$!
  # The signal of --signal=B:TERM reaches only this script.
  trap 'told=1; echo "== SIGTERM: asking the run to save"; scancel --signal=TERM "$SLURM_JOB_ID"' TERM
  status=0
  wait "$step" || status=$?
  while kill -0 "$step" 2> /dev/null; do # the signal interrupts the wait: wait again
    status=0
    wait "$step" || status=$?
  done
  local statuses
  mapfile -t statuses < <(cat "$job"/status-* 2> /dev/null) # a process that was killed left none
  status="$(status_of_run "${statuses[@]}" "$status")"
}

# Prints the step of the newest checkpoint, on this disk or in a bucket; -1 if there is none.
newest_checkpoint() {
  JAX_PLATFORMS=cpu "${python[@]}" - "${training[@]}" <<- 'PYTHON' 2> /dev/null || echo -1
	import argparse

	from contrastive_jax.runtime import checkpoint

	parser = argparse.ArgumentParser()
	parser.add_argument("--workdir")
	workdir = parser.parse_known_args()[0].workdir
	print(max(checkpoint.Checkpoints(workdir, read_only=True).steps(), default=-1))
	PYTHON
}

# Counts a failure of the job; returns 1 if it was one too many without a newer checkpoint.
may_start_again() {
  local failures=0 before=-1 newest
  newest="$(newest_checkpoint)"
  [[ ! -e "$job/failures" ]] || read -r failures before < "$job/failures"
  ((newest <= before)) || failures=0
  failures=$((failures + 1))
  echo "$failures $newest" > "$job/failures"
  ((failures <= retries))
}

requeue() {
  echo "== $1; back into the queue"
  trap '' TERM # SLURM ends this script with it
  scontrol requeue "$SLURM_JOB_ID"
}

# The batch script of a job: installs once, starts the processes, and puts the job back into the queue if that may help.
run_job() {
  local status told=""
  install
  echo "== job $SLURM_JOB_ID on ${SLURM_JOB_NODELIST:-?}, start ${SLURM_RESTART_COUNT:-0}: ${training[*]}"
  ((${SLURM_RESTART_COUNT:-0})) || rm -rf "$job" # of an older job with this number
  mkdir -p "$job"
  run_step
  case "$status" in
    0 | 2 | 3) ;;
    "$PREEMPTED") requeue saved ;;
    *)
      if [[ -n "$told" ]]; then # before the training listened, or while it did not save in time
        requeue "exit $status after SIGTERM"
      elif may_start_again; then
        requeue "exit $status"
      else
        echo "error: the run failed $((retries + 1)) times in a row without a newer checkpoint (--retries=$retries), at last with" \
          "status $status" >&2
      fi
      ;;
  esac
  exit "$status"
}

# On this node, one process per GPU.
run_per_gpu() {
  local count port number pid status pids=() statuses=()
  [[ " ${training[*]}" != *" --coordinator"* && " ${training[*]}" != *" --cluster"* ]] \
    || fail "--processes=gpu is for one node or for SLURM; without it, --coordinator joins nodes with one process each"
  count="$(count_gpus)"
  port=$((20000 + RANDOM % 10000))
  for ((number = 0; number < count; number++)); do
    JAX_LOCAL_DEVICE_IDS=$number "${python[@]}" -m contrastive_jax train --coordinator="localhost:$port" --num_processes="$count" \
      --process_id="$number" "${training[@]}" &
    pids+=("$!")
  done
  trap 'kill -TERM "${pids[@]}" 2> /dev/null || true' TERM INT
  for pid in "${pids[@]}"; do
    status=0
    wait "$pid" || status=$?
    while kill -0 "$pid" 2> /dev/null; do
      status=0
      wait "$pid" || status=$?
    done
    statuses+=("$status")
  done
  exit "$(status_of_run "${statuses[@]}")"
}

job=".job/slurm-${SLURM_JOB_ID:-}"
if [[ -n "${CONTRASTIVE_JAX_TASK:-}" ]]; then # run_step started it; SLURM's own variables also stand in interactive shells
  run_task
elif [[ -n "$job_script" && -n "${SLURM_JOB_ID:-}" ]]; then
  run_job
fi

# From here on this node trains by itself, whatever job its shell belongs to.
if [[ " ${training[*]}" != *" --cluster"* ]]; then
  # With it JAX would take this for a process of a SLURM cluster, which uses only the GPU with this number.
  unset SLURM_LOCALID
  if [[ " ${training[*]}" != *" --coordinator"* ]]; then
    ((${SLURM_PROCID:-0} == 0)) \
      || fail "srun started this script several times, and each would train by itself; submit it with sbatch launch/gpu.sh"
    ((${SLURM_JOB_NUM_NODES:-1} == 1)) \
      || echo "warning: only $(hostname) trains, of $SLURM_JOB_NUM_NODES nodes of this job; sbatch launch/gpu.sh trains on all" >&2
  fi
fi
if [[ -n "$extra" ]] && ! nvidia-smi --list-gpus > /dev/null; then
  fail "no GPU answers on this machine (nvidia-smi); set JAX_PLATFORMS=cpu to run without GPUs"
fi
install
echo "== training on $(hostname): ${training[*]}"
[[ "$processes" == node ]] || run_per_gpu
exec "${python[@]}" -m contrastive_jax train "${training[@]}"
