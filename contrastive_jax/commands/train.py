"""Trains an encoder.

    contrastive-jax train --config=configs/debug.py --workdir=runs/debug

Started again with the same workdir, the run continues from its newest checkpoint. To train with several processes, give
--coordinator=HOST:PORT --num_processes=N --process_id=I to each; or --cluster, if the environment defines them (TPU pod,
SLURM, Open MPI).

Exit status: 0 at the end; 1 if a machine or process failed; 2 for bad input; 3 if the run diverged or collapsed; 4 if a process
did not join; 75: the run saved a checkpoint and stopped on SIGTERM. After 1, 4 and 75 the same command continues the run.
"""

import sys

from absl import flags, logging
from etils import epath

import contrastive_jax
from contrastive_jax import files
from contrastive_jax.commands import cli
from contrastive_jax.runtime import processes
from contrastive_jax.training import loop, profiling, speed


def define_flags() -> None:
    """Defines the flags of the command."""
    cli.define_config()
    flags.DEFINE_string("workdir", None, "Folder for checkpoints, metrics and results; local or gs://.", required=True)
    flags.DEFINE_integer("stop_at_step", None, "Save a checkpoint after this step, and end.", lower_bound=0)
    cli.define_processes()
    flags.DEFINE_integer("grace_seconds", 0, "After SIGTERM, end after this long even without a checkpoint; 0: no limit.")
    flags.DEFINE_integer("replay_step", None, "Run this step again, from the checkpoint before it, under jax_debug_nans.")
    flags.DEFINE_string("profile_steps", None, "FROM:TO: write a profile of these steps into the workdir, for TensorBoard.")
    flags.DEFINE_bool("strict", False, "Stop at a damaged checkpoint instead of continuing from the one before it.")
    flags.DEFINE_bool(
        "other_data", False, "Continue a run although its dataset, its seed or a value of config.data has changed."
    )


def main(arguments: list[str]) -> None:
    """Joins the other processes and trains."""
    with cli.joined_processes() as peers:
        try:
            train(peers)
        except OSError as error:
            kept = f"the checkpoints in {flags.FLAGS.workdir} stay as they are"
            raise cli.storage_error(error, sys.argv[1:]) or files.MachineError(f"{error}; {kept}") from error


def train(peers: processes.Peers) -> None:
    """Trains, or replays a step, as the flags say; ends the process with status 75 if the run was preempted."""
    values, profile_steps = flags.FLAGS, profiling.parse_steps(flags.FLAGS.profile_steps)
    processes.enable_compilation_cache(values.workdir)
    setup = contrastive_jax.set_up(values.config, epath.Path(values.workdir), values.strict, values.other_data)
    if values.replay_step is not None:
        loop.replay(setup, values.replay_step)
        return
    stop_at = setup.config.steps if values.stop_at_step is None else values.stop_at_step
    step = loop.train(setup, stop_at, peers, values.grace_seconds, profile_steps, speed.process_began())
    logging.info("ended at step %d of %d; checkpoints: %s/checkpoints", step, setup.config.steps, setup.workdir)
    if step < min(stop_at, setup.config.steps):
        sys.exit(processes.PREEMPTED)
