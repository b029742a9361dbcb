# shellcheck shell=bash
# Sourced by launch/tpu.sh: what it asks of gcloud, how it brings a slice to READY, and how it reaches all workers.
# shellcheck disable=SC2154  # launch/tpu.sh sets these variables from the command line
# shellcheck disable=SC2030,SC2031  # each slice has a file $words of its own, in its own subshell

FINAL=2         # exit status of a function that found what a person has to mend; starting again does not help
REFUSED=5       # gcloud refused to create the slice, for another reason than a lack of capacity
NO_CAPACITY=6   # there is no capacity at the moment
MAX_PAUSE=600   # seconds; pauses double up to this
KEY_SECONDS=300 # how long Google may take to copy an SSH key to all workers of a new slice
CAPACITY_WORDS="no more capacity|no available capacity|insufficient capacity|not enough resources|sufficient resources|stockout|resource_pool_exhausted"

scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
words="$scratch/words" # the file with the error messages of the last gcloud command

say() { echo "== $*" >&2; }

fail() {
  echo "error: $*" >&2
  exit "$FINAL"
}

# Prints the last messages of gcloud as one line.
gcloud_words() { tail -n 8 "$words" 2> /dev/null | tr -s '\n\t ' ' ' | sed 's/^ //; s/ $//'; }

# Prints the pause after a pause of $1 seconds.
longer() { echo "$(($1 * 2 < MAX_PAUSE ? $1 * 2 : MAX_PAUSE))"; }

# Prints a gcloud command as one could type it, and runs it unless --dry-run is given. What gcloud writes to stderr is shown and
# kept in $words.
gc() {
  local argument shown="+ gcloud"
  set -- "${track[@]}" "$@"
  for argument in "$@"; do
    if [[ "$argument" =~ ^[-A-Za-z0-9_./:=,@%+~]+$ ]]; then shown+=" $argument"; else shown+=" ${argument@Q}"; fi
  done
  echo "$shown" >&2
  [[ -n "$dry_run" ]] || { command gcloud "$@" 2>&1 >&3 < /dev/null | tee "$words" >&2; } 3>&1
}

# Runs a gcloud command that changes nothing; what it writes to stderr is only kept in $words. It is printed only with --dry-run.
ask() {
  local status=0 limit="$((timeout + 60))"
  if [[ -n "$dry_run" ]]; then
    gc "$@"
    return
  fi
  timeout "$limit" gcloud "${track[@]}" "$@" < /dev/null 2> "$words" || status=$?
  ((status != 124)) || echo "gcloud gave no answer within $limit s" > "$words"
  return "$status"
}

tpu() { gc compute tpus tpu-vm "$@" "${where[@]}"; }

# remote NODE WORKER COMMAND ...: runs a command on one worker of a node, or on "all", in the copy of the working tree.
remote() {
  tpu ssh "$1" "${ssh_flags[@]}" "--worker=$2" "--command=cd contrastive_jax && $(printf '%q ' "${@:3}")"
}

# on_nodes FUNCTION ARGUMENT ...: calls FUNCTION NODE ARGUMENT ... for all slices at once. Returns the highest status.
on_nodes() {
  local node pid pids=() code highest=0
  if ((${#nodes[@]} == 1)); then
    "$1" "${nodes[0]}" "${@:2}"
    return
  fi
  for node in "${nodes[@]}"; do
    (
      words="$scratch/words-$node"
      "$1" "$node" "${@:2}"
    ) &
    pids+=("$!")
    [[ -z "$dry_run" ]] || wait "$!" # in their order
  done
  for pid in "${pids[@]}"; do
    code=0
    wait "$pid" || code=$?
    ((code <= highest)) || highest=$code
  done
  return "$highest"
}

# Sets `now` to the state of the slice (READY, PREEMPTED, CREATING ...), or of its request in the queue, or to "absent"; sets
# `reason` to why a request failed. Fails if gcloud does not answer: then nothing is known.
look() {
  local answer state
  reason=""
  if [[ -n "$dry_run" ]]; then
    ask compute tpus tpu-vm list "${where[@]}" "$filter" "--format=value(state)"
    now="${created:+READY}"
    now="${now:-absent}"
    return
  fi
  answer="$(ask compute tpus tpu-vm list "${where[@]}" "$filter" "--format=value(state)")" || return
  for state in PREEMPTED TERMINATED FAILED SUSPENDED; do
    if grep -qx "$state" <<< "$answer"; then
      now="$state"
      return
    fi
  done
  if [[ -n "$queued" && "$(grep -c . <<< "$answer")" -ne "${#nodes[@]}" ]]; then # nodes are missing: what does the queue say?
    answer="$(ask compute tpus queued-resources list "${where[@]}" "--filter=name~/$name\$ OR name=$name" \
      "--format=value(state.state,state.failedData.error.message)")" || return
    reason="$(cut -s -f 2- <<< "$answer")"
    answer="$(cut -f 1 <<< "$answer")"
  fi
  state="$(grep -vx READY <<< "$answer" | grep . | head -n 1)" || true # one that is not READY, if there is any
  [[ -n "$state" || -z "$answer" ]] || state=READY
  now="${state:-absent}"
}

# Looks until gcloud answers; fails after too many failures in a row.
look_patiently() {
  local failures=0 pause="$poll" before=""
  until look; do
    failures=$((failures + 1))
    [[ "$(gcloud_words)" == "$before" ]] || say "gcloud does not say how $name is, so nothing is created or deleted: $(gcloud_words)"
    before="$(gcloud_words)"
    ((failures <= max_retries)) || return 1
    sleep "$pause"
    pause="$(longer "$pause")"
  done
}

create() {
  local version="$runtime" status=0 node_flags=("--node-id=$name")
  [[ -n "$type" ]] || fail "create needs --type=ACCELERATOR_TYPE, such as v5litepod-16"
  if [[ -z "$version" ]]; then
    case "$type" in
      v5litepod-*) version=v2-alpha-tpuv5-lite ;;
      v5p-*) version=v2-alpha-tpuv5 ;;
      v6e-*) version=v2-alpha-tpuv6e ;;
      v[234]-*) version=tpu-ubuntu2204-base ;;
      tpu7x-*) fail "--type=$type: Google rents TPU7x through GKE and Compute Engine, not as TPU VMs; see launch/gke.md" ;;
      *) fail "--type=$type: no software version is known for this type; give --runtime=VERSION" ;;
    esac
  fi
  ((${#nodes[@]} == 1)) || node_flags=("--node-count=${#nodes[@]}" "--node-prefix=$name")
  say "creating $name ($type)"
  if [[ -n "$queued" ]]; then
    gc compute tpus queued-resources create "$name" "${node_flags[@]}" "--accelerator-type=$type" \
      "--runtime-version=$version" "${where[@]}" "${create_flags[@]}" || status=$?
  else
    tpu create "$name" "--accelerator-type=$type" "--version=$version" "${create_flags[@]}" || status=$?
  fi
  ((status)) || created=1
  ((status == 0)) || ! grep -qiE "$CAPACITY_WORDS" "$words" || return "$NO_CAPACITY"
  ((status == 0)) || return "$REFUSED"
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

# Brings the slice to READY: creates it, waits for it, or replaces it if it was taken back. Only a slice in a state that is known
# to be an end is deleted.
obtain() {
  local before="" pause="$poll" status requested=""
  while :; do
    look_patiently || return
    [[ "$now" == "$before" ]] || say "$name: $now${reason:+: $reason}"
    case "$now" in
      READY) return ;;
      absent)
        status=0
        create || status=$?
        if ((status == NO_CAPACITY)); then
          say "no capacity in $zone; asking again in $pause s"
          sleep "$pause"
          pause="$(longer "$pause")"
        elif ((status)); then
          return "$status"
        else
          requested=1
        fi
        ;;
      FAILED)
        if [[ -n "$requested" ]]; then
          echo "error: $name cannot be created: ${reason:-gcloud gives no reason}. Mend that and run the command again," \
            "which replaces the failed request" >&2
          return "$FINAL"
        fi
        delete || return
        ;;
      PREEMPTED | TERMINATED | SUSPENDED) delete || return ;;
      CREATING | STARTING | RESTARTING | REPAIRING | ACCEPTED | WAITING_FOR_RESOURCES | PROVISIONING | ACTIVE | DELETING | SUSPENDING)
        sleep "$poll"
        ;;
      *) # STOPPED, STOPPING, REIMAGING, HIDDEN, UNKNOWN ...
        [[ "$now" == "$before" ]] || say "waiting: in this state nothing is created or deleted (launch/tpu.sh delete does)"
        sleep "$poll"
        ;;
    esac
    before="$now"
  done
}

# answers NODE WORKER SECONDS: whether a worker answers; what gcloud writes to stderr is kept in a file for each worker.
answers() {
  if [[ -n "$dry_run" ]]; then
    tpu ssh "$1" "${ssh_flags[@]}" "--worker=$2" --command=true
  else
    timeout "$3" gcloud "${track[@]}" compute tpus tpu-vm ssh "$1" "${ssh_flags[@]}" "--worker=$2" --command=true "${where[@]}" \
      > /dev/null 2> "$scratch/$1-$2" < /dev/null
  fi
}

# Checks that every worker of a node answers: if one did not start, all others would wait for it. Silent ones are asked again.
check_workers() {
  local node="$1" count worker pids round silent asked
  count="$(ask compute tpus tpu-vm describe "$node" "${where[@]}" "--format=value(networkEndpoints.len())")" || {
    echo "error: $node: $(gcloud_words)" >&2
    return 1
  }
  [[ -z "$dry_run" ]] || count=2 # in earnest, describe counts the workers
  # Alone, because the first connection to a new slice makes a key if there is none, and has Google copy it to all workers.
  say "asking $node's worker 0, which may take minutes on a new slice, then the other $((count - 1))"
  silent=()
  answers "$node" 0 "$((KEY_SECONDS > timeout ? KEY_SECONDS : timeout))" || silent=(0)
  asked=("${silent[@]}")
  for ((worker = 1; worker < count; worker++)); do asked+=("$worker"); done
  for round in 1 2 3; do
    silent=() pids=()
    for worker in "${asked[@]}"; do
      answers "$node" "$worker" "$timeout" &
      pids+=("$!")
      # gcloud takes much memory: at most sixteen run at a time.
      ((${#pids[@]} % 16)) || wait "${pids[@]: -16}" || true
    done
    for worker in "${!pids[@]}"; do
      wait "${pids[worker]}" || silent+=("${asked[worker]}")
    done
    ((${#silent[@]})) || return 0
    asked=("${silent[@]}")
    ((round == 3)) || say "no answer from worker ${silent[*]} of $node; asking again"
  done
  words="$scratch/$node-${silent[0]}"
  echo "error: no answer within $timeout s from worker ${silent[*]} of $count of $node; nothing was started. gcloud says:" \
    "$(gcloud_words)" >&2
  return 1
}

# Copies the packed working tree to the workers of a node and installs it.
install_on() {
  local node="$1" status=0
  tpu scp "$scratch/contrastive_jax.tar.gz" "$node:" "${ssh_flags[@]}" --worker=all || status=$?
  if ((status)) && grep -q "not present in the SSH agent" "$words"; then
    echo "error: your ssh-agent holds other keys, but not that of gcloud: run ssh-add ~/.ssh/google_compute_engine" >&2
    return "$FINAL"
  fi
  ((status == 0)) || return "$status"
  tpu ssh "$node" "${ssh_flags[@]}" --worker=all "--command=mkdir -p contrastive_jax && cd contrastive_jax && \
find . -mindepth 1 -maxdepth 1 ! -name .venv ! -name .job -exec rm -r {} + && tar xzf ../contrastive_jax.tar.gz && \
$(printf '%q ' "${worker_command[@]}" install)"
}

# Lists the files that git tracks or would track; in the middle of a merge some come several times in a row.
list_tree() { git ls-files -z --cached --others --exclude-standard; }

setup() {
  local file before=""
  say "copying the working tree to the workers"
  list_tree | while IFS= read -rd '' file; do
    [[ "$file" == "$before" || ! -e "$file" ]] || printf '%s\0' "$file" # git also lists files that were deleted
    before="$file"
  done | tar --create --gzip --null --files-from=- --file="$scratch/contrastive_jax.tar.gz"
  on_nodes install_on
}
