"""Trains an encoder: `python -m contrastive_jax.train --config=configs/debug.py --workdir=runs/debug`.

Start it again with the same workdir and it goes on from its newest checkpoint. Several processes: --coordinator=HOST:PORT
--num_processes=N --process_id=I on each, or --cluster where the environment knows (TPU pod, SLURM). Exit status: 0 at the end,
1 where this machine or another process failed, 2 for bad input, 3 where the run no longer trains (config.guard), 75 where
SIGTERM ended it after a save: start it again.
"""

import contextlib
import json
import sys
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags, logging
from clu import parameter_overview
from etils import epath
from ml_collections import ConfigDict

from contrastive_jax import build as build_lib
from contrastive_jax import checkpoint, cli, digest, guard, metrics, processes, sharding, warm_start
from contrastive_jax import step as step_lib
from contrastive_jax.data import pipeline, tokenizer
from contrastive_jax.evaluator import Evaluator
from contrastive_jax.peers import Peers
from contrastive_jax.reporter import Reporter

CONFIG = cli.define_config()
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of checkpoints, metrics and results; local or gs://.", required=True)
STOP_AT_STEP = flags.DEFINE_integer("stop_at_step", None, "Save and end at this step, as a preemption would.", lower_bound=0)
COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0.")
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Number of processes.")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Number of this process, from 0.")
JOIN_SECONDS = flags.DEFINE_integer("join_seconds", 300, "How long the processes wait for one another at the start.")
SILENT_SECONDS = flags.DEFINE_integer("silent_seconds", 40, "A process that does nothing for so long is taken to hang.")
GRACE_SECONDS = flags.DEFINE_integer(
    "grace_seconds", 0, "After SIGTERM, end without a save that takes longer (0: wait for it)."
)
REPLAY_STEP = flags.DEFINE_integer("replay_step", None, "Run this step again under jax_debug_nans; nothing is written.")
STRICT = flags.DEFINE_bool("strict", False, "Stop at a damaged checkpoint, where the one before it would be taken.")
OTHER_DATA = flags.DEFINE_bool("other_data", False, "Go on from a checkpoint although the dataset or the batch size changed.")
CLUSTER = flags.DEFINE_bool("cluster", False, "Take coordinator and processes from the environment (TPU pod, SLURM).")


class Setup(NamedTuple):
    """A run with its data, ready for the loop; what --strict and --other_data say."""

    config: ConfigDict
    workdir: epath.Path
    run: build_lib.Run
    manifest: dict
    windows: pipeline.Windows
    evaluator: Evaluator | None
    strict: bool
    other_data: bool


def set_up(config: ConfigDict, workdir: epath.Path, strict: bool = False, other_data: bool = False) -> Setup:
    """Opens the data, builds the run, checks that all processes agree, and makes the workdir.

    Raises:
      ValueError: the config, the data or the other processes do not fit; the message names the key.
    """
    for key in ("steps", "log_every", "keep"):
        if config[key] < 1:
            raise ValueError(f"config.{key}={config[key]}: must be at least 1")
    for key in ("eval_every", "checkpoint_every", "seed"):
        if config[key] < 0:
            raise ValueError(f"config.{key}={config[key]}: must not be negative")
    guard.check(config.guard)
    config = warm_start.resolve(config)
    manifest = pipeline.load_manifest(config.data.dir)
    processes.check_agreement(config=cli.to_json(config), data=manifest["content_hash"])
    mesh = sharding.make_mesh(config.mesh)
    run = build_lib.build(config, mesh, manifest["vocab_size"])
    windows = pipeline.open_split(config.data.dir, "train")
    pipeline.sampling(windows, config.data, config.seed)  # refuses now what the loop could not have
    if config.keep_best and not config.eval_every:
        raise ValueError(f"config.keep_best={config.keep_best}: there are no scores with config.eval_every=0")
    evaluator = Evaluator(config, run) if config.eval_every else None
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
    return Setup(config, workdir, run, manifest, windows, evaluator, strict, other_data)


def restore_or_init(setup: Setup, checkpoints: checkpoint.Checkpoints, last: int | None = None) -> step_lib.TrainState:
    """The newest whole checkpoint, of a step up to `last` if that is given, laid out for this mesh, or a fresh state.

    Raises:
      ValueError: the checkpoint is of another model, or of other batches; or damaged (with --strict, or if all are).
    """
    shapes, steps = setup.run.shapes, [step for step in checkpoints.steps() if last is None or step <= last]
    for number in reversed(steps):
        try:
            check_same_batches(setup, checkpoints.meta(number))
            items = checkpoints.restore(number, **items_of(shapes))
        except checkpoint.DamagedError as error:
            if setup.strict or number == steps[0]:
                raise
            logging.warning("%s; going back to the checkpoint before it", error)
            checkpoints.set_aside(number)
            continue
        logging.info("resuming from %s", checkpoints.directory / str(number))
        return shapes._replace(step=jax.device_put(np.int32(number), shapes.step.sharding), **items)
    return setup.run.init(warm_start.encoder_params(setup.config, setup.manifest, setup.run.mesh))


def check_same_batches(setup: Setup, meta: dict[str, Any]) -> None:
    """Raises ValueError if the run would go on with other batches than those it was begun with, unless that is meant."""
    if setup.other_data:
        return
    before, now = meta["config"]["data"]["batch_size"], setup.config.data.batch_size
    if before != now:
        raise ValueError(f"config.data.batch_size={now}: this run has {before} so far; restore it, or say --other_data")
    if meta["data"] != setup.manifest["content_hash"]:
        raise ValueError(
            f"config.data.dir={setup.config.data.dir} holds other data than this run had; restore it, or say --other_data"
        )


def items_of(state: step_lib.TrainState) -> dict[str, Any]:
    """What a checkpoint holds of a state (or of its shapes), by name; the step is the checkpoint's own name."""
    items = state._asdict()
    return {name: items[name] for name in checkpoint.ITEMS if items[name] != ()}


def save(
    setup: Setup,
    checkpoints: checkpoint.Checkpoints,
    state: step_lib.TrainState,
    step: int,
    batch: str,
    score: float | None = None,
) -> None:
    """Starts a checkpoint and prints the digests by which two runs can be compared."""
    meta = {"config": json.loads(cli.to_json(setup.config)), "data": setup.manifest["content_hash"], "code": digest.of_code()}
    meta["score"] = score
    with jax.transfer_guard("allow"):
        digests = checkpoints.save(step, meta, **items_of(state))
    logging.info("step %d  parameters digest: %s  batch digest: %s", step, digest.summary(digests["params"]), batch)


def loop(setup: Setup, stop_at: int, peers: Peers = processes.ALONE, grace_seconds: int = 0) -> int:
    """Trains until `stop_at`, the end, or SIGTERM; returns the step reached.

    The order of one turn is fixed: evaluate, save, next batch, step, write. A state is saved before the data advances, so
    a checkpoint of step k and the batch of step k belong together.
    """
    config, run = setup.config, setup.run
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(contextlib.closing(checkpoint.Checkpoints(setup.workdir, config.keep)))
        preemption = processes.Preemption(grace_seconds)
        with cli.user_errors():
            state = restore_or_init(setup, checkpoints)
        first = step = int(jax.device_get(state.step))
        writer = None
        if jax.process_index() == 0:
            # Only now: a run that was refused must leave the config of the one that is there.
            metrics.write_text(setup.workdir / "config.json", cli.to_json(config))
            if words := tokenizer.find(epath.Path(config.data.dir)):  # a workdir is all that a model needs
                words.copy(setup.workdir / words.name, overwrite=True)
            writer = stack.enter_context(contextlib.closing(metrics.Writer(setup.workdir, first)))
        reporter = Reporter(config, run, first, writer)
        rows = sharding.rows_of_process(config.data.batch_size, run.mesh)
        batches = pipeline.batches(setup.windows, config.data, config.seed, rows, start=first)
        stack.enter_context(jax.transfer_guard("disallow"))  # a silent copy between host and device is an error
        while True:
            preempted = preemption.reached(step)
            end = preempted or step >= min(config.steps, stop_at)
            peers.at(step, busy=True)
            # A preempted run evaluates when it goes on: at this very step, before anything else.
            scores: dict[str, float] = {}
            if setup.evaluator and (step == config.steps or (step % config.eval_every == 0 and not preempted)):
                scores = setup.evaluator.scores(state.params, step)
                if writer:
                    writer.write(step, scores)
                reporter.restart_clock()
            if end or (step > first and config.checkpoint_every and step % config.checkpoint_every == 0):
                reporter.flush()
                save(setup, checkpoints, state, step, reporter.batch_digest, scores.get(config.keep_best))
                reporter.restart_clock()
            if end:
                checkpoints.wait()
                return step
            peers.at(step, busy=step == first)  # whose program has yet to be compiled
            batch = sharding.to_global(next(batches), rows, config.data.batch_size, run.mesh)
            state, values, z = run.train_step(state, batch)
            step += 1
            reporter.add(step, values)
            if step == first + 1:
                jax.block_until_ready(values)
                logging.info("first step done, compilation included")
                reporter.restart_clock()
            if step % config.log_every == 0 or step == config.steps:
                reporter.flush(z)


def replay(setup: Setup, number: int) -> None:
    """Runs step `number` again from the newest checkpoint before it, under jax_debug_nans, and says what it gave.

    Raises:
      FloatingPointError: from the first operation that makes a NaN.
    """
    config, run = setup.config, setup.run
    with contextlib.closing(checkpoint.Checkpoints(setup.workdir, read_only=True)) as checkpoints, cli.user_errors():
        state = restore_or_init(setup._replace(strict=True), checkpoints, last=number - 1)
    first = int(jax.device_get(state.step))
    rows = sharding.rows_of_process(config.data.batch_size, run.mesh)
    batches = pipeline.batches(setup.windows, config.data, config.seed, rows, start=first)
    for step in range(first + 1, number + 1):
        batch = sharding.to_global(next(batches), rows, config.data.batch_size, run.mesh)
        with jax.debug_nans(step == number):
            state, values, _ = run.train_step(state, batch)
    shown = {name: jax.device_get(values[name].addressable_data(0)) for name in ("loss", "gradient_norm", "parameter_norm")}
    words = jax.device_get(values["batch_digest"].addressable_data(0))
    logging.info("step %d again, from checkpoint %d, without a NaN: %s", number, first, shown)
    logging.info("batch digest: %s", "".join(f"{word:08x}" for word in words))


def main(argv: list[str]) -> None:
    """The command."""
    del argv
    with cli.user_errors():
        peers = processes.join(
            *(COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value, CLUSTER.value),
            *(JOIN_SECONDS.value, SILENT_SECONDS.value),
        )
    with peers:
        try:
            start(peers)
        except guard.StoppedError as error:
            cli.fail(str(error), guard.STOPPED)
        except OSError as error:
            cli.fail(f"{error}; the checkpoints in {WORKDIR.value} stay as they are", status=1)


def start(peers: Peers) -> None:
    """What the flags say."""
    with cli.user_errors():
        processes.enable_compilation_cache()
        setup = set_up(CONFIG.value, epath.Path(WORKDIR.value), STRICT.value, OTHER_DATA.value)
    logging.info("%d devices in %d processes, mesh %s", jax.device_count(), jax.process_count(), dict(setup.run.mesh.shape))
    logging.info("parameters\n%s", parameter_overview.get_parameter_overview(setup.run.shapes.params, include_stats=False))
    logging.info("metrics: %s/metrics.jsonl; curves: tensorboard --logdir=%s", setup.workdir, setup.workdir)
    stop_at = setup.config.steps if STOP_AT_STEP.value is None else STOP_AT_STEP.value
    if REPLAY_STEP.value is not None:
        replay(setup, REPLAY_STEP.value)
        return
    step = loop(setup, stop_at, peers, GRACE_SECONDS.value)
    logging.info("ended at step %d of %d; checkpoints: %s/checkpoints", step, setup.config.steps, setup.workdir)
    if step < min(stop_at, setup.config.steps):
        sys.exit(processes.PREEMPTED)


if __name__ == "__main__":
    cli.run(main, config="configs/debug.py")
