"""Measures memory and time of the loss and its gradient in tiles, beside the dense loss that stores all scores.

  python -m benchmarks.loss_memory                one device
  python -m benchmarks.loss_memory --devices=8    eight CPU devices

Memory is the compiler's temporary bytes per device. The dense loss is the textbook's: the matrix of logits and two
log-softmaxes. "ring all" has four directions in one softmax, hardness weights, masks and a guide as wide as the embeddings.
Where several are timed they take turns. Expect the time of the dense loss (0.96 × at 4,096 pairs, 1,024 wide), 1 %
more with masks, and memory that grows linearly with the batch (1.3 GB at 65,536 pairs, where the dense loss takes 103 GB).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags
from jax.sharding import Mesh, NamedSharding

from benchmarks import common
from contrastive_jax.config import default_config
from contrastive_jax.objectives import pairs
from contrastive_jax.objectives.objective import Given, PairIds
from contrastive_jax.runtime import sharding

DIM = flags.DEFINE_integer("dim", 1024, "Width of an embedding.")
DEVICES = flags.DEFINE_integer("devices", 1, "CPU devices.")
BATCHES = flags.DEFINE_list("batches", [str(2**i) for i in range(10, 17)], "Batch sizes, pairs.")
TIMED = flags.DEFINE_list("timed", ["1024", "2048", "4096"], "The batch sizes that are also run, not only compiled.")
REPEATS = flags.DEFINE_integer("repeats", 5, "Timed runs of each loss; the median counts.")
BLOCK = flags.DEFINE_integer("block", default_config().objective.block, "Rows and columns of a tile.")


MASKS = {"mask_same_document": True, "mask_duplicates": True}
ALL = MASKS | {"symmetric": False, "joint": ("document_query", "query_query", "document_document"), "hardness": 5.0}
ALL |= {"mask_guide": True, "mask_margin": 0.0}


def dense_loss(z: jax.Array, ids: PairIds, params: dict, given: Given) -> jax.Array:
    """Returns symmetric InfoNCE of z[b 2 e] from the whole matrix of logits."""
    del ids, given
    logits = z[:, 0] @ z[:, 1].T * jnp.exp(-params["log_temperature"])
    log_rows, log_columns = jax.nn.log_softmax(logits, axis=1), jax.nn.log_softmax(logits, axis=0)
    return -(jnp.diagonal(log_rows) + jnp.diagonal(log_columns)).mean() / 2


def make_loss(name: str, mesh: Mesh, **changes: Any) -> Any:
    """Returns the jitted function (z, ids, params, Given) → (loss, gradients); name: "dense", "gathered" or "ring"."""
    if name == "dense":
        return jax.jit(jax.value_and_grad(dense_loss, argnums=(0, 2)))
    config = pairs.pair_config(default_config())
    config.update(where=name, block=BLOCK.value, mask_same_document=False, mask_duplicates=False)
    config.update(changes)
    return common.loss_and_gradients(config, DIM.value, mesh)


def random_inputs(b: int, mesh: Mesh) -> tuple[Any, ...]:
    """Returns random z[b 2 e], ids of different documents, params, and a guide with the same embeddings."""
    z = jax.random.normal(jax.random.key(0), (b, 2, DIM.value))
    ids = PairIds(jnp.arange(b), jnp.arange(2 * b).reshape(b, 2))
    normalised = z / jnp.linalg.norm(z, axis=-1, keepdims=True)
    placed = jax.device_put((normalised, ids), NamedSharding(mesh, sharding.BATCH))
    params = jax.device_put({"log_temperature": jnp.log(0.05)}, sharding.replicated(mesh))
    return *placed, params, Given(placed[0])


def measure(losses: dict[str, Any], b: int, mesh: Mesh) -> str:
    """Returns the line of one batch size: memory of each loss and, for the sizes in --timed, time and ratios."""
    shapes = common.loss_shapes(b, DIM.value, mesh)
    programs = {name: loss.lower(*shapes, Given(shapes[0])).compile() for name, loss in losses.items()}
    megabytes = {name: program.memory_analysis().temp_size_in_bytes / 1e6 for name, program in programs.items()}
    if str(b) not in TIMED.value:
        return f"{b:>7}" + "".join(f"{megabytes[name]:,.0f} MB".rjust(11) + " " * 11 for name in losses)
    inputs = random_inputs(b, mesh)
    sides: dict[str, Callable[[], object]] = {
        name: functools.partial(lambda program: jax.block_until_ready(program(*inputs)), program)
        for name, program in programs.items()
    }
    medians = {name: 1000 * timing.median for name, timing in common.time_in_turns(sides, REPEATS.value).items()}
    cells = "".join(f"{megabytes[name]:,.0f} MB {medians[name]:>7,.0f} ms".rjust(22) for name in losses)
    ratios = [medians["ring"] / medians["dense"], *(medians[name] / medians["ring"] for name in ("ring masked", "ring all"))]
    return f"{b:>7}{cells}" + "".join(f"{ratio:>12.2f}" for ratio in ratios)


def main(argv: list[str]) -> None:
    """Prints a line per batch size."""
    del argv
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES.value)
    mesh = sharding.make_mesh(default_config().mesh)
    losses = {
        "dense": make_loss("dense", mesh),
        "gathered": make_loss("gathered", mesh),
        "ring": make_loss("ring", mesh),
        "ring masked": make_loss("ring", mesh, **MASKS),
        "ring all": make_loss("ring", mesh, **ALL),
    }
    print(f"dim {DIM.value}, {DEVICES.value} device(s), tiles of {BLOCK.value}; temporary MB per device, ms where timed")
    print(
        f"{'batch':>7}" + "".join(f"{name:>22}" for name in losses) + f"{'ring/dense':>12}{'masked/ring':>12}{'all/ring':>12}"
    )
    for b in map(int, BATCHES.value):
        print(measure(losses, b, mesh), flush=True)


if __name__ == "__main__":
    app.run(main)
