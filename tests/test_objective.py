"""Losses: every kind, wherever it is computed and however embeddings are made, equals the plain dense one."""

import functools
import itertools
import types
from collections.abc import Callable

import dense
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import base
from contrastive_jax import grad_cache, sharding
from contrastive_jax.models import encoder
from contrastive_jax.objectives import distributed, pairs

B, E, LENGTH, VOCAB = 24, 16, 6, 40
TEMPERATURE = 0.005  # logits up to ±200


def objective_config(**changes: object) -> ConfigDict:
    config = base.get_config().objective
    config.update(block=5, temperature=TEMPERATURE, temperature_min=TEMPERATURE)
    config.update(changes)
    return config


def make(config: ConfigDict, views: int = 2, mesh: jax.sharding.Mesh | None = None) -> pairs.Objective:
    return pairs.make(config, views, E, mesh, sharding.BATCH[0] if mesh else ())


def ids(views: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Documents that come twice, a whole row that comes twice, and texts that rows share."""
    rng = np.random.default_rng(seed)
    text = rng.permutation(1000)[: B * views].reshape(B, views).astype(np.int32)
    text[5], text[7, 0], text[9, 1], text[11, 0], text[13, -1] = text[2], text[1, 0], text[3, 1], text[4, 1], text[6, 1]
    return {"doc": rng.integers(0, 15, B).astype(np.int32), "text": text}


def embeddings(views: int, seed: int = 0) -> jax.Array:
    z = np.random.default_rng(seed).normal(size=(B, views, E))
    return jnp.asarray(z / np.linalg.norm(z, axis=-1, keepdims=True), jnp.float32)


def mesh_of(devices: int) -> jax.sharding.Mesh:
    config = base.get_config().mesh
    config.fsdp = 2 if devices > 1 else 1  # the batch is spread over two axes
    return sharding.make_mesh(config, jax.devices()[:devices])


def distance(got: jax.Array, expected: jax.Array) -> float:
    """Relative, in the Euclidean norm."""
    return float(np.linalg.norm(np.asarray(got) - np.asarray(expected)) / np.linalg.norm(np.asarray(expected)))


# --- the composition table -----------------------------------------------------------------------------------------------

HOW, DEVICES, HARD, SIZES, MASKING = ("direct", "cached"), (1, 2, 4, 8), (0, 2), ("whole", "matryoshka"), ("plain", "masked")
PLACES = ("local", "gathered", "ring")
TABLE = list(itertools.product(pairs.LOSSES, PLACES, HOW, DEVICES, HARD, SIZES, MASKING))
# In every run of the tests: each loss in each place, the other choices in turns.
COVER = [
    (loss, place, HOW[i % 2], (8, 4, 1, 8, 2)[i % 5], HARD[i // 2 % 2], SIZES[i % 3 % 2], MASKING[i % 4 // 3 - 1])
    for i, (loss, place) in enumerate(itertools.product(pairs.LOSSES, PLACES[::-1]))
]


def composition_config(loss: str, where: str, hard: int, matryoshka: str, masking: str) -> ConfigDict:
    config = objective_config(name=loss, where=where, hard_negatives=hard, bias=-3.0)
    config.matryoshka = ((7, 0.5), (E, 1.0)) if matryoshka == "matryoshka" else ()
    config.update(mask_same_document=masking == "masked", mask_duplicates=masking == "masked")
    config.mask_margin = 0.3 if masking == "masked" else None
    return config


@functools.cache
def small_encoder() -> tuple[encoder.Encoder, dict]:
    """Embeddings, dropout, a norm and a projector."""
    config = base.get_config().model
    config.update(
        num_layers=0, d_model=12, embedding_dim=E, dropout=0.2, init_std=1.0, position="none", norm="rmsnorm", bias=False
    )
    model = encoder.make(config, VOCAB, LENGTH)
    return model, model.init(jax.random.key(0))


def texts(views: int) -> dict[str, jax.Array]:
    rng = np.random.default_rng(1)
    size = rng.integers(1, LENGTH + 1, (B, views, 1))
    tokens = rng.integers(0, VOCAB, (B, views, LENGTH)).astype(np.int32)
    row = np.arange(B * views, dtype=np.int32).reshape(B, views)
    return {"tokens": tokens, "segment": (np.arange(LENGTH) < size).astype(np.int32), "row": row}


def encode(params: dict, batch: dict[str, jax.Array]) -> jax.Array:
    b, v, _ = batch["tokens"].shape
    flat = (batch[name].reshape(b * v, *batch[name].shape[2:]) for name in ("tokens", "segment"))
    return small_encoder()[0].apply(params, *flat, jax.random.key(7), batch["row"].reshape(-1)).reshape(b, v, -1)


def value_and_gradients(encode: Callable, loss: Callable) -> Callable:
    """Of (parameters, a nudge of the embeddings [b v e], arrays of the batch)."""

    def value(params: dict, nudge: jax.Array, batch: dict) -> jax.Array:
        z = encode(params["encoder"], {name: batch[name] for name in ("tokens", "segment", "row")}) + nudge
        return loss(z, {name: batch[name] for name in ("doc", "text")}, params["objective"])

    return jax.jit(jax.value_and_grad(value, argnums=(0, 1)))


@functools.cache
def expected(loss: str, shards: int, hard: int, matryoshka: str, masking: str) -> tuple:
    """Loss and gradients; and the sums of absolute values of what loss and objective's gradients are sums of."""
    config, views = composition_config(loss, "gathered", hard, matryoshka, masking), 2 + hard
    host = ids(views)

    def plain(z: jax.Array, _: dict, params: dict) -> jax.Array:
        return dense.loss(config, z, host["doc"], host["text"], params, shards)

    params = {"encoder": small_encoder()[1], "objective": make(config, views).init(jax.random.key(0))}
    z = encode(params["encoder"], texts(views))

    def parts(params: dict) -> jax.Array:
        return dense.parts(config, z, host["doc"], host["text"], params, shards)

    sizes = jax.tree.map(
        lambda x: float(jnp.abs(x).sum()), (parts(params["objective"]), jax.jacfwd(parts)(params["objective"]))
    )
    return *value_and_gradients(encode, plain)(params, jnp.zeros((B, views, E)), texts(views) | host), sizes


def check_composition(loss: str, where: str, how: str, devices: int, hard: int, matryoshka: str, masking: str) -> None:
    config, views, mesh = composition_config(loss, where, hard, matryoshka, masking), 2 + hard, mesh_of(devices)
    objective = make(config, views, mesh)
    embed = grad_cache.cached(encode, 16, mesh, sharding.BATCH[0]) if how == "cached" else encode  # 16 + 8: a ragged end
    params = {"encoder": small_encoder()[1], "objective": objective.init(jax.random.key(0))}
    nudge = np.zeros((B, views, E), np.float32)
    batch = sharding.to_global(texts(views) | ids(views) | {"nudge": nudge}, np.arange(B), B, mesh)
    got = value_and_gradients(embed, lambda *arguments: objective.loss(*arguments)[0])(params, batch.pop("nudge"), batch)
    value, gradients, sizes = expected(loss, devices if where == "local" else 1, hard, matryoshka, masking)
    assert abs(got[0] - value) < 1e-6 * max(abs(value), 0.1 * sizes[0])
    # A number that is a sum over rows may cancel (to 1e-6 of its terms, in one cell, where the float32 reference itself is 5 %
    # off its float64 twin): then its error is relative to a part of the terms.
    scalars = [x[0]["objective"] for x in (got[1], gradients)]
    assert all(
        abs(scalars[0][name] - scalars[1][name]) < 1e-5 * max(abs(scalars[1][name]), 0.01 * size)
        for name, size in sizes[1].items()
    ), scalars
    far = jax.tree.map(distance, *[(x[0]["encoder"], x[1]) for x in (got[1], gradients)])
    assert max(jax.tree.leaves(far)) < 1e-5, far


def name_of(case: tuple) -> str:
    return "-".join(map(str, case))


@pytest.mark.parametrize("case", COVER, ids=name_of)
def test_composition(case: tuple) -> None:
    check_composition(*case)


@pytest.mark.slow
@pytest.mark.parametrize("case", TABLE, ids=name_of)
def test_composition_whole(case: tuple) -> None:
    check_composition(*case)


def test_the_logits_of_the_table_are_large() -> None:
    z = encode(small_encoder()[1], texts(2))
    logits = z[:, 0] @ z[:, 1].T / TEMPERATURE
    assert logits.max() > 150 and logits.min() < -100


# --- options ---------------------------------------------------------------------------------------------------------------


def compare(config: ConfigDict, views: int, value: float = 1e-6, gradient: float = 1e-5, devices: int = 4) -> None:
    z, host, mesh = embeddings(views), ids(views), mesh_of(devices)
    spread = make(config, views, mesh)
    params = spread.init(jax.random.key(0))
    batch = sharding.to_global(host | {"z": np.asarray(z)}, np.arange(B), B, mesh)
    z_there = batch.pop("z")
    got = jax.jit(jax.value_and_grad(lambda z, p: spread.loss(z, batch, p)[0], argnums=(0, 1)))(z_there, params)
    plain = jax.jit(jax.value_and_grad(lambda z, p: dense.loss(config, z, host["doc"], host["text"], p), argnums=(0, 1)))(
        z, params
    )
    assert distance(got[0], plain[0]) < value
    far = jax.tree.map(distance, got[1], plain[1])
    assert max(jax.tree.leaves(far)) < gradient, far


@pytest.mark.parametrize(
    ("changes", "views"),
    [
        ({"symmetric": False, "where": "ring"}, 2),
        ({"label_smoothing": 0.1, "where": "ring"}, 2),
        ({"label_smoothing": 0.1, "symmetric": False}, 2),
        ({"where": "ring"}, 4),  # three positives
        ({"hard_negatives": 1, "where": "gathered", "name": "dcl"}, 4),
        ({"mask_margin": 0.05, "where": "ring"}, 2),
        ({"name": "siglip", "mask_margin": 0.1}, 3),
        ({"block": 1000, "temperature": 0.07}, 2),
    ],
)
def test_option_equals_the_dense_loss(changes: dict, views: int) -> None:
    compare(objective_config(**changes), views)


@pytest.mark.parametrize("loss", pairs.LOSSES)
def test_bfloat16_embeddings(loss: str) -> None:
    """Unit vectors rounded to 8 bits: at temperature 0.07 the loss moves by less than 1 %, its gradients by less than 3 %."""
    compare(objective_config(name=loss, dtype="bfloat16", where="ring", temperature=0.07, bias=-3.0), 2, 0.01, 0.03)


def test_mesh_with_a_tensor_axis() -> None:
    config = base.get_config().mesh
    config.update(data=2, fsdp=2, tensor=2)
    mesh, host = sharding.make_mesh(config), ids(2)
    batch = sharding.to_global(host | {"z": np.asarray(embeddings(2))}, np.arange(B), B, mesh)
    objective = make(objective_config(where="ring"), 2, mesh)
    got = jax.jit(lambda z, p: objective.loss(z, batch, p)[0])(batch["z"], objective.init(jax.random.key(0)))
    params = objective.init(jax.random.key(0))
    np.testing.assert_allclose(got, dense.loss(objective_config(), embeddings(2), host["doc"], host["text"], params), rtol=1e-6)


def test_gradient_equals_differences_of_the_dense_loss() -> None:
    """The reference itself, against float64 differences."""
    config, host = objective_config(temperature=0.05), ids(2)
    params = make(config).init(jax.random.key(0))
    gradient = jax.grad(lambda z: dense.loss(config, z, host["doc"], host["text"], params))(embeddings(2))
    with jax.enable_x64(True):
        z, wide = np.asarray(embeddings(2), np.float64), {"log_temperature": jnp.asarray(np.log(0.05), jnp.float64)}
        for place in [(0, 0, 0), (3, 1, 4), (23, 0, 9), (11, 1, 2)]:
            step = np.zeros(z.shape)
            step[place] = 1e-6
            high, low = (dense.loss(config, jnp.asarray(z + sign * step), host["doc"], host["text"], wide) for sign in (1, -1))
            np.testing.assert_allclose(gradient[place], (high - low) / 2e-6, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("sizes", [(4, 4), (16, 16), (3, 4), (2, 2, 4), (4, 4, 8), (8,), (2,), (1,)])
@pytest.mark.parametrize("tensor", [1, 2])
def test_ring_goes_from_neighbour_to_neighbour(sizes: tuple[int, ...], tensor: int) -> None:
    """On a grid of chips, also where a tensor axis takes a dimension of its own."""
    chips = np.empty((*sizes, tensor), object)
    for place in np.ndindex(chips.shape):
        chips[place] = types.SimpleNamespace(coords=place, core_on_chip=0)
    shape = {"data": chips.size // tensor, "fsdp": 1, "tensor": tensor}
    mesh = types.SimpleNamespace(axis_names=sharding.AXES, shape=shape, devices=chips.reshape(tuple(shape.values())))
    order = distributed.ring_order(mesh, ("data", "fsdp"))
    assert sorted(order) == list(range(chips.size // tensor))
    places = np.array([mesh.devices[i, 0, 0].coords for i in order])
    steps = np.abs(places - np.roll(places, -1, axis=0)).sum(1)
    # A line alone closes over its wrap-around link.
    assert (steps <= 1).all() if len(sizes) > 1 else (steps[:-1] <= 1).all()


def test_ring_without_a_grid_keeps_the_order() -> None:
    assert distributed.ring_order(mesh_of(8), sharding.BATCH[0]) == list(range(8))


# --- masking ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["gathered", "ring"])
@pytest.mark.parametrize("loss", pairs.LOSSES)
def test_planted_duplicates_change_nothing(loss: str, where: str) -> None:
    """Documents that come again, with the same spans: loss and gradient are those of the batch without them."""
    config = objective_config(name=loss, where=where, temperature=0.05)
    z, rng = embeddings(2), np.random.default_rng(0)
    text = rng.permutation(1000)[: 2 * B].reshape(B, 2).astype(np.int32)
    doc, again = np.arange(B, dtype=np.int32), rng.integers(0, B, 16)
    order = rng.permutation(B + 16)
    planted = [np.concatenate([x, x[again]])[order] for x in (np.asarray(z), doc, text)]
    mesh = mesh_of(8)
    batch = sharding.to_global(dict(zip(("z", "doc", "text"), planted, strict=True)), np.arange(B + 16), B + 16, mesh)
    single, many = make(config), make(config, 2, mesh)
    params = single.init(jax.random.key(0))
    expected = jax.value_and_grad(lambda z: single.loss(z, {"doc": doc, "text": text}, params)[0])(z)
    (value, metrics), gradient = jax.jit(jax.value_and_grad(lambda z: many.loss(z, batch, params), has_aux=True))(batch["z"])
    np.testing.assert_allclose(value, expected[0], rtol=1e-6)
    home = np.concatenate([np.arange(B), again])[order]
    collected = np.zeros_like(z)
    np.add.at(collected, home, np.asarray(gradient))
    assert distance(collected, expected[1]) < 1e-5
    np.testing.assert_allclose(metrics["dropped_share"], 16 / (B + 16), rtol=1e-6)


def test_masked_share_counts_what_is_masked() -> None:
    doc = np.repeat(np.arange(B // 2), 2).astype(np.int32)
    for mask, views in ((True, 2), (False, 2), (True, 3)):  # two positives: each row's twin has as many
        objective = make(objective_config(mask_same_document=mask), views)
        given = {"doc": doc, "text": np.arange(views * B, dtype=np.int32).reshape(B, views)}
        _, metrics = objective.loss(embeddings(views), given, objective.init(jax.random.key(0)))
        np.testing.assert_allclose(metrics["masked_share"], mask / (B - 1), atol=1e-6)
        assert metrics["dropped_share"] == 0


@pytest.mark.parametrize("loss", pairs.LOSSES)
def test_rows_without_negatives_are_harmless(loss: str) -> None:
    objective = make(objective_config(name=loss))
    params, host = objective.init(jax.random.key(0)), {"doc": np.zeros(B, np.int32), "text": ids(2)["text"]}
    value, gradient = jax.value_and_grad(lambda z: objective.loss(z, host, params)[0])(embeddings(2))
    assert np.isfinite(value) and np.isfinite(gradient).all()
    if loss in ("infonce", "dcl"):
        assert value == 0 and not gradient.any()


# --- the rest --------------------------------------------------------------------------------------------------------------


def test_flatnce_has_the_gradient_of_dcl() -> None:
    z, host = embeddings(2), ids(2)

    def gradient(name: str) -> tuple:
        objective = make(objective_config(name=name))
        return jax.value_and_grad(lambda z: objective.loss(z, host, objective.init(jax.random.key(0)))[0])(z)

    (one, flat), (_, decoupled) = gradient("flatnce"), gradient("dcl")
    np.testing.assert_allclose(one, 1, rtol=1e-6)
    assert distance(flat, decoupled) < 1e-6


def test_temperature_is_held_in_its_range_and_can_be_frozen() -> None:
    objective = make(objective_config(temperature=0.02, temperature_min=0.01, temperature_max=0.05))
    for value, held in ((0.001, 0.01), (0.03, 0.03), (0.9, 0.05)):
        params = objective.project({"log_temperature": jnp.log(value)})
        np.testing.assert_allclose(jnp.exp(params["log_temperature"]), held, rtol=1e-5)
    frozen = make(objective_config(temperature_trainable=False))
    gradient = jax.grad(lambda p: frozen.loss(embeddings(2), ids(2), p)[0])(frozen.init(jax.random.key(0)))
    assert gradient["log_temperature"] == 0


def test_in_batch_metrics() -> None:
    z = jnp.stack([jnp.eye(4), jnp.eye(4)[jnp.array([0, 1, 3, 2])]], axis=1)
    objective = pairs.make(objective_config(), 2, 4)
    host = {"doc": jnp.arange(4), "text": jnp.arange(8).reshape(4, 2)}
    _, metrics = objective.loss(z, host, objective.init(jax.random.key(0)))
    assert metrics["in_batch_top1"] == 0.5
    assert metrics["positive_similarity"] == 0.5
    np.testing.assert_allclose(metrics["negative_similarity"], 2 / 12, rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"name": "triplet"}, "name"),
        ({"where": "everywhere"}, "where"),
        ({"dtype": "float16"}, "dtype"),
        ({"temperature": 2.0}, "temperature"),
        ({"temperature_min": 0.0}, "temperature"),
        ({"block": 0}, "block"),
        ({"hard_negatives": 1}, "hard_negatives"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"label_smoothing": 0.1, "name": "dcl"}, "label_smoothing"),
        ({"matryoshka": ((E + 1, 1.0),)}, "matryoshka"),
        ({"matryoshka": ((E, 0.0),)}, "matryoshka"),
    ],
)
def test_bad_values_name_the_key(changes: dict, key: str) -> None:
    with pytest.raises(ValueError, match=f"config.objective.{key}"):
        make(objective_config(**changes))
