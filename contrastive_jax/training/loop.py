"""The training loop: evaluate, save, next batch, step, write.

The batch of step k is a pure function of (data, seed, k), so that the step number is the whole state of the data.
"""

import contextlib
import json
import platform
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from clu import parameter_overview
from etils import epath
from ml_collections import ConfigDict

from contrastive_jax import config as config_lib
from contrastive_jax import files
from contrastive_jax.config import UserError
from contrastive_jax.data import pipeline, prepared, tokenizer
from contrastive_jax.data.batch import Batch
from contrastive_jax.objectives import distillation, labels
from contrastive_jax.runtime import checkpoint, digest, processes, sharding
from contrastive_jax.runtime.peers import Peers
from contrastive_jax.training import build as build_lib
from contrastive_jax.training import guard, metrics, noise, trackers, warm_start
from contrastive_jax.training import step as step_lib
from contrastive_jax.training.log_line import LogLine
from contrastive_jax.training.profiling import Profiler

Evaluate = Callable[[step_lib.Params, int], dict[str, float]]  # (params, step) → scores by name; every process calls it


# Keys of config.data that say where the data is; all others decide the batches of a run.
PLACES_OF_DATA = ("data.dir", "data.cache_dir", "data.cache_gb")


class Setup(NamedTuple):
    """A run with its data, ready for the loop.

    Attributes:
      config: of the run, complete and checked.
      workdir: where checkpoints, metrics and results go.
      run: the jitted functions.
      manifest: of the prepared dataset.
      stream: the pairs of the training split.
      evaluate: scores parameters every `config.eval_every` steps, or None.
      strict: whether a damaged checkpoint ends the run, instead of being set aside for the one before it.
      other_data: whether the run may go on with other batches: another dataset, seed or value of config.data.
    """

    config: ConfigDict
    workdir: epath.Path
    run: build_lib.Run
    manifest: dict[str, Any]
    stream: pipeline.Stream
    evaluate: Evaluate | None
    strict: bool
    other_data: bool


def set_up(
    config: ConfigDict,
    workdir: epath.Path,
    strict: bool = False,
    other_data: bool = False,
    make_evaluate: Callable[[ConfigDict, build_lib.Run], Evaluate] | None = None,
) -> Setup:
    """Opens the data, builds the run, checks that all processes agree, and makes the workdir.

    Args:
      config: of the run.
      workdir: its folder.
      strict: see `Setup`.
      other_data: see `Setup`.
      make_evaluate: makes the evaluation of a run; called where config.eval_every is not 0.

    Raises:
      UserError: the config, the data or the other processes do not fit; the message names the key.
    """
    workdir = files.absolute(workdir)
    config_lib.check(config)
    guard.check_guard(config.guard)
    trackers.check_tracker(config)
    config = warm_start.resolve(config)
    manifest = prepared.load_manifest(config.data.dir)
    versions = {f"version of {name}": version for name, version in digest.software_versions().items()}
    processes.check_agreement(config=config_lib.to_json(config), data=manifest["content_hash"], **versions)
    mesh = sharding.make_mesh(config.mesh)
    tables = tokenizer.load(prepared.folders(config.data.dir)[0]).tables() if noise.reads_text(config.noise) else None
    run = build_lib.build(config, mesh, manifest["vocab_size"], manifest["reserved"], tables)
    records = prepared.open_split(config.data.dir, "train", config.data.cache_dir, config.data.cache_gb)
    stream = pipeline.open_stream(records, config.data, config.seed)
    labels.check_labels(config, manifest.get("labels", []))
    distillation.check_scores(config, manifest.get("numbers", []))
    if config.keep_best and not config.eval_every:
        raise UserError(f"config.keep_best={config.keep_best}: there are no scores with config.eval_every=0")
    evaluate = make_evaluate(config, run) if config.eval_every and make_evaluate else None
    if jax.process_index() == 0:
        files.make_folder(workdir)
    processes.check_shared_folder(workdir)
    logging.info("%d devices in %d processes, mesh %s", jax.device_count(), jax.process_count(), dict(mesh.shape))
    logging.info("process %d on %s: %s", jax.process_index(), platform.node(), processes.describe_cores())
    logging.info("parameters\n%s", parameter_overview.get_parameter_overview(run.shapes.params, include_stats=False))
    logging.info("metrics: %s/metrics.jsonl; curves: tensorboard --logdir=%s", workdir, workdir)
    return Setup(config, workdir, run, manifest, stream, evaluate, strict, other_data)


def restore_or_init(setup: Setup, checkpoints: checkpoint.Checkpoints, last: int | None = None) -> step_lib.TrainState:
    """Returns the newest whole checkpoint, laid out for this mesh, or a fresh state where there is none.

    Args:
      setup: the run.
      checkpoints: its checkpoints.
      last: the newest step to take; None: any.

    Raises:
      UserError: the checkpoint is of another model, or of other batches; or damaged (with `setup.strict`, or if all are).
    """
    shapes, steps = setup.run.shapes, [step for step in checkpoints.steps() if last is None or step <= last]
    for number in reversed(steps):
        try:
            meta = checkpoints.meta(number)
            check_same_batches(setup, meta)
            items = checkpoints.restore(number, **items_of(shapes))
        except checkpoint.DamagedError as error:
            if setup.strict or number == steps[0]:
                raise
            logging.warning("%s; going back to the checkpoint before it", error)
            checkpoints.set_aside(number)
            continue
        logging.info("resuming from %s", checkpoints.directory / str(number))
        warn_of_other_versions(meta)
        return shapes._replace(step=jax.device_put(np.int32(number), shapes.step.sharding), **items)
    inputs = setup.config, setup.manifest, setup.run.mesh
    return setup.run.init(warm_start.encoder_params(*inputs), warm_start.teacher_params(*inputs))


def check_same_batches(setup: Setup, meta: dict[str, Any]) -> None:
    """Raises UserError if the run would go on with other batches than it was begun with, unless `setup.other_data`."""
    if setup.other_data:
        return
    before = config_lib.flat(config_lib.default_config()) | config_lib.flat(ConfigDict(meta["config"]))
    for path, now in config_lib.flat(setup.config).items():
        decides = path == "seed" or (path.startswith("data.") and path not in PLACES_OF_DATA)
        if decides and config_lib.tuples(before[path]) != config_lib.tuples(now):
            raise UserError(f"config.{path}={now}: this run has {before[path]} so far; restore it, or say --other_data")
    if meta["data"] != setup.manifest["content_hash"]:
        raise UserError(
            f"config.data.dir={setup.config.data.dir} holds other data than this run had; restore it, or say --other_data"
        )


def warn_of_other_versions(meta: dict[str, Any]) -> None:
    """Logs which software has changed since a checkpoint was written: another compiler may round differently."""
    for name, version in digest.software_versions().items():
        if meta.get(name, version) != version:
            change = f"{meta[name][:12]} so far, now {version[:12]}"
            logging.warning("this run has used %s %s: it may not continue bit for bit", name, change)


def items_of(state: step_lib.TrainState) -> dict[str, Any]:
    """The parts of a state (or of its shapes) that a checkpoint holds, by name; the step is the checkpoint's own name."""
    items = state._asdict()
    return {name: items[name] for name in checkpoint.ITEMS if items[name] != ()}


def save(
    setup: Setup,
    checkpoints: checkpoint.Checkpoints,
    state: step_lib.TrainState,
    step: int,
    batch_digest: str,
    score: float | None = None,
) -> None:
    """Starts a checkpoint, and logs the digests by which two runs can be compared."""
    config = json.loads(config_lib.to_json(setup.config))
    meta = {"config": config, "data": setup.manifest["content_hash"], "score": score} | digest.software_versions()
    with jax.transfer_guard("allow"):
        digests = checkpoints.save(step, meta, **items_of(state))
    logging.info(
        "step %d  parameters digest: %s  batch digest: %s", step, digest.combine_hashes(digests["params"]), batch_digest
    )


def global_batches(setup: Setup, first: int) -> Iterator[Batch]:
    """Yields the batches from step `first` on as global arrays, spread over the devices of all processes."""
    batch_size, mesh = setup.config.data.batch_size, setup.run.mesh
    rows = sharding.rows_of_process(batch_size, mesh)
    for batch in setup.stream.batches(rows, start=first):
        yield sharding.to_global(batch, rows, batch_size, mesh)


def open_workdir(setup: Setup, first: int) -> metrics.Writer | None:
    """Process 0: writes the config and the tokenizer, all that a model needs, and opens the metrics. Others: None.

    Called after the checkpoint was restored: a run that is refused must not change the config that is there.
    """
    if jax.process_index() != 0:
        return None
    files.write_text(setup.workdir / "config.json", config_lib.to_json(setup.config))
    path = tokenizer.find(prepared.folders(setup.config.data.dir)[0])
    if path:
        path.copy(setup.workdir / path.name, overwrite=True)
    if prompts := prepared.prompts_of(setup.stream.records.manifest):
        files.write_text(setup.workdir / prepared.PROMPTS, json.dumps(prompts, indent=1))
    return metrics.Writer(setup.workdir, first, trackers.make_tracker(setup.config, setup.workdir))


class Due(NamedTuple):
    """When the loop does what.

    Attributes:
      config: of the run.
      first: the step at which this process began.
      end: the step at which it ends.
    """

    config: ConfigDict
    first: int
    end: int

    def evaluation(self, step: int, preempted: bool) -> bool:
        """Whether to evaluate at this step. A preempted run does not: it resumes at this very step and evaluates first."""
        every = self.config.eval_every
        return step == self.config.steps or (bool(every) and step % every == 0 and not preempted)

    def checkpoint(self, step: int) -> bool:
        """Whether to save at this step; what was just restored is not saved again."""
        every = self.config.checkpoint_every
        return step > self.first and bool(every) and step % every == 0


@contextlib.contextmanager
def paused(peers: Peers, log: LogLine, step: int) -> Iterator[None]:
    """Work beside the steps: the peers are told that this process may stand still, and the clock of pairs/s stops."""
    peers.at(step, busy=True)
    with log.paused():
        yield
    peers.at(step)


def train(
    setup: Setup,
    stop_at: int,
    peers: Peers = processes.ALONE,
    grace_seconds: int = 0,
    profile_steps: tuple[int, int] | None = None,
    began: float | None = None,
) -> int:
    """Trains until step `stop_at`, the end, or SIGTERM.

    The order of one turn is fixed: evaluate, save, next batch, step, write. The state is saved before the data advances, so
    that a checkpoint of step k and the batch of step k belong together.

    Args:
      setup: the run.
      stop_at: the step at which to save and end, if `config.steps` is later.
      peers: the other processes.
      grace_seconds: after SIGTERM, end without a save that takes longer; 0: wait for it.
      profile_steps: first and last step of a profile for TensorBoard.
      began: when this process began, in seconds of time.time(), for the run's goodput; None: now.

    Returns:
      The step reached.

    Raises:
      UserError: from `restore_or_init`, or guard.StoppedError: the run no longer trains.
    """
    config, run = setup.config, setup.run
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(contextlib.closing(checkpoint.Checkpoints(setup.workdir, config.keep)))
        preemption = processes.Preemption(grace_seconds)
        state = restore_or_init(setup, checkpoints)
        first = step = int(jax.device_get(state.step))
        due = Due(config, first, min(config.steps, stop_at))
        log = stack.enter_context(LogLine(config, run, first, open_workdir(setup, first), began or time.time()))
        profiler = stack.enter_context(Profiler(setup.workdir, profile_steps, first, due.end))
        batches = global_batches(setup, first)
        stack.enter_context(jax.transfer_guard("disallow"))  # an implicit copy between host and device is an error
        while True:
            checkpoints.check_saved()
            preempted = preemption.reached(step)
            stopping = preempted or step >= due.end
            scores: dict[str, float] = {}
            if setup.evaluate and due.evaluation(step, preempted):
                with paused(peers, log, step):
                    scores = setup.evaluate(state.params, step)
                    log.scores(step, scores)
            if stopping or due.checkpoint(step):
                log.flush()
                with paused(peers, log, step):
                    save(setup, checkpoints, state, step, log.batch_digest(), scores.get(config.keep_best))
                    if stopping:
                        checkpoints.wait()
            if stopping:
                return step
            peers.at(step, busy=step == first)  # the first step compiles, which takes minutes: that is no hang
            batch = next(batches)
            with profiler.step(step + 1, log.wait):
                state, values, z = run.train_step(state, batch)
                log.add(step := step + 1, values, z)


def replay(setup: Setup, number: int) -> None:
    """Finds the operation that made a NaN in step `number`, by running the step again.

    Restores the newest checkpoint before that step and runs the steps from there again, with jax_debug_nans on for step
    `number` alone. Logs that step's values if they have no NaN; writes nothing else.

    Raises:
      FloatingPointError: from the first operation that makes a NaN.
      UserError: `number` is below 1, or from `restore_or_init`.
    """
    if number < 1:
        raise UserError(f"--replay_step={number}: must be at least 1, the first step")
    with contextlib.closing(checkpoint.Checkpoints(setup.workdir, read_only=True)) as checkpoints:
        state = restore_or_init(setup._replace(strict=True), checkpoints, last=number - 1)
    restored_step = int(jax.device_get(state.step))
    batches = global_batches(setup, restored_step)
    for step in range(restored_step + 1, number + 1):
        batch = next(batches)
        if step == number:
            # Compiled for the steps before, it would overwrite its input, which JAX reads again to find the operation.
            jax.clear_caches()
        with jax.debug_nans(step == number):
            state, values, _ = setup.run.train_step(state, batch)
    shown = {name: jax.device_get(values[name].addressable_data(0)) for name in ("loss", "gradient_norm", "parameter_norm")}
    logging.info("replayed step %d, starting from the state of step %d: no NaN, %s", number, restored_step, shown)
    logging.info(
        "step %d  batch digest: %s", number, digest.hexadecimal(jax.device_get(values["batch_digest"].addressable_data(0)))
    )
