"""Reads every checkpoint of a run and prints which are whole.

    contrastive-jax verify --workdir=runs/debug

Exit status: 0 if all are whole; 1 if one is damaged, or there is none; 2 for bad input.
"""

import sys

from absl import flags, logging
from etils import epath

from contrastive_jax import files
from contrastive_jax.config import UserError
from contrastive_jax.runtime import checkpoint


def define_flags() -> None:
    """Defines the flags of the command."""
    flags.DEFINE_string("workdir", None, "The workdir of a run.", required=True)


def main(arguments: list[str]) -> None:
    """Verifies the run of --workdir, and exits."""
    del arguments
    logging.set_verbosity(logging.ERROR)
    sys.exit(0 if verify(files.absolute(flags.FLAGS.workdir)) else 1)


def verify(workdir: epath.Path) -> bool:
    """Reads every checkpoint and prints one line per checkpoint; returns whether there are any and all are whole.

    Raises:
      UserError: the folder is not the workdir of a run.
    """
    if not (workdir / "checkpoints").exists():
        raise UserError(f"--workdir={workdir}: no checkpoints/ there; give the workdir of a run")
    checkpoints = checkpoint.Checkpoints(workdir, read_only=True)
    damaged = 0
    for step in checkpoints.steps():
        try:
            print(f"{checkpoints.directory / str(step)}: whole, {checkpoints.verify(step) / 1e6:,.1f} MB", flush=True)
        except checkpoint.DamagedError as error:
            damaged += 1
            print(f"DAMAGED: {error}", flush=True)
    return bool(checkpoints.steps()) and not damaged
