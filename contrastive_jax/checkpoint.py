"""Checkpoints with Orbax: asynchronous, with retention, restored onto any mesh, and verified.

  python -m contrastive_jax.checkpoint verify WORKDIR     reads every checkpoint and says which are whole

Beside the arrays a checkpoint keeps what they were: type, shape and a hash of each (`meta["arrays"]`). What is restored is
hashed again on the devices, so that no damage of a file, whatever it is, becomes a model.
"""

import contextlib
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import app, logging
from etils import epath
from jax.experimental import multihost_utils

from contrastive_jax import digest

ITEMS = ("params", "opt_state", "queue")


class DamagedError(ValueError):
    """A checkpoint that is not what was saved; the message names it and what is wrong."""


class Checkpoints:
    """The checkpoints of one run, `workdir/checkpoints/STEP`.

    The items of a step: `params`, `opt_state`, `queue` (of a momentum encoder, where there is one), each alone so that an
    evaluation reads only the parameters; and `meta`, a small dict.
    """

    def __init__(self, workdir: epath.PathLike, keep: int = 3, read_only: bool = False):
        self.directory = epath.Path(workdir).resolve() / "checkpoints"
        self._keep = keep
        options = ocp.CheckpointManagerOptions(
            preservation_policy=None if read_only else self,
            create=not read_only,
            read_only=read_only,
            enable_async_checkpointing=not read_only,
        )
        handlers: dict[str, Any] = {name: ocp.StandardCheckpointHandler() for name in ITEMS}
        handlers["meta"] = ocp.JsonCheckpointHandler()
        self._handlers = handlers
        self._manager = ocp.CheckpointManager(self.directory, options=options, item_handlers=handlers)
        self._scores: dict[int, float] = {}
        for step in self.steps():
            with contextlib.suppress(DamagedError):
                if (score := self.meta(step).get("score")) is not None:
                    self._scores[step] = score

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Orbax's question: the newest `keep` stay, and that of the best score."""
        del context
        newest = [info.step for info in checkpoints][-self._keep :]
        return [info.step in newest or info.step == self.best() for info in checkpoints]

    def best(self) -> int | None:
        """The step of the highest score, the earliest of equal ones; None where none has one."""
        return max(sorted(self._scores), key=lambda step: self._scores[step], default=None)

    def latest(self) -> int | None:
        """The newest step saved, or None."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """The steps saved, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, meta: dict, **items: Any) -> dict[str, dict[str, str]]:
        """Starts to save items by name; returns their hashes once they are copied off the devices.

        A step already saved is left alone. `meta["score"]`, if there is one, decides which checkpoint is the best.
        """
        digests = {name: digest.of_tree(tree) for name, tree in items.items()}
        if step != self.latest():
            arrays = {
                name: {path: [kind, digests[name][path]] for path, kind in digest.describe(tree).items()}
                for name, tree in items.items()
            }
            args = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
            meta = meta | {"arrays": arrays}
            meta["hash"] = hash_of(meta)
            if meta.get("score") is not None:
                self._scores[step] = meta["score"]
            self._manager.save(step, args=ocp.args.Composite(**args, meta=ocp.args.JsonSave(meta)))
        return digests

    def meta(self, step: int) -> dict[str, Any]:
        """What was saved beside the items; every process must call it.

        Raises:
          DamagedError: it cannot be read or is not what was saved.
        """
        where = self.directory / str(step)
        with agreement(f"{where}: its meta cannot be read"):
            found = self._handlers["meta"].restore(where / "meta", ocp.args.JsonRestore())
            saved = found.pop("hash")
        if saved != hash_of(found):
            raise DamagedError(f"{where}: its meta is not what was saved")
        return found

    def restore(self, step: int, **shapes: Any) -> dict[str, Any]:
        """Restores items by name into trees of jax.ShapeDtypeStruct with shardings; every process must call it.

        Raises:
          ValueError: the checkpoint is of another model: its arrays are not these.
          DamagedError: they are, but cannot be read or are not what was saved.
        """
        arrays, where = self.meta(step)["arrays"], self.directory / str(step)
        for item, tree in shapes.items():
            wanted, saved = digest.describe(tree), {path: kind for path, (kind, _) in arrays.get(item, {}).items()}
            odd = sorted(path for path in wanted.keys() | saved.keys() if wanted.get(path) != saved.get(path))
            if odd:
                raise ValueError(
                    f"{where} does not fit this config: {item}/{odd[0]} is {saved.get(odd[0], 'absent')} there, "
                    f"{wanted.get(odd[0], 'absent')} here; give the config it was trained with, or another workdir"
                )
        with agreement(f"{where} cannot be read"):
            # Not by the manager, which waits for all processes: one whose part of a file is damaged would never come.
            found = {
                name: self._handlers[name].restore(where / name, args=ocp.args.StandardRestore(tree))
                for name, tree in shapes.items()
            }
        for item, tree in found.items():
            for path, value in digest.of_tree(tree).items():
                if value != arrays[item][path][1]:
                    raise DamagedError(f"{where}: {item}/{path} is not what was saved")
        return found

    def read(self, step: int, item: str, place: Callable[[Any], jax.P]) -> Any:
        """One item as it was saved, whatever its model, on all devices that are here; `place` says how a leaf is spread.

        Raises:
          DamagedError: it is not what was saved.
        """
        mesh = jax.make_mesh((jax.device_count(),), ("all",))

        def spread(leaf: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=jax.NamedSharding(mesh, place(leaf)))

        try:
            saved = self._manager.item_metadata(step)[item].tree
            tree = jax.tree.map(spread, saved, is_leaf=lambda leaf: hasattr(leaf, "shape"))
        except Exception as error:  # whatever Orbax makes of what it finds
            raise DamagedError(f"{self.directory / str(step)}: {item} cannot be read ({first_line(error)})") from error
        return self.restore(step, **{item: tree})[item]

    def set_aside(self, step: int) -> None:
        """Moves a damaged checkpoint to `workdir/damaged`, where nothing looks for one; every process must call it."""
        self._scores.pop(step, None)
        target = self.directory.parent / "damaged" / str(step)
        if jax.process_index() == 0:
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.exists():
                target.rmtree()
            (self.directory / str(step)).rename(target)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"checkpoint {step} set aside")
        self._manager.reload()

    def verify(self, step: int) -> int:
        """Reads one checkpoint whole, an item at a time, spread over the devices that are here; returns its bytes.

        Raises:
          DamagedError: it is not what was saved.
        """

        def spread(leaf: Any) -> jax.P:
            axis = next((i for i, size in enumerate(leaf.shape) if size % jax.device_count() == 0), None)
            return jax.P() if axis is None else jax.P(*[None] * axis, "all")

        items = self.meta(step)["arrays"]
        return sum(leaf.nbytes for item in items for leaf in jax.tree.leaves(self.read(step, item, spread)))

    def wait(self) -> None:
        """Waits until everything is written."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits and releases the threads."""
        self._manager.close()


@contextlib.contextmanager
def agreement(what: str) -> Iterator[None]:
    """Reads what one process can read and another may not: where one fails, all raise DamagedError, with its reason."""
    reason = ""
    try:
        yield
    except Exception as error:  # whatever Orbax and TensorStore make of what they find
        reason = f"{what} ({first_line(error)})"
    if jax.process_count() > 1:
        mine = np.frombuffer(reason.encode()[:400].ljust(400), np.uint8)
        every = (bytes(row).decode(errors="replace").strip() for row in multihost_utils.process_allgather(mine))
        reason = next(filter(None, every), "")
    if reason:
        raise DamagedError(reason)


def hash_of(meta: dict[str, Any]) -> str:
    """sha256 of what JSON makes of it."""
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def first_line(error: Exception) -> str:
    """An error in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def main(argv: list[str]) -> None:
    """The command: exit status 1 if a checkpoint is damaged, 2 for bad input."""
    if len(argv) != 3 or argv[1] != "verify" or not (epath.Path(argv[2]) / "checkpoints").exists():
        print(f"error: {' '.join(argv[1:])}: give `verify WORKDIR`, a folder with checkpoints/", file=sys.stderr)
        sys.exit(2)
    logging.set_verbosity(logging.ERROR)
    checkpoints, damaged = Checkpoints(argv[2], read_only=True), 0
    for step in checkpoints.steps():
        try:
            print(f"{checkpoints.directory / str(step)}: whole, {checkpoints.verify(step) / 1e6:,.1f} MB", flush=True)
        except ValueError as error:
            damaged += 1
            print(f"DAMAGED: {error}", flush=True)
    sys.exit(1 if damaged or not checkpoints.steps() else 0)


if __name__ == "__main__":
    app.run(main)
