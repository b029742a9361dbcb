"""Copies a worker's log into the workdir, a bucket or a folder, while it grows; launch/worker.sh runs it beside a training.

    python -m launch.copy_log LOG TARGET PROCESS

A file in a bucket cannot be appended to, so TARGET is written again whole each time. What earlier starts of the run have left
there stays, up to MAX_BYTES. After the process with the number PROCESS has ended, a last copy is made.
"""

import os
import pathlib
import sys
import time

from etils import epath

from contrastive_jax import files

SECONDS = float(os.environ.get("LOG_SECONDS", "10"))  # between two copies: what a killed worker may lose of its log
MAX_BYTES = 8_000_000


def is_running(process: int) -> bool:
    """Returns whether there is a process with this number; one that has ended and was not waited for does not count."""
    try:
        return pathlib.Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def read_earlier(target: epath.Path) -> str:
    """Returns what earlier starts have left in the target, the last MAX_BYTES of it."""
    return target.read_bytes()[-MAX_BYTES:].decode(errors="replace") if target.exists() else ""


def wait(process: int, seconds: float) -> None:
    """Waits for so long, or until the process has ended."""
    wake_up = time.monotonic() + seconds
    while time.monotonic() < wake_up and is_running(process):
        time.sleep(0.2)


def main(log: pathlib.Path, target: epath.Path, process: int) -> None:
    """Copies until the process has ended. A copy that fails is tried again later; the training does not depend on it."""
    earlier, copied, failures = None, -1, 0
    while True:
        is_last = not is_running(process)
        try:
            if earlier is None:
                target.parent.mkdir(parents=True, exist_ok=True)
                earlier = read_earlier(target)
            content = log.read_bytes()
            if len(content) != copied:
                files.write_text(target, earlier + content.decode(errors="replace"))
            copied, failures = len(content), 0
        except Exception as error:  # whatever a storage client raises
            failures += 1
            if failures == 1:
                print(f"warning: this log is not copied to {target} now: {' '.join(str(error).split())}", flush=True)
        if is_last and (not failures or failures > 5):
            return
        if is_last:
            time.sleep(2)
        else:
            wait(process, min(SECONDS * 2**failures, 300))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), epath.Path(sys.argv[2]), int(sys.argv[3]))
