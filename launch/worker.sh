#!/usr/bin/env bash
# The part of launch/tpu.sh that runs on each worker: a training that continues when the connection ends.
#
#   worker.sh install          makes the virtual environment
#   worker.sh start ARGUMENTS  starts `python -m contrastive_jax train --cluster ARGUMENTS` in the background
#   worker.sh poll OFFSET      prints "none", "running", "stopped" or "exit N", then "resumed STEP" (the checkpoint that the
#                              training began from, -1 for none), and then the log from byte OFFSET on
#   worker.sh stop             asks the training to save and end, and waits until it has
#   worker.sh profile STEPS    asks the training for a trace of its next steps, and waits until it is in the workdir
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
job=.job
mkdir -p "$job"

# The number may belong to another process after the machine was started again.
running() {
  [[ -e "$job/pid" ]] && tr '\0' ' ' 2> /dev/null < "/proc/$(< "$job/pid")/cmdline" | grep -q "worker.sh train"
}

# Prints one value of this machine from Google's metadata server. Elsewhere no such server answers.
metadata() {
  curl --silent --fail --max-time 10 --header "Metadata-Flavor: Google" \
    "http://${GCE_METADATA_HOST:-metadata.google.internal}/computeMetadata/v1/instance/$1"
}

# Prints why Google will soon take this machine away; nothing if it will not. Fails if the server does not answer.
notice() {
  local event maintenance start seconds
  event="$(metadata maintenance-event)" || return
  case "$event" in
    NONE | MIGRATE_ON_HOST_MAINTENANCE) ;; # the second moves the machine while it runs
    *) echo "$event" ;;
  esac
  [[ "$(metadata preempted)" != TRUE ]] || echo "preempted"
  # Planned maintenance is announced days ahead. Ten minutes before it begins are enough to save.
  maintenance="$(metadata "upcoming-maintenance?alt=json")" || return 0
  start="$(grep -oiE '"window_?start_?time": *"[^"]+' <<< "$maintenance" | grep -oE '[^"]+$')" || return 0
  seconds="$(date -d "$start" +%s)" || return 0
  ((seconds > $(date +%s) + 600)) || echo "maintenance at $start"
}

# Sends SIGTERM to process $1 when Google announces that this machine will be taken away, but not before the training has said
# that it handles SIGTERM.
watch_for_notices() {
  local reason
  until [[ -e "$job/ready" ]]; do sleep 1; done
  while :; do
    if reason="$(notice)"; then
      if [[ -n "$reason" ]]; then
        echo "notice: $reason; saving"
        kill -TERM "$1" 2> /dev/null || true
        return
      fi
      sleep "${NOTICE_SECONDS:-5}"
    else
      sleep 60
    fi
  done
}

# Prints the name of this worker's log in the workdir.
log_name() {
  local worker slice
  worker="$(metadata attributes/agent-worker-number)" || worker="$(grep -oE -- '-w-[0-9]+$' <<< "$HOSTNAME")" || worker="$HOSTNAME"
  slice="$(metadata attributes/tpu-env | grep -oE "MEGASCALE_SLICE_ID: *'[0-9]+" | grep -oE '[0-9]+$')" || true
  echo "${slice:+slice-$slice-}worker-${worker#-w-}.log"
}

# Ends a training that is left over on this worker while that of worker 0 has ended.
end_leftover() {
  local waited=0
  while running; do
    ((waited)) || echo "ending the training that is left over on $HOSTNAME" >&2
    kill "-$( ((waited < 30)) && echo TERM || echo KILL)" "$(< "$job/train")" 2> /dev/null || true
    sleep 1
    waited=$((waited + 1))
  done
}

# What `start` runs in the background.
train() {
  local argument workdir="" training status=0 waited helpers=()
  for argument in "$@"; do
    [[ "$argument" != --workdir=* ]] || workdir="${argument#*=}"
  done
  export CONTRASTIVE_JAX_READY_FILE="$PWD/$job/ready" CONTRASTIVE_JAX_PROFILE_FILE="$PWD/$job/profile" PYTHONUNBUFFERED=1
  python -m contrastive_jax train --cluster "$@" &
  training=$!
  echo "$training" > "$job/train"
  echo $$ > "$job/pid"
  watch_for_notices "$training" &
  helpers+=("$!")
  if [[ -n "$workdir" ]]; then
    python -m launch.copy_log "$job/log" "$workdir/logs/$(log_name)" "$training" 2> "$job/copy-errors" &
    helpers+=("$!")
  fi
  wait "$training" || status=$?
  kill "${helpers[0]}" 2> /dev/null || true
  # The last lines of the log are the ones that matter: wait for their copy, but not for a bucket that does not answer.
  for ((waited = 0; waited < 30 && ${#helpers[@]} > 1; waited++)); do
    kill -0 "${helpers[1]}" 2> /dev/null || break
    sleep 1
  done
  echo "$status" > "$job/exit"
}

case "${1:-}" in
  install)
    source launch/setup.sh tpu
    ;;
  start)
    end_leftover
    source launch/setup.sh tpu
    rm -f "$job"/{pid,train,exit,stopped,ready,profile}
    # In a session of its own, so that it does not end with the connection.
    setsid nohup bash launch/worker.sh train "${@:2}" > "$job/log" 2>&1 < /dev/null &
    until [[ -e "$job/exit" ]] || running; do sleep 0.1; done
    ;;
  train)
    train "${@:2}"
    ;;
  poll)
    if running; then
      echo running
    elif [[ -e "$job/stopped" ]]; then
      echo stopped
    elif [[ -e "$job/exit" ]]; then
      echo "exit $(< "$job/exit")"
    else
      echo none
    fi
    line="$(grep -aoE 'resuming from .*/[0-9]+$' "$job/log" 2> /dev/null | tail -n 1)" || line="/-1"
    echo "resumed ${line##*/}"
    [[ ! -e "$job/log" ]] || tail -c "+$((${2:-0} + 1))" "$job/log"
    ;;
  stop)
    if running; then
      touch "$job/stopped"
      kill -TERM "$(< "$job/train")"
      while running; do sleep 1; done
    fi
    ;;
  profile)
    if ! running || [[ ! -e "$job/ready" ]]; then
      echo "error: no training is at its steps here; see launch/tpu.sh status" >&2
      exit 2
    fi
    before="$(grep -ac 'profile of steps' "$job/log" || true)"
    echo "${2:-3}" > "$job/request"
    mv "$job/request" "$job/profile" # at once: the training reads it when it appears
    echo "waiting for a trace of ${2:-3} steps" >&2
    while (($(grep -ac 'profile of steps' "$job/log" || true) == before)); do
      if ! running; then
        echo "error: the training has ended before the trace" >&2
        exit 1
      fi
      sleep 1
    done
    grep -a 'profile of steps' "$job/log" | tail -n 1
    ;;
  *)
    sed -n '2,10s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 2
    ;;
esac
