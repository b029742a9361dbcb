#!/usr/bin/env bash
# Trains on a Cloud TPU VM or pod slice, or on several slices, through gcloud. Every worker runs the same command.
#
#   bash launch/tpu.sh COMMAND --name=NAME --zone=ZONE [OPTION ...] [-- TRAINING ARGUMENTS]
#
# Commands
#   run      create the slice and set it up if needed, train, and show the log until the end. A slice that was taken back is
#            created again, a training that failed is started again, and it continues from its workdir. If a training is
#            already running, show its log. Bad input (exit status 2) and a run that no longer trains (3) are final.
#   create   create the slice
#   setup    copy the working tree to all workers and install it
#   status   print the state of the slice and of the training
#   logs     print the whole log of --worker=N (default 0). If the slice is gone, give "-- --workdir=DIR" to print the copy
#            in DIR/logs/, where every worker keeps one
#   profile  take a trace of --steps=N steps (default 3) from the training on --worker=N; it goes to the workdir
#   ssh      open a shell on --worker=N; with "-- COMMAND", run that command on --worker=N or --worker=all
#   stop     save a checkpoint and end the training; the slice stays
#   delete   delete the slice, with everything that was not written to gs://
#
# Options
#   --type=TYPE            accelerator type: v5litepod-256, v6e-64, v5p-128, v4-32 ...           (create, run)
#   --slices=N             train on N slices of TYPE, connected by the data-centre network; implies --queued
#   --project=PROJECT      the project; default: the one that gcloud is configured with
#   --spot                 use capacity that may be taken back
#   --queued               wait for capacity in the queue (queued resources); without it, ask again and again
#   --runtime=VERSION      software version; default: the one that belongs to TYPE
#   --gcloud=FLAG          one more flag for gcloud's "create", for example --gcloud=--network=NET; may be repeated
#   --ssh=FLAG             one more flag for gcloud's "ssh" and "scp", for example --ssh=--internal-ip; may be repeated
#   --env=KEY=VALUE        set an environment variable for the installation and the training; may be repeated. --env=EXTRAS=wandb
#                          also installs this extra of setup.cfg, or several, separated by commas
#   --retries=N            how often `run` starts a failed training again without a newer checkpoint in between (default 10)
#   --restarts=N           how often `run` starts again in all, after preemptions too (default 1000)
#   --worker=N             the worker that logs, profile and ssh mean (default 0)
#   --slice=N              the slice that logs, profile, ssh and --worker mean (default 0)
#   --timeout=SECONDS      how long a worker may take to answer (default 60)
#   --poll=SECONDS         time between two looks at the training; pauses after failures double it (default 20)
#   --dry-run              print every gcloud command; run none of them
#
# Examples
#   bash launch/tpu.sh run --name=cpt-s --zone=us-west4-a --type=v5litepod-256 --spot --queued -- \
#     --config=configs/cpt_text.py:s --config.data.dir=gs://BUCKET/pile --workdir=gs://BUCKET/cpt-s
#   bash launch/tpu.sh ssh --name=cpt-s --zone=us-west4-a --worker=all -- df -h /
#   GCLOUD_TRACK=alpha bash launch/tpu.sh run --gcloud=--internal-ips --ssh=--tunnel-through-iap ...   (no external addresses)
#
# The workdir must outlive the slice: it lies in gs://, or in a folder that all workers mount. The exit status is the training's.
# `run` supervises from this machine: what ends or sleeps here starts nothing again (the training itself goes on). For days, run it
# in tmux on a small VM. It needs bash 4.4, git, GNU's timeout and gcloud; with an ssh-agent, call first
# ssh-add ~/.ssh/google_compute_engine
case "${BASH_VERSION:-}" in
  4.[4-9]* | 4.[1-9][0-9]* | [5-9].* | [1-9][0-9].*) ;;
  *)
    echo "error: bash 4.4 or newer is needed, and this is ${BASH_VERSION:-another shell} (macOS: brew install bash coreutils)" >&2
    exit 2
    ;;
esac
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PREEMPTED=75 # exit status of a training that saved and ended because it was told to (contrastive_jax/runtime/processes.py)
KILLED=143   # exit status of a training that SIGTERM ended before it could save: the machine was taken away

# shellcheck source=launch/tpu_lib.sh
source launch/tpu_lib.sh

usage() { sed -n '2,/^case /{/^case /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; }

# Prints the training's --workdir; nothing if there is none.
workdir() {
  local argument
  for argument in "${rest[@]}"; do
    [[ "$argument" != --workdir=* ]] || echo "${argument#*=}"
  done
}

# Shows the log of worker 0 on stderr until its training ends or the slice is lost. Sets `outcome` to "exit STATUS", "stopped",
# "none", "silent" or "lost STATE", and `resumed` to the step of the checkpoint that the training began from.
follow() {
  local offset=0 answer misses=0 file="$scratch/poll" header=""
  while :; do
    if ask compute tpus tpu-vm ssh "${nodes[0]}" "${ssh_flags[@]}" --worker=0 "${where[@]}" \
      "--command=cd contrastive_jax && bash launch/worker.sh poll $offset" > "$file"; then
      misses=0
      { read -r answer && read -r header; } < "$file" || answer=none
      [[ "$header" != resumed* ]] || resumed="${header#resumed }"
      tail -n +3 "$file" >&2
      offset=$((offset + $(tail -n +3 "$file" | wc -c)))
      if [[ "$answer" == "exit 0" || "$answer" == stopped ]]; then
        outcome="$answer"
        return
      elif [[ "$answer" != running ]]; then
        # The training on a slice that is being taken back ends before the state of the slice changes.
        sleep "$poll"
        look_patiently || now=READY # gcloud does not answer: the next start will show whether it does
        outcome="$answer"
        [[ "$now" == READY ]] || outcome="lost $now"
        return
      fi
    else
      misses=$((misses + 1))
      say "worker 0 of ${nodes[0]} does not answer: $(gcloud_words)"
      if ! look; then
        say "gcloud does not say how $name is: $(gcloud_words)"
      elif [[ "$now" != READY ]]; then
        outcome="lost $now"
        return
      elif ((misses >= 10)); then
        outcome=silent
        return
      fi
    fi
    sleep "$poll"
  done
}

# Starts a training on all workers, whatever state the slice is in.
start() {
  local answer script=contrastive_jax/launch/worker.sh
  obtain
  on_nodes check_workers
  answer="$(ask compute tpus tpu-vm ssh "${nodes[0]}" "${ssh_flags[@]}" --worker=0 "${where[@]}" \
    "--command=if [ -e $script ]; then bash $script poll 999999999999; else echo none; fi")"
  if [[ "$answer" == running* ]]; then
    say "a training is already running on $name; showing its log"
    return
  fi
  setup
  say "starting on all workers"
  on_nodes remote all "${worker_command[@]}" start "${rest[@]}"
}

# Trains until the training has ended for good; see --help for what is started again.
run() {
  local status failures=0 restarts=0 pause="$poll" newest=-1 trained=""
  [[ "$(workdir)" == gs://* || "$(workdir)" == /* ]] \
    || fail "run needs -- --workdir=gs://BUCKET/RUN (or a folder that every worker mounts); files on the slice are lost with it"
  if [[ -n "$dry_run" ]]; then
    start
    remote "${nodes[0]}" 0 bash launch/worker.sh poll 0
    return
  fi
  look || stop_because_of_gcloud
  while :; do
    # In a subshell that ends at its first error: the slice may be lost again during the setup, for example.
    set +e
    (
      set -e
      start
    )
    status=$?
    set -e
    outcome="start $status" resumed=-1
    if ((status == 0)); then
      trained=1
      follow
      say "training: $outcome"
    fi
    if ((resumed > newest)); then # since the last start there was progress
      newest="$resumed" failures=0 pause="$poll"
    fi
    case "$outcome" in
      "exit 0" | stopped) return 0 ;;
      "exit 2" | "exit 3") return "${outcome#exit }" ;;
      "start $FINAL") return "$FINAL" ;;
      "start $REFUSED") [[ -n "$trained" ]] || return 1 ;;& # what gcloud refuses at the first time it will refuse again
      "exit $PREEMPTED" | "exit $KILLED" | lost*) ;;
      *) failures=$((failures + 1)) ;;
    esac
    if ((failures > max_retries)); then
      echo "error: $name failed $failures times without a newer checkpoint (--retries=$max_retries), at last: $outcome." \
        "The logs of all workers are in $(workdir)/logs" >&2
      [[ "$outcome" != "exit "* ]] || return "${outcome#exit }"
      return 1
    fi
    restarts=$((restarts + 1))
    ((restarts <= max_restarts)) \
      || fail "$name was started again $max_restarts times (--restarts=$max_restarts); the checkpoints are in the workdir"
    say "starting again ($restarts) in $pause s"
    sleep "$pause"
    pause="$(longer "$pause")"
  done
}

stop_because_of_gcloud() {
  echo "error: gcloud does not say how $name is, so nothing was done: $(gcloud_words)" >&2
  exit 1
}

# Prints the log of a worker, or its copy in the workdir.
logs() {
  local folder file="worker-$worker.log"
  ((${#nodes[@]} == 1)) || file="slice-$slice-$file"
  if [[ -n "$dry_run" ]] || { look && [[ "$now" == READY ]]; }; then
    if remote "${nodes[slice]}" "$worker" bash launch/worker.sh poll 0; then
      return
    fi
  fi
  folder="$(workdir)"
  case "$folder" in
    gs://*) gc storage cat "$folder/logs/$file" ;;
    /*) cat "$folder/logs/$file" ;;
    *) fail "worker $worker of $name does not answer: $(gcloud_words) For the copy of its log give -- --workdir=gs://BUCKET/RUN" ;;
  esac
}

shell() {
  if ((${#rest[@]})); then
    tpu ssh "${nodes[slice]}" "${ssh_flags[@]}" "--worker=$worker" "--command=$(printf '%q ' "${rest[@]}")"
  else
    command gcloud "${track[@]}" compute tpus tpu-vm ssh "${nodes[slice]}" "${ssh_flags[@]}" "--worker=$worker" "${where[@]}"
  fi
}

command="${1:-}"
case "$command" in
  run | create | setup | status | logs | profile | ssh | stop | delete) shift ;;
  -h | --help | help)
    usage
    exit 0
    ;;
  *)
    usage >&2
    exit 2
    ;;
esac
name="" zone="" project="" type="" queued="" runtime="" worker=0 dry_run="" created="" slices=1 slice=0 steps=3
max_retries=10 max_restarts=1000 timeout=60 poll=20 create_flags=() environment=() rest=() track=()
[[ -z "${GCLOUD_TRACK:-}" ]] || track=("$GCLOUD_TRACK")
# A slice that was created again has new host keys under its old name.
ssh_flags=(--strict-host-key-checking=no --quiet)
while (($#)); do
  case "$1" in
    --name=*) name="${1#*=}" ;;
    --zone=*) zone="${1#*=}" ;;
    --project=*) project="${1#*=}" ;;
    --type=*) type="${1#*=}" ;;
    --slices=*) slices="${1#*=}" ;;
    --slice=*) slice="${1#*=}" ;;
    --runtime=*) runtime="${1#*=}" ;;
    --worker=*) worker="${1#*=}" ;;
    --retries=*) max_retries="${1#*=}" ;;
    --restarts=*) max_restarts="${1#*=}" ;;
    --timeout=*) timeout="${1#*=}" ;;
    --poll=*) poll="${1#*=}" ;;
    --steps=*) steps="${1#*=}" ;;
    --gcloud=*) create_flags+=("${1#*=}") ;;
    --ssh=*) ssh_flags+=("${1#*=}") ;;
    --env=*) environment+=("${1#*=}") ;;
    --spot) create_flags+=(--spot) ;;
    --queued) queued=1 ;;
    --dry-run) dry_run=1 ;;
    -h | --help)
      usage
      exit 0
      ;;
    --)
      shift
      rest=("$@")
      break
      ;;
    *) fail "unknown option $1; arguments of the training come after --; see launch/tpu.sh --help" ;;
  esac
  shift
done
[[ "$name" =~ ^[a-z][-a-z0-9]*$ ]] || fail "--name=$name: give the slice a name of lower-case letters, digits and hyphens"
[[ "$zone" =~ ^[a-z0-9-]+$ ]] || fail "--zone=$zone: give the zone, such as us-west4-a"
for number in "$max_retries" "$max_restarts" "$timeout" "$poll" "$slices" "$slice" "$steps"; do
  [[ "$number" =~ ^[0-9]+$ ]] || fail "--retries, --restarts, --timeout, --poll, --slices, --slice and --steps are whole numbers, not $number"
done
((slices > 0 && slice < slices && steps > 0)) || fail "--slices and --steps are at least 1, and --slice is below --slices"
for pair in "${environment[@]}"; do
  [[ "$pair" =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] || fail "--env=$pair: give KEY=VALUE"
  # shellcheck source=launch/setup.sh
  [[ "$pair" != EXTRAS=* ]] || (EXTRAS="${pair#*=}" && source launch/setup.sh --check) || exit "$FINAL"
done
where=("--zone=$zone")
[[ -z "$project" ]] || where+=("--project=$project")
nodes=("$name") filter="--filter=name~/$name\$ OR name=$name"
if ((slices > 1)); then
  queued=1 nodes=() filter="--filter=name~/$name-[0-9]+\$ OR name~^$name-[0-9]+\$"
  for ((number = 0; number < slices; number++)); do nodes+=("$name-$number"); done
fi
worker_command=(bash launch/worker.sh)
((${#environment[@]} == 0)) || worker_command=(env "${environment[@]}" "${worker_command[@]}")
if [[ -z "$dry_run" ]]; then
  command -v gcloud > /dev/null || fail "gcloud is not installed; see https://cloud.google.com/sdk/docs/install"
  timeout 5 true 2> /dev/null || fail "GNU's timeout is not installed (macOS: brew install coreutils, and put its gnubin folder in PATH)"
fi
if [[ "$command" =~ ^(run|create|setup)$ ]]; then # found out now, not by a slice that costs money
  if ! list_tree > "$scratch/tree" 2> "$words" || [[ ! -s "$scratch/tree" ]]; then
    fail "git cannot list the files to copy to the workers; clone the repository, or call git init in $PWD. git says: $(gcloud_words)"
  fi
fi

case "$command" in
  run) run ;;
  create) create || exit ;;
  setup)
    on_nodes check_workers
    setup
    ;;
  status)
    look || stop_because_of_gcloud
    echo "$name: $now${reason:+: $reason}"
    [[ "$now" != READY ]] || remote "${nodes[slice]}" "$worker" bash launch/worker.sh poll 999999999999
    ;;
  logs) logs ;;
  profile) remote "${nodes[slice]}" "$worker" bash launch/worker.sh profile "$steps" ;;
  ssh) shell ;;
  stop) on_nodes remote all bash launch/worker.sh stop ;;
  delete) delete ;;
esac
