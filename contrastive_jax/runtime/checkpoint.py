"""Checkpoints with Orbax: written in the background, restored onto any mesh, and verified.

A checkpoint also stores type, shape and hash of each array (`meta["arrays"]`). What is restored is hashed again on the devices,
so that a damaged file, whatever the damage, never becomes a model.
"""

import contextlib
import errno
import functools
import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from contrastive_jax import files
from contrastive_jax.config import UserError
from contrastive_jax.files import errors, transfer
from contrastive_jax.runtime import digest, orbax_on_s3, sharding

ITEMS = ("params", "opt_state", "memory")
# Where a file cannot be read for these reasons, it is not damaged. TensorStore puts the system's words into its own errors.
ERRNOS = (errno.EACCES, errno.EPERM, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ETIMEDOUT)
OF_MACHINE = re.compile("|".join([*map(os.strerror, ERRNOS), "RESOURCE_EXHAUSTED", "out of memory"]), re.I)


class DamagedError(UserError):
    """A checkpoint cannot be read, or holds something else than was saved; the message names it."""


class FailedSaveError(files.MachineError):
    """A checkpoint could not be written; the message says why."""


class Checkpoints:
    """The checkpoints of one run, in WORKDIR/checkpoints/STEP.

        checkpoints = Checkpoints("runs/debug", keep=3)
        checkpoints.save(100, {"score": 0.7}, params=params, opt_state=opt_state)  # returns while the files are being written
        params = checkpoints.restore(100, params=shapes)["params"]  # shapes: a tree of jax.ShapeDtypeStruct with shardings
        checkpoints.close()

    A checkpoint consists of items (those of ITEMS that the run has), each in a folder of its own, so that an evaluation reads
    only the parameters; and of `meta`, a small dict.

    Args:
      workdir: the folder of the run.
      keep: the number of newest checkpoints to keep; the one with the best score stays beside them.
      read_only: read only; nothing is created or deleted.
    """

    def __init__(self, workdir: epath.PathLike, keep: int = 3, read_only: bool = False):
        self.directory = files.absolute(workdir) / "checkpoints"
        self._keep = keep
        if str(self.directory).startswith("s3://"):
            orbax_on_s3.enable()
        options = ocp.CheckpointManagerOptions(
            preservation_policy=None if read_only else self,
            create=not read_only,
            read_only=read_only,
            enable_async_checkpointing=not read_only,
            cleanup_tmp_directories=not read_only,  # what a killed process had written
        )
        handlers: dict[str, Any] = {name: ocp.StandardCheckpointHandler() for name in ITEMS}
        handlers["meta"] = ocp.JsonCheckpointHandler()
        self._handlers = handlers
        self._manager = ocp.CheckpointManager(self.directory, options=options, item_handlers=handlers)
        self._failure: Exception | None = None
        self._watcher = threading.Thread()  # of the newest save
        self._scores: dict[int, float] = {}
        self._wait_for_same_steps()
        for step in self.steps():
            with contextlib.suppress(DamagedError):
                if (score := self.meta(step).get("score")) is not None:
                    self._scores[step] = score

    def _wait_for_same_steps(self) -> None:
        """Waits until all processes see the same checkpoints: a machine may remember the list of a shared folder for a minute.

        Raises:
          MachineError: they still see others after two minutes.
        """
        if jax.process_count() == 1:
            return
        for seconds in (0, 1, 9, 30, 80):
            time.sleep(seconds)
            self._manager.reload()
            own = np.frombuffer(hashlib.sha256(str(self.steps()).encode()).digest(), np.uint8)
            if (multihost_utils.process_allgather(own) == own).all():
                return
        raise files.MachineError(
            f"{self.directory}: the processes see different checkpoints there (process {jax.process_index()} sees "
            f"{self.steps()}); is it one folder, which all of them share?"
        )

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Returns which checkpoints stay, the `keep` newest and the best; Orbax calls it after each save."""
        del context
        newest = [info.step for info in checkpoints][-self._keep :]
        return [info.step in newest or info.step == self.best() for info in checkpoints]

    def best(self) -> int | None:
        """Returns the step with the highest score, the earliest of equal ones; None if no checkpoint has a score."""
        return max(sorted(self._scores), key=lambda step: self._scores[step], default=None)

    def latest(self) -> int | None:
        """Returns the newest saved step, or None."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """Returns the saved steps, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, meta: dict, **items: Any) -> dict[str, dict[str, str]]:
        """Starts to save items by name, and returns when their arrays have been copied off the devices.

        A step that is already saved is left as it is. The log says when the checkpoint is complete; if it cannot be written,
        `check_saved` raises the reason.

        Args:
          step: the name of the checkpoint.
          meta: a small dict of JSON values; `meta["score"]`, if it is not None, decides which checkpoint is the best.
          **items: trees of arrays by the names of ITEMS.

        Returns:
          The hash of each array: {item: {path: hexadecimal digits}}.
        """
        self.wait()
        digests = {name: digest.hash_tree(tree) for name, tree in items.items()}
        if step != self.latest():
            arrays = {
                name: {path: [kind, digests[name][path]] for path, kind in digest.types_and_shapes(tree).items()}
                for name, tree in items.items()
            }
            args = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
            meta = meta | {"arrays": arrays}
            meta["hash"] = hash_of(meta)
            if meta.get("score") is not None:
                self._scores[step] = meta["score"]
            self._manager.save(step, args=ocp.args.Composite(**args, meta=ocp.args.JsonSave(meta)))
            self._watcher = threading.Thread(target=self._watch, args=(step,), daemon=True)
            self._watcher.start()
        return digests

    def _watch(self, step: int) -> None:
        """Waits until a checkpoint is complete or has failed; logs the one, keeps the other for `check_saved`."""
        begun, refused = time.monotonic(), repeated_requests()
        try:
            self._manager.wait_until_finished()
        except Exception as error:  # Orbax and TensorStore raise many kinds
            self._failure = error
            return
        if jax.process_index() == 0:
            logging.info("checkpoint %d is complete, after %.1f s", step, time.monotonic() - begun)
        if refused := repeated_requests() - refused:
            logging.warning("checkpoint %d: %d requests were refused by the bucket, and repeated", step, refused)

    def check_saved(self) -> None:
        """Raises what a save in the background has met since the last call; cheap enough for every step.

        Raises:
          FailedSaveError: the checkpoint was not written; the ones before it stay as they are.
          UserError: there is no permission to write it.
        """
        # Orbax's own check would take the error from its thread, which would then delete an older checkpoint all the same.
        manager = getattr(self._manager._checkpointer, "_async_manager", None)
        if failure := self._failure or getattr(manager, "_exception", None):
            explained = errors.explain(failure, [str(self.directory)])
            if explained and not isinstance(explained, files.MachineError):
                raise explained from failure
            raise FailedSaveError(
                f"{self.directory}: a checkpoint was not written ({first_line(failure)}); those before it stay as they are"
            ) from failure

    def meta(self, step: int) -> dict[str, Any]:
        """Returns the dict that was saved with the items; every process must call it.

        Raises:
          DamagedError: it cannot be read, or is not what was saved.
        """
        folder = self.directory / str(step)
        with raise_on_all_processes(folder, "its meta cannot be read"):
            meta = self._handlers["meta"].restore(folder / "meta", ocp.args.JsonRestore())
            saved_hash = meta.pop("hash")
        if saved_hash != hash_of(meta):
            raise DamagedError(f"{folder}: its meta is not what was saved")
        return meta

    def restore(self, step: int, **shapes: Any) -> dict[str, Any]:
        """Restores items by name into trees of jax.ShapeDtypeStruct with shardings; every process must call it.

        Raises:
          UserError: the checkpoint belongs to another model: its arrays have other names, types or shapes.
          DamagedError: the arrays cannot be read, or are not what was saved.
        """
        arrays, folder = self.meta(step)["arrays"], self.directory / str(step)
        for item, tree in shapes.items():
            expected, saved = digest.types_and_shapes(tree), {path: kind for path, (kind, _) in arrays.get(item, {}).items()}
            differing = sorted(path for path in expected.keys() | saved.keys() if expected.get(path) != saved.get(path))
            if differing:
                path = differing[0]
                raise UserError(
                    f"{folder} does not fit this config: {item}/{path} is {saved.get(path, 'absent')} there, "
                    f"{expected.get(path, 'absent')} here; give the config it was trained with, or another workdir"
                )
        with raise_on_all_processes(folder, "cannot be read"):
            # Not through the manager: it waits for all processes, and one whose part of a file is damaged would never come.
            restored = {
                name: self._handlers[name].restore(folder / name, args=ocp.args.StandardRestore(tree))
                for name, tree in shapes.items()
            }
        for item, tree in restored.items():
            for path, value in digest.hash_tree(tree).items():
                if value != arrays[item][path][1]:
                    raise DamagedError(f"{folder}: {item}/{path} is not what was saved")
        return restored

    def read_item(self, step: int, item: str, shardings_of: Callable[[Any], Any]) -> Any:
        """Returns one item with the names, types and shapes that it was saved with.

        Args:
          step: of the checkpoint.
          item: one of ITEMS.
          shardings_of: a tree of jax.ShapeDtypeStruct → the tree of their shardings.

        Raises:
          DamagedError: the item cannot be read, or is not what was saved.
        """
        try:
            saved = self._manager.item_metadata(step)[item].tree
            shapes = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), saved, is_leaf=lambda leaf: hasattr(leaf, "shape")
            )
        except Exception as error:  # Orbax raises many kinds for a damaged file
            raise DamagedError(f"{self.directory / str(step)}: {item} cannot be read ({first_line(error)})") from error
        tree = jax.tree.map(
            lambda leaf, of_leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=of_leaf), shapes, shardings_of(shapes)
        )
        return self.restore(step, **{item: tree})[item]

    def set_aside(self, step: int) -> None:
        """Moves a damaged checkpoint to WORKDIR/damaged, where no run looks for one; every process must call it."""
        self._scores.pop(step, None)
        if jax.process_index() == 0:
            source, target = self.directory / str(step), self.directory.parent / "damaged" / str(step)
            transfer.move_folder(source, target, last="commit_success.txt")  # which Orbax writes last, on buckets
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"checkpoint {step} set aside")
        self._manager.reload()

    def verify(self, step: int) -> int:
        """Reads a whole checkpoint, one item after the other, sharded over all devices; returns its size in bytes.

        Raises:
          DamagedError: it cannot be read, or is not what was saved.
        """
        spread = functools.partial(sharding.even_shardings, mesh=sharding.all_devices_mesh())
        items = self.meta(step)["arrays"]
        return sum(leaf.nbytes for item in items for leaf in jax.tree.leaves(self.read_item(step, item, spread)))

    def wait(self) -> None:
        """Waits until all checkpoints are written.

        Raises:
          FailedSaveError: one was not.
        """
        while self._watcher.is_alive():
            self._watcher.join(timeout=1)
            self.check_saved()  # of several processes, one that failed must not wait for the others
        self.check_saved()

    def close(self) -> None:
        """Waits until all checkpoints are written, and ends the threads that write them.

        Raises:
          FailedSaveError: a checkpoint was not written.
        """
        self.wait()
        self._manager.close()


@contextlib.contextmanager
def raise_on_all_processes(folder: epath.Path, what: str) -> Iterator[None]:
    """Turns an exception of any process into a DamagedError on every process; every process must enter it.

    A file that only one process can read would otherwise end that process alone, and leave the others waiting. Storage that
    cannot be reached and a lack of memory are no damage: they become a MachineError.

    Args:
      folder: the checkpoint.
      what: the middle of the message; the first line of the exception follows.
    """
    reason = ""
    try:
        yield
    except Exception as error:  # Orbax and TensorStore raise many kinds for a damaged file
        explained, reason = errors.explain(error, [str(folder)]), f"{folder}: {what} ({first_line(error)})"
        if explained is not None and not isinstance(explained, errors.DisappearedError):
            reason = f"machine {explained}"
        elif any(isinstance(cause, MemoryError) or OF_MACHINE.search(str(cause)) for cause in errors.causes(error)):
            reason = f"machine {reason}; it stays as it is"
    if jax.process_count() > 1:
        own = np.frombuffer(reason.encode()[:400].ljust(400), np.uint8)
        reasons = (bytes(row).decode(errors="replace").strip() for row in multihost_utils.process_allgather(own))
        reason = next(filter(None, reasons), "")
    if reason.startswith("machine "):
        raise files.MachineError(reason.removeprefix("machine "))
    if reason:
        raise DamagedError(reason)


def repeated_requests() -> int:
    """Returns how many requests to a bucket TensorStore had to repeat in this process; it waits longer before each."""
    found = tensorstore.experimental_collect_matching_metrics("/tensorstore/kvstore/")
    counters = (metric for metric in found if re.fullmatch(r".*/(gcs|gcs_grpc|s3)/retries", metric["name"]))
    return sum(int(value["value"]) for metric in counters for value in metric["values"])


def hash_of(meta: dict[str, Any]) -> str:
    """Returns the sha256 of a dict as JSON with sorted keys."""
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def first_line(error: Exception) -> str:
    """Returns the first line of an exception's message, or its type's name where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
