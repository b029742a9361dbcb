#!/usr/bin/env bash
# One worker's side of launch/tpu.sh: a training that goes on when the connection ends. Run in the shipped tree.
#
#   worker.sh install          makes the virtual environment
#   worker.sh start ARGUMENTS  starts `python -m contrastive_jax.train --cluster ARGUMENTS` in the background
#   worker.sh poll OFFSET      one line, "none", "running", "stopped" or "exit N"; then the log from that byte on
#   worker.sh stop             asks it to save and end, and waits for it
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
job=.job
mkdir -p "$job"

running() {
  [[ -e "$job/pid" ]] && kill -0 "$(< "$job/pid")" 2> /dev/null
}

# Asks process $1 to save and end when Google announces that this machine will be taken; elsewhere nobody answers.
heed_notices() {
  local event
  while event="$(curl --silent --fail --header "Metadata-Flavor: Google" \
    "${METADATA:-http://metadata.google.internal}/computeMetadata/v1/instance/maintenance-event")"; do
    if [[ "$event" != NONE ]]; then
      echo "notice: $event; saving"
      kill -TERM "$1" 2> /dev/null || true
      return
    fi
    sleep "${NOTICE_SECONDS:-5}"
  done
}

case "${1:-}" in
  install)
    source launch/setup.sh tpu
    ;;
  start)
    if running; then
      echo "error: a training runs already; see: launch/tpu.sh logs, launch/tpu.sh stop" >&2
      exit 2
    fi
    source launch/setup.sh tpu
    rm -f "$job"/{pid,train,exit,stopped}
    # A session of its own: the end of the connection does not reach it.
    setsid nohup bash launch/worker.sh train "${@:2}" > "$job/log" 2>&1 < /dev/null &
    until [[ -e "$job/exit" ]] || running; do sleep 0.1; done
    ;;
  train) # what `start` puts into the background
    echo $$ > "$job/pid"
    python -m contrastive_jax.train --cluster "${@:2}" &
    training=$! status=0
    echo "$training" > "$job/train"
    heed_notices "$training" &
    wait "$training" || status=$?
    kill %2 2> /dev/null || true
    echo "$status" > "$job/exit"
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
    [[ ! -e "$job/log" ]] || tail -c "+$((${2:-0} + 1))" "$job/log"
    ;;
  stop)
    if running; then
      touch "$job/stopped"
      kill -TERM "$(< "$job/train")"
      while running; do sleep 1; done
    fi
    ;;
  *)
    sed -n '2,7s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 2
    ;;
esac
