#!/usr/bin/env bash
# A worker of the rehearsal: it has network, processes, host name and file system of its own.
#
#   machine.sh SLICE WORKER COMMAND ...   runs a command on the worker as its user, and boots it first if it is not running
#
# The worker sees the system read-only, as an image; it can write only to its own disk, $FAKE_GCLOUD/SLICE/worker-WORKER, which is
# /mnt/worker there, and to its own memory. It reaches the others over the bridge $BRIDGE, at addresses $SUBNET.10 and up.
# $MACHINE_VENV is /mnt/venv there, and $MACHINE_HOSTS is /etc/hosts. Killing the process in $FAKE_GCLOUD/SLICE/machine-WORKER
# kills everything on the worker.
set -euo pipefail

if [[ "$1" == init ]]; then # the first process of the worker, in its namespaces
  disk="$2"
  hostname "$3"
  mount --make-rprivate /
  mount -t proc proc /proc
  mount -t tmpfs tmpfs /mnt
  mkdir /mnt/worker /mnt/venv
  mount --bind "$disk" /mnt/worker
  mount --bind "$MACHINE_VENV" /mnt/venv
  mount -o remount,bind,ro /mnt/venv
  mount --bind "$MACHINE_HOSTS" /etc/hosts
  while read -r _ _ _ _ target _; do
    case "$target" in
      /mnt* | /proc* | /sys* | /dev*) ;;
      *) mount -o remount,bind,ro "$target" 2> /dev/null || true ;; # a few special ones cannot be changed
    esac
  done < /proc/self/mountinfo
  for folder in /tmp /var/tmp /dev/shm; do mount -t tmpfs tmpfs "$folder"; done
  touch /mnt/worker/.booted
  exec sleep infinity
fi

slice="$1" worker="$2"
disk="$FAKE_GCLOUD/$slice/worker-$worker" file="$FAKE_GCLOUD/$slice/machine-$worker"

boot() {
  local parent link="${BRIDGE}w$worker"
  setsid unshare --net --mount --pid --uts --fork --kill-child bash "${BASH_SOURCE[0]}" init "$disk" "$HOSTNAME" \
    > "$file.log" 2>&1 < /dev/null 9>&- &
  parent=$!
  until [[ -e "$disk/.booted" ]]; do
    kill -0 "$parent" || { cat "$file.log" >&2; exit 255; }
    sleep 0.05
  done
  machine="$(tr -d ' ' < "/proc/$parent/task/$parent/children")"
  ip link del "$link" 2> /dev/null || true
  ip link add "$link" type veth peer name eth0 netns "$machine"
  ip link set "$link" master "$BRIDGE" up
  nsenter --target "$machine" --net bash -c "ip addr add $SUBNET.$((10 + worker))/24 dev eth0; ip link set eth0 up; ip link set lo up"
  echo "$machine" > "$file"
}

exec 9> "$file.lock"
flock 9
if [[ ! -e "$file" ]]; then boot; fi
read -r machine < "$file"
exec 9>&-
# A machine that is dead does not answer; its slice is not READY for long.
kill -0 "$machine" 2> /dev/null || { echo "[/usr/bin/ssh] exited with return code [255]." >&2; exit 255; }
own=("HOME=/mnt/worker" "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin" "HOSTNAME=$HOSTNAME")
while IFS= read -r variable; do own+=("$variable"); done < <(env | grep -E '^(OMPI_|FAKE_SLICE|FAKE_WORKER)')
exec nsenter --target "$machine" --net --mount --pid --uts env -i "${own[@]}" bash -c 'cd && exec "$@"' ssh "${@:3}"
