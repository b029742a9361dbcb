"""Memory and time of the whole train step in micro-batches (gradient caching), against the batch size.

  python benchmarks/grad_cache.py

The debug recipe's step. Temporary bytes are the compiler's. "Data" is what has to grow: four times the embeddings and the
tokens of the batch. Time is that of a pair, cached over direct, the two taking turns at one batch; theory says 4/3 (a forward
pass more).
"""

import pathlib
import statistics
import sys
import time
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
from configs import debug
from contrastive_jax import build, sharding

VOCAB = 8192
MICRO_BATCH = flags.DEFINE_integer("micro_batch", 256, "Pairs of a micro-batch.")
BATCHES = flags.DEFINE_list("batches", ["256", "512", "1024", "2048", "4096"], "Pairs of a batch.")
TIMED = flags.DEFINE_integer("timed", 1024, "The batch at which cached and direct are timed; 0: none.")
REPEATS = flags.DEFINE_integer("repeats", 3, "Steps of each; the median counts.")


def make(batch: int, micro_batch: int) -> build.Run:
    """The run of the debug recipe with these sizes."""
    config = debug.get_config()
    config.data.batch_size, config.micro_batch = batch, micro_batch
    return build.build(config, sharding.make_mesh(config.mesh), VOCAB)


def temporaries(run: build.Run, batch: int) -> int:
    """Temporary bytes of the step, compiled ahead of time."""
    config = debug.get_config()
    config.data.batch_size = batch
    step: Any = run.train_step
    return step.lower(run.shapes, build.batch_shapes(config, run.mesh)).compile().memory_analysis().temp_size_in_bytes


def main(argv: list[str]) -> None:
    """Prints memory by batch, then the ratio of times."""
    del argv
    logging.set_verbosity(logging.WARNING)
    jax.config.update("jax_platforms", "cpu")
    config = debug.get_config()
    length, dim = config.data.length, config.model.d_model
    micro, first = MICRO_BATCH.value, 0.0
    print(f"debug recipe, micro-batch {micro}; MB")
    print(f"{'batch':>7}{'direct':>10}{'cached':>10}{'grown by':>10}{'4 × data':>10}")
    for batch in map(int, BATCHES.value):
        sizes = [temporaries(make(batch, m), batch) / 1e6 for m in (0, micro)]
        first = first or sizes[1]
        # Embeddings float32 [v e]; tokens and segment int32 [v l].
        data = (batch - int(BATCHES.value[0])) * 2 * (4 * dim + 8 * length) / 1e6
        print(f"{batch:>7}{sizes[0]:>10,.0f}{sizes[1]:>10,.0f}{sizes[1] - first:>10,.1f}{4 * data:>10,.1f}", flush=True)

    b = TIMED.value
    if not b:
        return
    rng = np.random.default_rng(0)
    host = {
        "tokens": rng.integers(8, VOCAB, (b, 2, length)).astype(np.int32),
        "segment": np.ones((b, 2, length), np.int32),
        "doc": np.arange(b, dtype=np.int32),
        "text": np.arange(2 * b, dtype=np.int32).reshape(b, 2),
    }
    runs = [make(b, 0), make(b, micro)]
    states = [run.init() for run in runs]
    times: list[list[float]] = [[], []]
    for turn in range(REPEATS.value + 1):
        for i, run in enumerate(runs):
            given = sharding.to_global(host, np.arange(b), b, run.mesh)
            begin = time.perf_counter()
            states[i], metrics, _ = run.train_step(states[i], given)
            jax.block_until_ready((states[i], metrics))
            if turn:
                times[i].append(time.perf_counter() - begin)
    direct, cached = map(statistics.median, times)
    print(f"batch {b}: direct {1000 * direct / b:.2f} ms a pair, cached {1000 * cached / b:.2f}, ratio {cached / direct:.2f}")


if __name__ == "__main__":
    app.run(main)
