"""Checkpoints with Orbax: asynchronous, with retention, restored onto any mesh."""

from typing import Any

import orbax.checkpoint as ocp
from etils import epath


class Checkpoints:
    """The checkpoints of one run, `workdir/checkpoints/STEP`.

    The items of a step: `params`, `opt_state`, `queue` (of a momentum encoder, where there is one), each alone so that an
    evaluation reads only the parameters; and `meta`, a small dict.
    """

    def __init__(self, workdir: epath.PathLike, keep: int = 3, read_only: bool = False):
        self.directory = epath.Path(workdir).resolve() / "checkpoints"
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, create=not read_only, read_only=read_only, enable_async_checkpointing=not read_only
        )
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=options,
            item_handlers={
                "params": ocp.StandardCheckpointHandler(),
                "opt_state": ocp.StandardCheckpointHandler(),
                "queue": ocp.StandardCheckpointHandler(),
                "meta": ocp.JsonCheckpointHandler(),
            },
        )

    def latest(self) -> int | None:
        """The newest step saved, or None."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """The steps saved, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, meta: dict, **items: Any) -> None:
        """Starts to save items by name; returns once they are copied off the devices. A step already saved is left alone."""
        if step == self.latest():
            return
        args = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        self._manager.save(step, args=ocp.args.Composite(**args, meta=ocp.args.JsonSave(meta)))

    def restore(self, step: int, **shapes: Any) -> dict[str, Any]:
        """Restores items by name into trees of jax.ShapeDtypeStruct with shardings.

        Raises:
          ValueError: the checkpoint's tree or shapes are not these.
        """
        try:
            args = {name: ocp.args.StandardRestore(tree) for name, tree in shapes.items()}
            return dict(self._manager.restore(step, args=ocp.args.Composite(**args)).items())
        except (ValueError, KeyError, TypeError) as error:
            first = str(error).strip().splitlines()[0]
            raise ValueError(f"{self.directory / str(step)} does not fit this config: {first}") from error

    def wait(self) -> None:
        """Waits until everything is written."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits and releases the threads."""
        self._manager.close()
