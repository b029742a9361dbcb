"""Times a step whose queries have short rows (data.query_length) beside one that pads them to the length of documents.

python -m benchmarks.query_length                    8 pairs, queries of 32 tokens, documents of 512, six layers of width 384
"""

import argparse
import functools

import jax
import numpy as np
from ml_collections import ConfigDict

from benchmarks import common
from contrastive_jax.data.batch import Batch
from contrastive_jax.runtime import sharding
from contrastive_jax.training import build


def make_step(config: ConfigDict, query: int) -> functools.partial:
    """Returns the function that runs one step on random tokens and waits for it."""
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    run, shapes = build.build(config, mesh, 8192), build.batch_shapes(config, mesh)
    rng, b = np.random.default_rng(0), config.data.batch_size
    tokens = rng.integers(8, 8192, shapes.tokens.shape).astype(np.int32)
    tokens[:, 0, :, query:] = 0
    numbers = np.arange(b, dtype=np.int32)
    host = Batch(
        tokens, (tokens > 0).astype(np.int32), numbers, rng.integers(1, 1 << 30, shapes.span_hash.shape).astype(np.int32)
    )
    host = host._replace(label=np.zeros(b, np.float32), scores=np.zeros(shapes.scores.shape, np.float32))
    batch, state = sharding.to_global(host, numbers, b, mesh), [run.init()]

    def step() -> None:
        state[0], metrics, _ = run.train_step(state[0], batch)
        jax.block_until_ready(metrics)

    return functools.partial(step)


def main() -> None:
    """Prints the seconds of both steps, and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--query", type=int, default=32, help="tokens of a row of queries")
    parser.add_argument("--document", type=int, default=512, help="tokens of a row of documents")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    sides = {}
    for name, short in (("short rows", arguments.query), ("padded", 0)):
        config = common.load_recipe("finetune")
        config.model.update(num_layers=6, d_model=384, num_heads=12, num_kv_heads=12, head_dim=32, d_ff=1536, max_length=512)
        config.data.update(batch_size=arguments.pairs, views=2, hard_negatives=0, query_length=short)
        config.data.update(length=arguments.document, max_span=arguments.document - 2)
        sides[name] = make_step(config, arguments.query)
    timings = common.time_in_turns(sides, arguments.repeats)
    for name, timing in timings.items():
        print(f"{name:<12}{timing.median:8.2f} s per step")
    print(f"ratio {timings['short rows'].median / timings['padded'].median:.2f}")


if __name__ == "__main__":
    main()
