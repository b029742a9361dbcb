"""Measures memory and time of the whole train step in micro-batches (gradient caching) against the batch size.

  python -m benchmarks.grad_cache

Compiles the step of the debug recipe. "Direct" encodes the batch at once, "cached" in micro-batches; both columns are the
compiler's temporary memory. "Grown by" is the growth of the cached step since the first batch size, beside four times the data
that have to grow with the batch: embeddings and tokens. Expect cached memory to stay almost constant (929 MB at 4,096 pairs,
where direct takes 15 GB), and at most 4/3 of the direct time: one more forward pass.
"""

from collections.abc import Callable
from typing import Any

import jax
from absl import app, flags, logging

from benchmarks import common
from contrastive_jax.runtime import sharding
from contrastive_jax.training import build

VOCAB_SIZE = 8192
MICRO_BATCH = flags.DEFINE_integer("micro_batch", 256, "Pairs per micro-batch.")
BATCHES = flags.DEFINE_list("batches", ["256", "512", "1024", "2048", "4096"], "Batch sizes, pairs.")
TIMED = flags.DEFINE_integer("timed", 1024, "The batch size at which cached and direct are timed; 0: none.")
REPEATS = flags.DEFINE_integer("repeats", 3, "Timed steps of each; the median counts.")


def make_run(batch_size: int, micro_batch: int) -> tuple[build.Run, Any]:
    """Returns the run of the debug recipe with these sizes, and its config."""
    config = common.load_recipe("debug")
    config.data.batch_size, config.micro_batch = batch_size, micro_batch
    return build.build(config, sharding.make_mesh(config.mesh), VOCAB_SIZE), config


def temporary_bytes(batch_size: int, micro_batch: int) -> int:
    """Returns the temporary memory of the compiled step."""
    run, config = make_run(batch_size, micro_batch)
    step: Any = run.train_step
    return step.lower(run.shapes, build.batch_shapes(config, run.mesh)).compile().memory_analysis().temp_size_in_bytes


def make_stepper(batch_size: int, micro_batch: int) -> Callable[[], None]:
    """Returns a function that takes one step on random tokens and waits for it."""
    run, config = make_run(batch_size, micro_batch)
    tokens = common.random_tokens(config, VOCAB_SIZE)
    state = run.init()

    def take_step() -> None:
        nonlocal state
        state, metrics, _ = run.train_step(state, common.global_batch(tokens, run.mesh))
        jax.block_until_ready((state, metrics))

    return take_step


def main(argv: list[str]) -> None:
    """Prints a line per batch size, then the ratio of the times."""
    del argv
    logging.set_verbosity(logging.WARNING)
    jax.config.update("jax_platforms", "cpu")
    config = common.load_recipe("debug")
    batches, micro_batch = [int(size) for size in BATCHES.value], MICRO_BATCH.value
    bytes_per_pair = 2 * (
        4 * config.model.d_model + 8 * config.data.length
    )  # embedding float32[e], tokens and segment int32[l]
    print(f"debug recipe, micro-batch {micro_batch}; MB")
    print(f"{'batch':>7}{'direct':>10}{'cached':>10}{'grown by':>10}{'4 × data':>10}")
    first = None
    for batch_size in batches:
        direct, cached = (temporary_bytes(batch_size, size) / 1e6 for size in (0, micro_batch))
        first = cached if first is None else first
        data = 4 * (batch_size - batches[0]) * bytes_per_pair / 1e6
        print(f"{batch_size:>7}{direct:>10,.0f}{cached:>10,.0f}{cached - first:>10,.1f}{data:>10,.1f}", flush=True)
    if not TIMED.value:
        return
    steppers = {"direct": make_stepper(TIMED.value, 0), "cached": make_stepper(TIMED.value, micro_batch)}
    milliseconds = {
        name: 1000 * timing.median / TIMED.value for name, timing in common.time_in_turns(steppers, REPEATS.value).items()
    }
    direct, cached = milliseconds["direct"], milliseconds["cached"]
    print(f"batch {TIMED.value}: direct {direct:.2f} ms per pair, cached {cached:.2f}, ratio {cached / direct:.2f}")


if __name__ == "__main__":
    app.run(main)
