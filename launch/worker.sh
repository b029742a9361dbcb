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
    # shellcheck disable=SC2016  # expanded by the inner shell
    setsid nohup bash -c '
      echo $$ > "$1/pid"
      python -m contrastive_jax.train --cluster "${@:2}" &
      echo $! > "$1/train"
      status=0
      wait $! || status=$?
      echo "$status" > "$1/exit"
    ' train "$job" "${@:2}" > "$job/log" 2>&1 < /dev/null &
    until [[ -e "$job/exit" ]] || running; do sleep 0.1; done
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
