"""Experiment trackers behind one small interface: `config.tracker` names one, and only that one is imported.

Both read the same environment variables as ever: WANDB_MODE, WANDB_PROJECT, WANDB_API_KEY; TRACKIO_DIR, TRACKIO_SPACE_ID.
"""

import importlib
import os
import uuid
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from etils import epath
from ml_collections import ConfigDict

from contrastive_jax import files
from contrastive_jax.config import UserError

PROJECT = "contrastive_jax"
ID_FILE = "tracker_id"  # in the workdir: a run that goes on keeps its id


class Tracker(Protocol):
    """Where the scalars of a run go, beside metrics.jsonl and TensorBoard."""

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Sends the scalars of a step."""

    def close(self) -> None:
        """Sends what is left, and ends the session."""


class Wandb:
    """Weights & Biases. The arguments are those of `make_tracker`, and the id of the run."""

    def __init__(self, config: ConfigDict, workdir: epath.Path, run_id: str):
        wandb = import_tracker("wandb")
        folder = files.cache_folder() if files.on_bucket(workdir) else workdir
        os.makedirs(folder, exist_ok=True)
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                id=run_id,
                name=workdir.name,
                resume="allow",
                dir=os.environ.get("WANDB_DIR", str(folder)),
                config=config.to_dict(),
                settings=wandb.Settings(console="off", silent=True),
            )
        except wandb.Error as error:
            raise UserError(f"config.tracker='wandb': {error}; or set WANDB_MODE=offline, or config.tracker=''") from error
        # The step is an axis and no order: after a restart, steps come again.
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Sends the scalars of a step."""
        self._run.log({"step": step, **scalars})

    def close(self) -> None:
        """Sends what is left, and ends the session."""
        self._run.finish()


class Trackio:
    """Trackio, which keeps runs in a local database or a Hugging Face Space. The arguments are those of `Wandb`."""

    def __init__(self, config: ConfigDict, workdir: epath.Path, run_id: str):
        trackio = import_tracker("trackio")
        options: dict[str, Any] = {"embed": False, "auto_log_gpu": False, "auto_log_cpu": False}
        name = f"{workdir.name}-{run_id}"
        # Not trackio.log: it knows the run only in the thread that began it.
        self._run = trackio.init(PROJECT, name=name, resume="allow", config=config.to_dict(), **options)

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Sends the scalars of a step."""
        self._run.log(dict(scalars), step=step)

    def close(self) -> None:
        """Sends what is left, and ends the session."""
        self._run.finish()


TRACKERS: dict[str, Callable[[ConfigDict, epath.Path, str], Tracker]] = {"wandb": Wandb, "trackio": Trackio}


def make_tracker(config: ConfigDict, workdir: epath.Path) -> Tracker | None:
    """Opens the session of the tracker that `config.tracker` names; None where it names none.

    Args:
      config: of the run; the tracker stores it.
      workdir: the folder of the run. The file tracker_id in it holds the run's id, so that a resumed run is the same one.

    Raises:
      UserError: the tracker is not installed, or refuses the session.
    """
    if not config.tracker:
        return None
    path = workdir / ID_FILE
    if not path.exists():
        files.write_text(path, uuid.uuid4().hex[:12])
    return TRACKERS[config.tracker](config, workdir, path.read_text().strip())


def check_tracker(config: ConfigDict) -> None:
    """Raises UserError if the tracker of a run is not installed."""
    if config.tracker:
        import_tracker(config.tracker)


def import_tracker(name: str) -> Any:
    """Imports a tracker's package.

    Raises:
      UserError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"config.tracker={name!r}: {error}; pip install {name}, or set config.tracker=''") from error
