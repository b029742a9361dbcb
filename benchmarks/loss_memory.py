"""Memory and time of the loss and its gradient: tiles, gathered or in a ring, beside the dense loss that stores all scores.

  python benchmarks/loss_memory.py                one device
  python benchmarks/loss_memory.py --devices=8    eight of the CPU's

Temporary bytes of a device are the compiler's (`compiled.memory_analysis()`); the dense loss is the textbook's: logits, and
two log-softmaxes. Dense and tiled take turns where both are timed, and the ratio is that of the medians.
"""

import functools
import pathlib
import statistics
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags
from jax.sharding import NamedSharding

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
from configs import base
from contrastive_jax import sharding
from contrastive_jax.objectives import pairs

DIM = flags.DEFINE_integer("dim", 1024, "Width of an embedding.")
DEVICES = flags.DEFINE_integer("devices", 1, "CPU devices.")
BATCHES = flags.DEFINE_list("batches", [str(2**i) for i in range(10, 17)], "Pairs of a batch.")
TIMED = flags.DEFINE_list("timed", ["1024", "2048", "4096"], "Batches that are run too, not only compiled.")
REPEATS = flags.DEFINE_integer("repeats", 5, "Runs of each; the median counts.")
BLOCK = flags.DEFINE_integer("block", base.get_config().objective.block, "Rows and columns of a tile.")


def dense(z: jax.Array, ids: dict, params: dict) -> jax.Array:
    """Symmetric InfoNCE with the whole matrix."""
    logits = z[:, 0] @ z[:, 1].T * jnp.exp(-params["log_temperature"])
    log_rows, log_columns = jax.nn.log_softmax(logits, axis=1), jax.nn.log_softmax(logits, axis=0)
    return -(jnp.diagonal(log_rows) + jnp.diagonal(log_columns)).mean() / 2


def make(name: str, mesh: jax.sharding.Mesh, masked: bool) -> Any:
    """(z, ids, params) → (loss, gradients), jitted."""
    if name == "dense":
        return jax.jit(jax.value_and_grad(dense, argnums=(0, 2)))
    config = base.get_config().objective
    config.update(where=name, block=BLOCK.value, mask_same_document=masked, mask_duplicates=masked)
    objective = pairs.make(config, 2, DIM.value, mesh, sharding.BATCH[0])
    return jax.jit(jax.value_and_grad(lambda *arguments: objective.loss(*arguments)[0], argnums=(0, 2)))


def shapes(b: int, mesh: jax.sharding.Mesh) -> tuple[Any, ...]:
    """What the loss takes, as shapes."""
    rows = NamedSharding(mesh, sharding.BATCH)
    struct = functools.partial(jax.ShapeDtypeStruct, sharding=rows)
    ids = {"doc": struct((b,), jnp.int32), "text": struct((b, 2), jnp.int32)}
    return struct((b, 2, DIM.value), jnp.float32), ids, {"log_temperature": jax.ShapeDtypeStruct((), jnp.float32)}


def values(b: int, mesh: jax.sharding.Mesh) -> tuple[Any, ...]:
    """The same, filled."""
    rows = NamedSharding(mesh, sharding.BATCH)
    z = jax.random.normal(jax.random.key(0), (b, 2, DIM.value))
    ids = {"doc": jnp.arange(b), "text": jnp.arange(2 * b).reshape(b, 2)}
    placed = jax.device_put((z / jnp.linalg.norm(z, axis=-1, keepdims=True), ids), rows)
    return *placed, {"log_temperature": jnp.log(0.05)}


def main(argv: list[str]) -> None:
    """Prints a line a batch."""
    del argv
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES.value)
    mesh = sharding.make_mesh(base.get_config().mesh)
    losses = {
        "dense": make("dense", mesh, False),
        "gathered": make("gathered", mesh, False),
        "ring": make("ring", mesh, False),
        "ring masked": make("ring", mesh, True),
    }
    print(f"dim {DIM.value}, {DEVICES.value} device(s), tiles of {BLOCK.value}; temporary MB a device, ms where timed")
    print(f"{'batch':>7}" + "".join(f"{name:>22}" for name in losses) + f"{'ring/dense':>12}{'masked/ring':>12}")
    for b in map(int, BATCHES.value):
        programs = {name: loss.lower(*shapes(b, mesh)).compile() for name, loss in losses.items()}
        size = {name: program.memory_analysis().temp_size_in_bytes / 1e6 for name, program in programs.items()}
        spent: dict[str, list[float]] = {name: [] for name in losses}
        if str(b) in TIMED.value:
            inputs = values(b, mesh)
            for turn in range(REPEATS.value + 1):
                for name, program in programs.items():
                    begin = time.perf_counter()
                    jax.block_until_ready(program(*inputs))
                    if turn:
                        spent[name].append(1000 * (time.perf_counter() - begin))
        median = {name: statistics.median(of) if of else None for name, of in spent.items()}
        cells = [f"{size[name]:,.0f} MB" + (f" {median[name]:>7,.0f} ms" if median[name] else " " * 11) for name in losses]
        line = f"{b:>7}" + "".join(f"{cell:>22}" for cell in cells)
        if median["dense"] and median["ring"] and median["ring masked"]:
            line += f"{median['ring'] / median['dense']:>12.2f}{median['ring masked'] / median['ring']:>12.2f}"
        print(line, flush=True)


if __name__ == "__main__":
    app.run(main)
