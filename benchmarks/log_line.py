"""Measures how long a log line holds the main thread, and how long its work takes in the thread of process 0.

python -m benchmarks.log_line                    the statistics of 1,024 embeddings of width 768
"""

import argparse
import statistics
import tempfile
import time

import jax
import numpy as np
from etils import epath

from benchmarks.common import load_recipe
from contrastive_jax.runtime import sharding
from contrastive_jax.training import build, log_line, metrics


def main() -> None:
    """Prints both times in milliseconds, medians over the lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=20)
    parser.add_argument("--width", type=int, default=768, help="of an embedding")
    arguments = parser.parse_args()
    config = load_recipe("bag")
    config.update(log_every=1, steps=10_000)
    config.guard.warmup_steps = 10_000  # random embeddings are not judged
    run = build.build(config, sharding.make_mesh(config.mesh), vocab_size=8192)
    z = np.random.default_rng(0).normal(size=(log_line.SAMPLE, 2, arguments.width)).astype(np.float32)
    z = jax.device_put(z / np.linalg.norm(z, axis=-1, keepdims=True), jax.NamedSharding(run.mesh, sharding.BATCH))
    names = ("loss", "in_batch_top1", "temperature", "gradient_norm", "parameter_norm", "tokens", "fill")
    values = dict.fromkeys(names, np.float32(1)) | {"skipped": np.bool_(False), "batch_digest": np.zeros(4, np.uint32)}
    values = jax.device_put(values, sharding.replicated(run.mesh))
    main_thread, thread = [], []
    with tempfile.TemporaryDirectory() as folder:
        writer = metrics.Writer(epath.Path(folder), 0)
        with log_line.LogLine(config, run, 0, writer, time.time()) as log:
            for step in range(1, arguments.lines + 3):
                began = time.perf_counter()
                log.add(step, values, z)
                handed_over = time.perf_counter()
                log.flush()
                main_thread.append(handed_over - began)
                thread.append(time.perf_counter() - handed_over)
    for name, seconds in (("main thread", main_thread), ("thread of process 0", thread)):
        print(f"{name:<22}{1000 * statistics.median(seconds[2:]):8.1f} ms per line")


if __name__ == "__main__":
    main()
