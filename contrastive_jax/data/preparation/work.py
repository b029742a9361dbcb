"""The folder in which a dataset is made, local or on a bucket: whole files by name, parts of files, outcomes of tasks.

    DIR/.work/plan.json                     what is made of what: a run goes on only if its own plan is the same
    DIR/.work/plan_id                       a word that is new whenever the work begins anew; each outcome has it too
    DIR/.work/tasks/STAGE-00012.json        the outcome of a task; a task that has one is not run again
    DIR/.work/...                           what one stage leaves to the next; see `stages`

Every file appears whole, and writing it again replaces it by the same content, so a run may be killed at any moment. Tasks
of a run that was killed may go on elsewhere; when the work has begun anew they write no more, since the plan_id is not theirs.
"""

import concurrent.futures
import contextlib
import io
import json
import os
import pathlib
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from etils import epath

from contrastive_jax import files
from contrastive_jax.files import transfer

WORK = ".work"
PLAN, PLAN_ID = f"{WORK}/plan.json", f"{WORK}/plan_id"
READS = 32  # small files of a bucket that are read at once


class Work:
    """The folder DIR of the header; names are relative to it.

    Attributes:
      root: its path.
      check_owner: raises an exception if another process makes a dataset there now.
      plan_id: the content of the file plan_id when the work began; "": files are written whatever it says.
    """

    def __init__(self, root: epath.PathLike, check_owner: Callable[[], None] = lambda: None, plan_id: str = ""):
        self.root, self.check_owner, self.plan_id = epath.Path(root), check_owner, plan_id
        self._remote = files.on_bucket(self.root)

    def path(self, name: str) -> epath.Path:
        """Returns the path of a file."""
        return self.root / name

    def check_plan(self) -> None:
        """Raises a MachineError if the work has begun anew, or is done: nobody waits for this one's files."""
        if not self.plan_id:
            return
        with contextlib.suppress(FileNotFoundError):
            if self.read(PLAN_ID).decode() == self.plan_id:
                return
        raise files.MachineError(f"{self.root}: another run of prepare works there now, or has finished; this task ends")

    def write(self, name: str, content: bytes) -> None:
        """Writes a file.

        Raises:
          MachineError: see `check_plan`.
        """
        if self._remote:
            self.check_plan()
            transfer.attempt(lambda: self.path(name).write_bytes(content), str(self.path(name)))
            return
        with self.new_file(name) as local:
            local.write_bytes(content)

    def write_json(self, name: str, value: Any) -> None:
        """Writes a value as JSON."""
        self.write(name, json.dumps(value, ensure_ascii=False).encode())

    @contextlib.contextmanager
    def new_file(self, name: str) -> Iterator[pathlib.Path]:
        """Yields a local path; the file is there under its name when the block ends without an exception.

        Raises:
          MachineError: see `check_plan`.
        """
        path = self.path(name)
        if self._remote:
            with tempfile.TemporaryDirectory(prefix="contrastive_jax-") as folder:
                yield (local := pathlib.Path(folder, path.name))
                self.check_plan()
                transfer.attempt(lambda: transfer.bucket_client(path).put_file(str(local), str(path)), str(path))
            return
        target = pathlib.Path(path)
        self.check_plan()  # before it makes a folder that was renamed meanwhile
        target.parent.mkdir(parents=True, exist_ok=True)
        # Two runs of one task may write it at the same time.
        partial = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
        try:
            yield partial
            self.check_plan()
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytes:
        """Returns the bytes `start` to `end` of a file."""
        path = self.path(name)
        if self._remote:
            return transfer.bucket_client(path).cat_file(str(path), start=start, end=end) if end is None or end > start else b""
        with open(os.fspath(path), "rb") as file:
            file.seek(start)
            return file.read(-1 if end is None else end - start)

    def read_json(self, name: str) -> Any:
        """Returns the value in a file of JSON; None if there is no such file."""
        try:
            return json.loads(self.read(name))
        except FileNotFoundError:
            return None

    def write_array(self, name: str, values: np.ndarray) -> None:
        """Writes an array as .npy."""
        with self.new_file(name) as path, path.open("wb") as file:
            np.save(file, values)

    def read_array(self, name: str) -> np.ndarray:
        """Returns the array in a .npy file, mapped into memory if the file is local."""
        if self._remote:
            return np.load(io.BytesIO(self.read(name)))
        return np.load(os.fspath(self.path(name)), mmap_mode="r")

    @contextlib.contextmanager
    def local_copy(self, name: str) -> Iterator[pathlib.Path]:
        """Yields a local path of a file: its own, or that of a copy, which goes when the block ends."""
        if not self._remote:
            yield pathlib.Path(self.path(name))
            return
        with tempfile.TemporaryDirectory(prefix="contrastive_jax-") as folder:
            local = pathlib.Path(folder, self.path(name).name)
            local.write_bytes(self.read(name))
            yield local

    def names(self, folder: str, everything: bool = False) -> list[str]:
        """Returns the sorted names of the files in a folder, relative to it, without those that are being written.

        Args:
          folder: its name; "": the whole folder.
          everything: whether to list the files of the folders in it too, and hidden ones.
        """
        path = self.path(folder)
        if self._remote:
            root = transfer.bucket_name(path)
            names = [name.removeprefix(f"{root}/") for name in transfer.bucket_client(path).find(root)]
        else:
            names = [os.path.relpath(os.path.join(top, name), path) for top, _, found in os.walk(path) for name in found]
        return sorted(name for name in names if everything or not ("/" in name or name.startswith(".")))

    def outcomes(self, stage: str) -> dict[int, Any]:
        """Returns the outcomes of the tasks of a stage that are done by this plan: {number of the task: outcome}."""
        names = [name for name in self.names(f"{WORK}/tasks") if name.startswith(f"{stage}-")]
        with concurrent.futures.ThreadPoolExecutor(READS if self._remote else 1) as pool:
            values = pool.map(lambda name: self.read_json(f"{WORK}/tasks/{name}"), names)
            numbers = (int(name.removeprefix(f"{stage}-").removesuffix(".json")) for name in names)
            found = zip(numbers, values, strict=True)
            return {number: value for number, value in found if value and value.get("plan_id") == self.plan_id}

    def write_outcome(self, stage: str, number: int, outcome: dict[str, Any]) -> dict[str, Any]:
        """Writes the outcome of a task, its last act, and returns it with the number of the task."""
        outcome = {"task": number, "plan_id": self.plan_id, **outcome}
        self.write_json(f"{WORK}/tasks/{stage}-{number:05d}.json", outcome)
        return outcome

    def write_groups(self, name: str, rows: np.ndarray, sizes: np.ndarray) -> None:
        """Writes rows that belong to groups, so that `read_groups` finds those of some groups alone.

        Args:
          name: the file.
          rows: [n] of any type, sorted by group.
          sizes: [g], the rows of each group.
        """
        offsets = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]) * rows.itemsize + 8 * (len(sizes) + 1)
        self.write(name, offsets.astype("<i8").tobytes() + rows.tobytes())

    def read_groups(self, name: str, first: int, end: int, dtype: np.dtype) -> np.ndarray:
        """Returns the rows of the groups `first` to `end` - 1 of a file of `write_groups`."""
        if self._remote:
            offsets = np.frombuffer(self.read(name, 8 * first, 8 * (end + 1)), "<i8")
            return np.frombuffer(self.read(name, int(offsets[0]), int(offsets[-1])), dtype)
        start, stop = (int(np.frombuffer(self.read(name, 8 * group, 8 * group + 8), "<i8")[0]) for group in (first, end))
        return np.frombuffer(self.read(name, start, stop), dtype)

    def remove(self, name: str) -> None:
        """Removes a file or a folder, if it is there."""
        path = self.path(name)
        if self._remote:
            client = transfer.bucket_client(path)
            found = client.find(transfer.bucket_name(path))
            transfer.in_parallel(lambda item: client.rm_file(item) or 0, found)
        elif path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
