#!/usr/bin/env bash
# Trains on a Cloud TPU VM or pod slice through gcloud: every worker runs the same command.
#
#   bash launch/tpu.sh COMMAND --name=NAME --zone=ZONE [OPTION ...] [-- TRAINING ARGUMENTS]
#
# Commands
#   run      create and setup where needed, then train and show the log until the end. A preempted slice is made again and the
#            training goes on from its workdir. Called again while a training runs, it shows that one.
#   create   the slice            setup    ship the working tree to all workers, install
#   status   slice and training   logs     the log of --worker=N (0), whole
#   ssh      a shell on --worker=N, or with "-- COMMAND" that command on --worker=N|all
#   stop     save and end the training; the slice stays
#   delete   the slice, and what it has not written to gs://
#
# Options
#   --type=TYPE            accelerator type: v5litepod-256, v6e-64, v5p-128, v4-32 ...           (create, run)
#   --project=PROJECT      gcloud's own by default
#   --spot                 capacity that may be taken back      --queued   wait for it in the queue (queued resources)
#   --runtime=VERSION      software version; by default the one for TYPE
#   --gcloud=FLAG          one more flag for "create", such as --gcloud=--network=NET; may be repeated
#   --restarts=N           how often `run` comes back after a preemption (1000)
#   --timeout=SECONDS      how long a worker may take to answer (60)     --poll=SECONDS   between looks at the training (20)
#   --dry-run              print every gcloud command, run none
#
# Examples
#   bash launch/tpu.sh run --name=cpt-s --zone=us-west4-a --type=v5litepod-256 --spot --queued -- \
#     --config=configs/cpt_text.py:s --config.data.dir=gs://BUCKET/pile --workdir=gs://BUCKET/cpt-s
#   bash launch/tpu.sh ssh --name=cpt-s --zone=us-west4-a --worker=all -- df -h /
#
# The workdir must outlive the slice: gs://, or a folder that all workers mount. Exit status: that of the training.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PREEMPTED=75 # the training saved and ended because it was told to (sysexits' EX_TEMPFAIL; contrastive_jax/train.py)

usage() { sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; }

fail() {
  echo "error: $*" >&2
  exit 2
}

say() { echo "== $*" >&2; }

# Prints a command as it could be typed; runs it unless --dry-run.
gc() {
  local argument shown="+ gcloud"
  for argument in "$@"; do
    if [[ "$argument" =~ ^[-A-Za-z0-9_./:=,@%+~]+$ ]]; then shown+=" $argument"; else shown+=" ${argument@Q}"; fi
  done
  echo "$shown" >&2
  [[ -n "$dry_run" ]] || command gcloud "$@"
}

# The same for commands that look and change nothing: they are printed by --dry-run alone.
quiet() {
  if [[ -n "$dry_run" ]]; then gc "$@"; else timeout "$((timeout + 60))" gcloud "$@" < /dev/null; fi
}

tpu() { gc compute tpus tpu-vm "$@" "${where[@]}"; }

# remote WORKER COMMAND ...: on one worker or "all", in the shipped tree.
remote() {
  tpu ssh "$name" "${ssh_flags[@]}" "--worker=$1" "--command=cd contrastive_jax && $(printf '%q ' "${@:2}")"
}

# The state of the slice (READY, PREEMPTED, CREATING ...), or of its place in the queue; "absent" where there is neither.
state() {
  local found="" filter="--filter=name~/$name\$ OR name=$name"
  found="$(quiet compute tpus tpu-vm list "${where[@]}" "$filter" "--format=value(state)")"
  if [[ -z "$found" && -n "$queued" ]]; then
    found="$(quiet compute tpus queued-resources list "${where[@]}" "$filter" "--format=value(state.state)")"
  fi
  [[ -z "$dry_run" || -z "$created" ]] || found=READY
  echo "${found:-absent}"
}

create() {
  [[ -n "$type" ]] || fail "create needs --type=ACCELERATOR_TYPE, such as v5litepod-16"
  local version="$runtime"
  if [[ -z "$version" ]]; then
    case "$type" in
      v5litepod-*) version=v2-alpha-tpuv5-lite ;;
      v5p-*) version=v2-alpha-tpuv5 ;;
      v6e-*) version=v2-alpha-tpuv6e ;;
      v[234]-*) version=tpu-ubuntu2204-base ;;
      *) fail "--type=$type: no software version is known for it; give --runtime=VERSION" ;;
    esac
  fi
  say "creating $name ($type)"
  if [[ -n "$queued" ]]; then
    gc compute tpus queued-resources create "$name" "--node-id=$name" "--accelerator-type=$type" \
      "--runtime-version=$version" "${where[@]}" "${create_flags[@]}"
  else
    tpu create "$name" "--accelerator-type=$type" "--version=$version" "${create_flags[@]}"
  fi
  created=1
}

# Until the slice is READY: creates it, waits for it, replaces one that was taken back.
obtain() {
  local now before=""
  while :; do
    now="$(state)"
    [[ "$now" == "$before" ]] || say "$name: $now"
    before="$now"
    case "$now" in
      READY) return ;;
      absent) create ;;
      CREATING | STARTING | RESTARTING | REPAIRING | ACCEPTED | WAITING_FOR_RESOURCES | PROVISIONING | ACTIVE) sleep "$poll" ;;
      DELETING | SUSPENDING) sleep "$poll" ;;
      *) delete ;; # PREEMPTED, TERMINATED, STOPPED, SUSPENDED, FAILED
    esac
  done
}

delete() {
  say "deleting $name"
  if [[ -n "$queued" ]]; then
    gc compute tpus queued-resources delete "$name" --force --quiet "${where[@]}"
  else
    tpu delete "$name" --quiet
  fi
  created=""
}

# Every worker must answer before any starts: one that does not would leave all others waiting for it.
check_workers() {
  local count worker silent=() pids=()
  count="$(quiet compute tpus tpu-vm describe "$name" "${where[@]}" "--format=value(networkEndpoints.len())")"
  [[ -z "$dry_run" ]] || count=1 # the others of the slice follow: describe counts them
  say "asking $count workers"
  for ((worker = 0; worker < count; worker++)); do
    answers "$worker" &
    pids+=("$!")
    # gcloud is heavy: sixteen at a time.
    ((${#pids[@]} % 16)) || wait "${pids[@]: -16}" || true
  done
  for worker in "${!pids[@]}"; do
    wait "${pids[worker]}" || silent+=("$worker")
  done
  if ((${#silent[@]})); then
    echo "error: no answer within $timeout s from worker ${silent[*]} of $count of $name; nothing was started." \
      "Look: launch/tpu.sh ssh --worker=${silent[0]}; or delete the slice and create it again" >&2
    return 3
  fi
}

answers() {
  if [[ -n "$dry_run" ]]; then
    remote "$1" true
  else
    timeout "$timeout" gcloud compute tpus tpu-vm ssh "$name" "${ssh_flags[@]}" "--worker=$1" --command=true "${where[@]}" \
      > /dev/null 2>&1 < /dev/null
  fi
}

setup() {
  local tree
  tree="$(mktemp -d)"
  say "shipping the working tree"
  # What git tracks or would track; deleted files are not there to ship.
  git ls-files -z --cached --others --exclude-standard --deduplicate | while IFS= read -rd '' file; do
    [[ ! -e "$file" ]] || printf '%s\0' "$file"
  done | tar --create --gzip --null --files-from=- --file="$tree/contrastive_jax.tar.gz"
  tpu scp "$tree/contrastive_jax.tar.gz" "$name:" "${ssh_flags[@]}" --worker=all
  rm -r "$tree"
  tpu ssh "$name" "${ssh_flags[@]}" --worker=all \
    --command='mkdir -p contrastive_jax && cd contrastive_jax && find . -mindepth 1 -maxdepth 1 ! -name .venv ! -name .job -exec rm -r {} + && tar xzf ../contrastive_jax.tar.gz && bash launch/worker.sh install'
}

# Shows the log of worker 0 until its training ends or the slice is lost; prints what became of it on stdout.
follow() {
  local offset=0 answer line misses=0 file
  file="$(mktemp)"
  while :; do
    if quiet compute tpus tpu-vm ssh "$name" "${ssh_flags[@]}" --worker=0 "${where[@]}" \
      "--command=cd contrastive_jax && bash launch/worker.sh poll $offset" > "$file" 2> /dev/null; then
      misses=0
      answer="$(head -n 1 "$file")"
      tail -n +2 "$file" >&2
      offset=$((offset + $(tail -n +2 "$file" | wc -c)))
      if [[ "$answer" != running ]]; then
        # A slice that is being taken back ends its trainings before it says so.
        [[ "$answer" == "exit 0" || "$answer" == stopped ]] || sleep "$poll"
        line="$(state)"
        rm "$file"
        [[ "$line" == READY || "$answer" == "exit 0" ]] && echo "$answer" || echo "lost $line"
        return
      fi
    else
      line="$(state)"
      misses=$((misses + 1))
      if [[ "$line" != READY || "$misses" -ge 10 ]]; then
        rm "$file"
        echo "lost $line"
        return
      fi
    fi
    sleep "$poll"
  done
}

# From whatever there is to a training on all workers.
start() {
  local answer
  obtain
  check_workers
  # A worker that was never set up has no such script.
  answer="$(remote 0 bash launch/worker.sh poll 999999999999 2> /dev/null || echo none)"
  if [[ "$answer" == running* ]]; then
    say "a training runs already on $name; showing it"
    return
  fi
  setup
  say "starting on all workers"
  remote all bash launch/worker.sh start "${rest[@]}"
}

run() {
  local workdir="" argument outcome restarts=0 status
  for argument in "${rest[@]}"; do
    [[ "$argument" != --workdir=* ]] || workdir="${argument#*=}"
  done
  [[ "$workdir" == gs://* || "$workdir" == /* ]] \
    || fail "run needs -- --workdir=gs://BUCKET/RUN (or a folder that every worker mounts); what lies on a slice is lost with it"
  start
  if [[ -n "$dry_run" ]]; then
    remote 0 bash launch/worker.sh poll 0
    return
  fi
  while :; do
    outcome="$(follow)"
    say "training: $outcome"
    case "$outcome" in
      "exit 0" | stopped) return 0 ;;
      "exit $PREEMPTED" | lost*) ;;
      "exit "*) return "${outcome#exit }" ;;
      *) fail "the training on worker 0 of $name is gone without an exit status: launch/tpu.sh logs" ;;
    esac
    status=1
    while ((status)); do
      restarts=$((restarts + 1))
      ((restarts <= max_restarts)) || fail "lost $restarts times (--restarts=$max_restarts); the workdir has what was saved"
      say "starting again ($restarts)"
      # A subshell that ends at its first error: the slice may be lost again while it is set up, or not to be had just now.
      set +e
      (
        set -e
        start
      )
      status=$?
      set -e
      ((status == 0)) || sleep "$poll"
    done
  done
}

command="${1:-}"
case "$command" in
  run | create | setup | status | logs | ssh | stop | delete) shift ;;
  -h | --help | help)
    usage
    exit 0
    ;;
  *)
    usage >&2
    exit 2
    ;;
esac
name="" zone="" project="" type="" queued="" runtime="" worker=0 dry_run="" created=""
max_restarts=1000 timeout=60 poll=20 create_flags=() rest=()
# A slice made again has new host keys under the old name.
ssh_flags=(--strict-host-key-checking=no --quiet)
while (($#)); do
  case "$1" in
    --name=*) name="${1#*=}" ;;
    --zone=*) zone="${1#*=}" ;;
    --project=*) project="${1#*=}" ;;
    --type=*) type="${1#*=}" ;;
    --runtime=*) runtime="${1#*=}" ;;
    --worker=*) worker="${1#*=}" ;;
    --restarts=*) max_restarts="${1#*=}" ;;
    --timeout=*) timeout="${1#*=}" ;;
    --poll=*) poll="${1#*=}" ;;
    --gcloud=*) create_flags+=("${1#*=}") ;;
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
    *) fail "unknown option $1; arguments of the training come after --; see: launch/tpu.sh --help" ;;
  esac
  shift
done
[[ "$name" =~ ^[a-z][-a-z0-9]*$ ]] || fail "--name=$name: give the slice a name of lower-case letters, digits and hyphens"
[[ "$zone" =~ ^[a-z0-9-]+$ ]] || fail "--zone=$zone: give the zone, such as us-west4-a"
for number in "$max_restarts" "$timeout" "$poll"; do
  [[ "$number" =~ ^[0-9]+$ ]] || fail "--restarts, --timeout and --poll are whole numbers, not $number"
done
where=("--zone=$zone")
[[ -z "$project" ]] || where+=("--project=$project")
[[ -n "$dry_run" ]] || command -v gcloud > /dev/null || fail "gcloud is not installed: https://cloud.google.com/sdk/docs/install"

case "$command" in
  run) run ;;
  create) create ;;
  setup) check_workers && setup ;;
  status)
    echo "$name: $(state)"
    remote "$worker" bash launch/worker.sh poll 999999999999
    ;;
  logs) remote "$worker" bash launch/worker.sh poll 0 ;;
  ssh)
    if ((${#rest[@]})); then
      tpu ssh "$name" "${ssh_flags[@]}" "--worker=$worker" "--command=$(printf '%q ' "${rest[@]}")"
    else
      tpu ssh "$name" "--worker=$worker"
    fi
    ;;
  stop) remote all bash launch/worker.sh stop ;;
  delete) delete ;;
esac
