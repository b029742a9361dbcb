"""Opens the folder in which a dataset is made, for one process at a time, and puts the dataset in its place at the end.

A local dataset is made in DIR.incomplete, which is renamed DIR when it is whole. On a bucket, where folders have no names to
change, it is made in DIR itself: the file .incomplete says by whom, and readers look for manifest.json, which is written last.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import re
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import IO, Any, Self

from etils import epath

from contrastive_jax import files
from contrastive_jax.config import UserError
from contrastive_jax.data.preparation import manifest as manifest_lib
from contrastive_jax.data.preparation.manifest import MANIFEST
from contrastive_jax.data.preparation.work import PLAN, PLAN_ID, WORK, Work
from contrastive_jax.files import transfer
from contrastive_jax.files.transfer import INCOMPLETE

LOCK = f"{WORK}/lock"
BEAT_SECONDS = 30.0  # between two signs of life of a process that makes a dataset on a bucket
SILENT_SECONDS = 180.0  # after which it counts as killed
SETTLE_SECONDS = 1.0  # in which two processes that took a folder on a bucket at the same time see that they did
PARTIAL = re.compile(r"\..*\.[0-9a-f]{8}")  # what `Work.new_file` calls a file that is not whole yet


def work_folder(target: epath.Path) -> epath.Path:
    """Returns the folder in which the dataset of `target` is made."""
    return target if files.on_bucket(target) else target.with_name(f"{target.name}.incomplete")


@contextlib.contextmanager
def hold(target: epath.Path, say: Callable[[str], None]) -> Iterator[Work]:
    """Yields the folder in which the dataset of `target` is made; no other process has it meanwhile.

    Args:
      target: the folder of the dataset.
      say: writes one line for the user.

    Raises:
      UserError: another process makes a dataset there, or the folder holds something else.
    """
    root = work_folder(target)
    if files.on_bucket(target):
        with (marker := Marker(target, say)):
            yield Work(root, marker.check)
        return
    refuse_foreign_files(root, target)
    with Lock(root, target):
        try:
            yield Work(root)
        finally:
            remove_unused(pathlib.Path(root))


def refuse_foreign_files(root: epath.Path, target: epath.Path) -> None:
    """Raises a UserError if a local folder holds files of something else: what `begin` would remove."""
    if root.exists() and not root.is_dir():
        raise UserError(f"--output={target}: {root}, where it would be made, is a file; move it away")
    foreign = [name for name in Work(root).names("", everything=True) if not name.startswith(f"{WORK}/")]
    if foreign and root.exists() and not any((root / name).exists() for name in (PLAN, PLAN_ID)):
        raise UserError(
            f"--output={target}: {root}, where it would be made, holds files of something else, such as {foreign[0]}; "
            "move them away, or choose another folder"
        )


def remove_unused(root: pathlib.Path) -> None:
    """Removes a local folder in which there is nothing but the lock of this process."""
    if root.exists() and Work(root).names("", everything=True) == [LOCK]:
        shutil.rmtree(root, ignore_errors=True)


def begin(work: Work, plan: dict[str, Any], overwrite: bool, say: Callable[[str], None]) -> Work:
    """Keeps what the folder holds if it was made by this plan, else empties the folder.

    Args:
      work: the folder.
      plan: what is made of what.
      overwrite: whether to remove tasks that another plan has done.
      say: writes one line for the user.

    Returns:
      The folder with the id of this plan.

    Raises:
      UserError: another plan has done tasks, and they are not to be removed.
    """
    before = work.read_json(PLAN)
    plan_id = work.read(PLAN_ID).decode() if work.path(PLAN_ID).exists() else ""
    tasks = len(work.names(f"{WORK}/tasks"))
    if before and plan_id and goes_on(before, plan, bool(Work(work.root, plan_id=plan_id).outcomes("tokenizer"))):
        remove_partial_files(work)
        say(f"{work.root}: going on from the {tasks:,} tasks that are done")
    else:
        if before:
            change = manifest_lib.difference(before, plan, "begun") or "was begun by another version"
            if tasks and not overwrite:
                raise UserError(
                    f"{work.root}: {change}; {tasks:,} tasks are done, which would be lost; "
                    "go on with what it was begun with, or give --overwrite"
                )
            say(f"{work.root}: {change}; starting anew")
        plan_id = uuid.uuid4().hex
        work.write(PLAN_ID, plan_id.encode())  # first: from now on tasks that still run elsewhere write no more
        empty(work)
    if before != plan:
        work.write_json(PLAN, plan)
    return Work(work.root, work.check_owner, plan_id)


def goes_on(before: dict[str, Any], plan: dict[str, Any], has_tokenizer: bool) -> bool:
    """Returns whether what was done by the plan `before` is a part of another plan."""
    ignored = {"on_bad"} if before["arguments"].get("on_bad") == "fail" else set()  # all lines so far were good
    ignored |= set() if has_tokenizer else {"vocab_size"}
    changed = {name: value for name, value in plan["arguments"].items() if name in ignored}
    return before | {"arguments": before["arguments"] | changed} == plan


def remove_partial_files(work: Work) -> None:
    """Removes what tasks that were killed have left of files that are not whole."""
    if not files.on_bucket(work.root):
        for path in pathlib.Path(work.root).rglob(".*"):
            if PARTIAL.fullmatch(path.name):
                path.unlink(missing_ok=True)


def empty(work: Work) -> None:
    """Removes all files but those that say whose folder it is, manifest first: no reader takes the rest for whole."""
    for name in (MANIFEST, PLAN):  # and without the plan, no run goes on from the rest
        work.remove(name)
    for name in work.names("", everything=True):
        if name not in (INCOMPLETE, LOCK, PLAN_ID):
            work.remove(name)


def finish(work: Work, target: epath.Path) -> None:
    """Puts the whole dataset in its place: the local folder gets its name, and what only the work needed is removed."""
    if not files.on_bucket(target):
        move_into_place(pathlib.Path(work.root), pathlib.Path(target))
        return
    work.check_owner()
    work.remove(WORK)


def move_into_place(root: pathlib.Path, target: pathlib.Path) -> None:
    """Renames a local folder to its final name; an old one is moved aside first and removed last."""
    old = removed_folder(target)
    if target.exists():
        remove_dataset(old)
        target.rename(old)
    root.rename(target)
    clean_up(target)


def removed_folder(target: pathlib.Path) -> pathlib.Path:
    """Returns where a local dataset lies that `target` replaces, until it is removed."""
    return target.with_name(f"{target.name}.incomplete.removed")


def remove_dataset(folder: pathlib.Path) -> None:
    """Removes a local dataset, manifest first: if this process is killed meanwhile, no reader takes the rest for whole."""
    with contextlib.suppress(OSError):
        (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def clean_up(target: epath.Path) -> None:
    """Removes what a run that was killed in its very last moment has left beside a whole dataset."""
    if not files.on_bucket(target):
        remove_dataset(removed_folder(pathlib.Path(target)))
        shutil.rmtree(pathlib.Path(target, WORK), ignore_errors=True)
    elif not Marker(target).is_held():  # else another process is replacing the dataset, or about to finish it
        work = Work(target)
        work.remove(WORK)
        work.remove(INCOMPLETE)


class Lock:
    """Keeps a local folder for this process, which holds a lock on a file in it.

    Raises:
      UserError: another process has it.
    """

    def __init__(self, root: epath.Path, target: epath.Path):
        self._path, self._target = pathlib.Path(root, LOCK), target
        self._file: IO[str] | None = None

    def __enter__(self) -> None:
        while self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # the folder has just got its final name
                self._file = self._try()

    def check(self) -> None:
        """Does nothing: a lock is not lost."""

    def _try(self) -> IO[str] | None:
        file = self._path.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            owner = file.read() or "another process"
            file.close()
            raise UserError(f"--output={self._target}: {owner} is preparing it; wait for that, or end it") from error
        if not self._path.exists() or os.fstat(file.fileno()).st_ino != self._path.stat().st_ino:
            file.close()  # the lock of a folder that was renamed meanwhile
            return None
        file.truncate(0)
        file.write(f"process {os.getpid()}")
        file.flush()
        return file

    def __exit__(self, *error: object) -> None:
        if self._file:
            self._file.close()


class Marker:
    """Keeps a folder on a bucket for this process, which rewrites a file there every BEAT_SECONDS.

    A bucket has no locks: two processes that take the folder at the same moment both write the file. The one whose file was
    overwritten sees that after SETTLE_SECONDS, or later, whenever it calls `check`.

    Raises:
      UserError: another process has the folder.
      MachineError: on leaving the block, if another process has taken the folder since.
    """

    def __init__(self, target: epath.Path, say: Callable[[str], None] = lambda line: None):
        self._path, self._target, self._say = target / INCOMPLETE, target, say
        self._mine = {"owner": f"process {os.getpid()} of {socket.gethostname()}", "id": uuid.uuid4().hex}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._repeat, daemon=True)

    def read(self) -> dict[str, Any]:
        """Returns what the marker says: its owner, id and time; {} if there is none."""
        try:
            value = json.loads(transfer.attempt(self._path.read_text, str(self._path)))
            return {"owner": str(value["owner"]), "id": str(value["id"]), "time": float(value["time"])}
        except FileNotFoundError:
            return {}
        except (ValueError, TypeError, KeyError):  # not of `prepare`, or of an earlier version
            return {"owner": "another program", "id": "", "time": 0.0}

    def is_held(self) -> bool:
        """Returns whether a process that lives, as far as one can see, has the folder."""
        return is_alive(self.read())

    def __enter__(self) -> Self:
        self._wait_for_silence()
        self._beat(time.time())
        time.sleep(SETTLE_SECONDS)
        now = self.read()
        if now.get("id") != self._mine["id"]:
            raise self._refusal(now)
        self._thread.start()
        return self

    def _wait_for_silence(self) -> None:
        """Waits until no process that lives has the folder; raises a UserError if one shows that it does."""
        before = self.read()
        if not is_alive(before):
            return
        self._say(f"{self._target}: {before['owner']} was preparing it a moment ago; waiting whether it goes on")
        now = before
        while is_alive(now):  # a folder without a marker is free: the other one has finished
            if now != before:
                raise self._refusal(now)
            time.sleep(min(BEAT_SECONDS, 5.0))
            now = self.read()

    def _refusal(self, now: dict[str, Any]) -> UserError:
        owner = now.get("owner", "another process")
        return UserError(f"--output={self._target}: {owner} is preparing it; wait for that, or end it")

    def _beat(self, seconds: float) -> None:
        content = json.dumps(self._mine | {"time": seconds})
        transfer.attempt(lambda: self._path.write_text(content), str(self._path))

    def _repeat(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            with contextlib.suppress(Exception):  # the next beat comes soon
                if self.read().get("id") == self._mine["id"]:
                    self._beat(time.time())

    def check(self) -> None:
        """Raises a MachineError if the folder belongs to another process now."""
        now = self.read()
        if now.get("id") != self._mine["id"]:
            owner = now.get("owner", "another process, which has finished,")
            raise files.MachineError(f"--output={self._target}: {owner} has taken over; this process ends")

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._ended.set()
        self._thread.join()
        if kind is None:
            self.check()
            self._path.unlink(missing_ok=True)
            return
        with contextlib.suppress(Exception):  # the first error counts
            if self.read().get("id") == self._mine["id"]:
                self._beat(0.0)  # the marker says what the folder is; nobody need wait for this process


def is_alive(marker: dict[str, Any]) -> bool:
    """Returns whether the process that wrote a marker lives, as far as one can see from here; {}: there is none."""
    if not marker or time.time() - marker["time"] >= SILENT_SECONDS:
        return False
    process, _, host = marker["owner"].partition(" of ")
    number = process.removeprefix("process ")
    if host != socket.gethostname() or not number.isdigit():
        return True
    return int(number) != os.getpid() and process_exists(int(number))


def process_exists(number: int) -> bool:
    """Returns whether this machine has a process of this number."""
    try:
        os.kill(number, 0)  # sends nothing
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # it is another user's
        return True
    return True
