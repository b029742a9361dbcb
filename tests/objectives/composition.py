"""The table of losses: every kind, wherever it is scored and however embeddings are made, against the plain dense loss.

`tests/objectives/test_objective.py` checks it on CPU devices, `tests/accelerator` on what it finds.
"""

import functools
import itertools
from collections.abc import Callable

import dense
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from contrastive_jax.config import default_config
from contrastive_jax.models import encoder
from contrastive_jax.objectives import dense as dense_lib
from contrastive_jax.objectives import pairs
from contrastive_jax.objectives.losses import LOSSES
from contrastive_jax.objectives.objective import NOTHING, Given, Objective, PairIds
from contrastive_jax.runtime import sharding
from contrastive_jax.training import grad_cache
from contrastive_jax.training.views import Rows

B, E, LENGTH, VOCAB = 24, 16, 6, 40
TEMPERATURE = 0.005  # logits up to ±200


def objective_config(**changes: object) -> ConfigDict:
    config = pairs.pair_config(default_config())
    config.update(block=5, temperature=TEMPERATURE, temperature_min=TEMPERATURE)
    config.update(changes)
    return config


def make(config: ConfigDict, views: int = 2, mesh: jax.sharding.Mesh | None = None) -> Objective:
    return pairs.make_objective(config, views, E, mesh, sharding.BATCH_AXES if mesh else ())


def ids(views: int, seed: int = 0) -> PairIds:
    """Documents that come twice, a whole pair that comes twice, and spans that pairs share."""
    rng = np.random.default_rng(seed)
    text = rng.permutation(1000)[: B * views].reshape(B, views).astype(np.int32)
    text[5], text[7, 0], text[9, 1], text[11, 0], text[13, -1] = text[2], text[1, 0], text[3, 1], text[4, 1], text[6, 1]
    return PairIds(rng.integers(0, 15, B).astype(np.int32), text)


def embeddings(views: int, seed: int = 0) -> jax.Array:
    z = np.random.default_rng(seed).normal(size=(B, views, E))
    return jnp.asarray(z / np.linalg.norm(z, axis=-1, keepdims=True), jnp.float32)


def mesh_of(devices: int) -> jax.sharding.Mesh:
    config = default_config().mesh
    config.fsdp = 2 if devices > 1 else 1  # the batch is spread over two axes
    return sharding.make_mesh(config, jax.devices()[:devices])


def distance(got: jax.Array, expected: jax.Array) -> float:
    """Relative, in the Euclidean norm."""
    off, size = np.linalg.norm(np.asarray(got) - np.asarray(expected)), np.linalg.norm(np.asarray(expected))
    return float(off / size if size else off)


HOW, DEVICES, HARD, SIZES, MASKING = ("direct", "cached"), (1, 2, 4, 8), (0, 2), ("whole", "matryoshka"), ("plain", "masked")
PLACES = ("local", "gathered", "ring")
# Losses with what else changes them; "masked" has the guide's similarities where there is a guide.
HARDNESS = {"hardness": 20.0, "hardness_own": 10.0}
JOINT = {"symmetric": False, "joint": ("document_query", "query_query", "document_document")}
CHANGED: dict[str, tuple[str, dict]] = {name: (name, {}) for name in LOSSES} | {
    "joint": ("infonce", JOINT),
    "hardness": ("infonce", HARDNESS),
    "guided": ("infonce", {"mask_guide": True}),
    "siglip, changed": ("siglip", HARDNESS | {"mask_guide": True, "mask_relative": True}),
    "joint, changed": ("infonce", JOINT | HARDNESS | {"mask_guide": True, "mask_relative": True}),
}
TABLE = [
    case
    for case in itertools.product(CHANGED, PLACES, HOW, DEVICES, HARD, SIZES, MASKING)
    if not (LOSSES[CHANGED[case[0]][0]].average and case[5] == "matryoshka")
]
# In every run of the tests: each loss in each place, the other choices in turns.
COVER = [
    ("infonce", "ring", "direct", 8, 0, "whole", "masked"),
    ("infonce", "gathered", "cached", 4, 0, "matryoshka", "masked"),
    ("infonce", "local", "direct", 1, 2, "whole", "masked"),
    ("flatnce", "ring", "cached", 8, 2, "whole", "plain"),
    ("flatnce", "gathered", "direct", 2, 0, "matryoshka", "masked"),
    ("flatnce", "local", "cached", 8, 0, "whole", "masked"),
    ("dcl", "ring", "direct", 4, 2, "whole", "masked"),
    ("dcl", "gathered", "cached", 1, 2, "matryoshka", "plain"),
    ("dcl", "local", "direct", 8, 0, "whole", "masked"),
    ("siglip", "ring", "cached", 2, 0, "whole", "masked"),
    ("siglip", "gathered", "direct", 8, 2, "matryoshka", "masked"),
    ("siglip", "local", "cached", 4, 2, "whole", "plain"),
    ("dv", "ring", "direct", 8, 0, "whole", "masked"),
    ("dv", "gathered", "cached", 8, 2, "matryoshka", "plain"),
    ("dv", "local", "direct", 1, 0, "whole", "masked"),
    ("mine", "ring", "cached", 8, 2, "whole", "plain"),
    ("mine", "gathered", "direct", 1, 0, "whole", "masked"),
    ("mine", "local", "cached", 8, 0, "whole", "masked"),
    ("nwj", "ring", "direct", 8, 2, "whole", "masked"),
    ("nwj", "gathered", "cached", 1, 0, "matryoshka", "masked"),
    ("nwj", "local", "direct", 8, 0, "whole", "plain"),
    ("jsd", "ring", "cached", 8, 0, "matryoshka", "masked"),
    ("jsd", "gathered", "direct", 8, 0, "whole", "plain"),
    ("jsd", "local", "cached", 1, 2, "whole", "masked"),
    ("joint", "ring", "cached", 8, 2, "whole", "masked"),
    ("joint", "gathered", "direct", 4, 0, "matryoshka", "plain"),
    ("hardness", "ring", "direct", 8, 2, "whole", "plain"),
    ("guided", "ring", "cached", 4, 0, "matryoshka", "masked"),
    ("siglip, changed", "gathered", "cached", 8, 2, "whole", "masked"),
    ("joint, changed", "ring", "direct", 8, 2, "matryoshka", "masked"),
    ("joint, changed", "local", "cached", 4, 2, "whole", "masked"),
]


def composition_config(loss: str, where: str, hard: int, matryoshka: str, masking: str) -> ConfigDict:
    name, changes = CHANGED[loss]
    config = objective_config(name=name, where=where, hard_negatives=hard, bias=-3.0, **changes)
    config.hardness_own *= hard > 0
    if loss == "nwj":  # it is an exponential itself, and e^200 is no float32
        config.temperature = 0.2
    config.matryoshka = ((7, 0.5), (E, 1.0)) if matryoshka == "matryoshka" else ()
    config.update(mask_same_document=masking == "masked", mask_duplicates=masking == "masked")
    config.mask_margin = 0.3 if masking == "masked" else None
    if masking == "plain":
        config.update(mask_guide=False, mask_relative=False)
    return config


def guide(views: int) -> jax.Array:
    """Unit vectors [b v 5] of another model, whose similarities have nothing to do with ours."""
    return dense_lib.normalize(embeddings(views, seed=9)[..., :5])


@functools.cache
def small_encoder() -> tuple[encoder.Encoder, dict]:
    """Embeddings, dropout, a norm and a projector."""
    config = default_config().model
    config.update(
        num_layers=0, d_model=12, embedding_dim=E, dropout=0.2, init_std=1.0, position="none", norm="rmsnorm", bias=False
    )
    model = encoder.make_encoder(config, VOCAB)
    return model, model.init(jax.random.key(0))


def rows_of(views: int) -> Rows:
    rng = np.random.default_rng(1)
    size = rng.integers(1, LENGTH + 1, (B, views, 1, 1))
    tokens = rng.integers(0, VOCAB, (B, views, 1, LENGTH)).astype(np.int32)
    row = np.arange(B * views, dtype=np.int32).reshape(B, views, 1)
    return Rows(tokens, (np.arange(LENGTH) < size).astype(np.int32), row)


def encode(params: dict, rows: Rows) -> jax.Array:
    b, v = rows.tokens.shape[:2]
    flat = jax.tree.map(lambda x: x.reshape(b * v, *x.shape[3:]), rows)
    return small_encoder()[0].apply(params, flat.tokens, flat.segment, jax.random.key(7), flat.row).reshape(b, v, -1)


def value_and_gradients(encode: Callable, loss: Callable) -> Callable:
    """Of (parameters, a nudge of the embeddings [b v e], rows, ids, what the memory gives)."""

    def value(params: dict, nudge: jax.Array, rows: Rows, ids: PairIds, given: Given) -> jax.Array:
        return loss(encode(params["encoder"], rows) + nudge, ids, params["objective"], given)

    return jax.jit(jax.value_and_grad(value, argnums=(0, 1)))


def computed(
    make: Callable[[jax.sharding.Mesh], Objective], views: int, how: str, devices: int, host: PairIds, given: Given = NOTHING
) -> tuple:
    """Loss and gradients of an objective on so many devices."""
    mesh = mesh_of(devices)
    objective = make(mesh)
    embed = grad_cache.cached(encode, 16, mesh, sharding.BATCH_AXES) if how == "cached" else encode  # 16 + 8: a ragged end
    params = {"encoder": small_encoder()[1], "objective": objective.init(jax.random.key(0))}
    nudge = np.zeros((B, views, E), np.float32)
    spread = sharding.to_global((nudge, rows_of(views), host, given), np.arange(B), B, mesh)
    return value_and_gradients(embed, lambda *arguments: objective.loss(*arguments)[0])(params, *spread)


@functools.cache
def expected(loss: str, shards: int, hard: int, matryoshka: str, masking: str) -> tuple:
    """Loss and gradients; and the sums of absolute values of what loss and objective's gradients are sums of."""
    config, views = composition_config(loss, "gathered", hard, matryoshka, masking), 2 + hard

    def plain(z: jax.Array, _: PairIds, params: dict, given: Given) -> jax.Array:
        return dense.loss(config, z, ids(views), params, shards, given.z)

    params = {"encoder": small_encoder()[1], "objective": make(config, views).init(jax.random.key(0))}
    z = encode(params["encoder"], rows_of(views))

    def parts(params: dict) -> jax.Array:
        return dense.parts(config, z, ids(views), params, shards, guide(views))

    sizes = jax.tree.map(
        lambda x: float(jnp.abs(x).sum()), (parts(params["objective"]), jax.jacfwd(parts)(params["objective"]))
    )
    nudge = jnp.zeros((B, views, E))
    return *value_and_gradients(encode, plain)(params, nudge, rows_of(views), ids(views), Given(guide(views))), sizes


def check_composition(loss: str, where: str, how: str, devices: int, hard: int, matryoshka: str, masking: str) -> None:
    config, views = composition_config(loss, where, hard, matryoshka, masking), 2 + hard
    given = Given(np.asarray(guide(views)))
    got = computed(functools.partial(make, config, views), views, how, devices, ids(views), given)
    value, gradients, sizes = expected(loss, devices if where == "local" else 1, hard, matryoshka, masking)
    assert abs(got[0] - value) < 1e-6 * max(abs(value), 0.1 * sizes[0])
    # A number that is a sum over rows may cancel (to 1e-6 of its terms, in one cell, where the float32 reference itself is 5 %
    # off its float64 twin): then its error is relative to a part of the terms.
    scalars = [x[0]["objective"] for x in (got[1], gradients)]
    assert all(
        abs(scalars[0][name] - scalars[1][name]) <= 1e-5 * max(abs(scalars[1][name]), 0.01 * size)
        for name, size in sizes[1].items()
    ), scalars
    far = jax.tree.map(distance, *[(x[0]["encoder"], x[1]) for x in (got[1], gradients)])
    assert max(jax.tree.leaves(far)) < 1e-5, far
