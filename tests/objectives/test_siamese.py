"""SimSiam and BYOL against NumPy; batch norm on any devices and in micro-batches; what has no gradient."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from objectives.composition import B, E, distance, embeddings, encode, ids, mesh_of, rows_of, small_encoder

from contrastive_jax.config import UserError, default_config
from contrastive_jax.objectives import heads, registry, siamese
from contrastive_jax.objectives.objective import Given, Objective
from contrastive_jax.runtime import sharding
from contrastive_jax.training import grad_cache


def siamese_config(name: str = "simsiam") -> ConfigDict:
    config = default_config()
    config.objective.name = name
    config.heads.update(projector=(12, 10), predictor=(6, 10))
    if name == "byol":
        config.memory.kind = "average"
    return config


def make(name: str = "simsiam", views: int = 2) -> Objective:
    return registry.make_objective(siamese_config(name), views, E)


def moved(params: dict) -> dict:
    """The parameters with scales, shifts and biases that are not 1 and 0."""
    rng = np.random.default_rng(3)
    return jax.tree.map(lambda x: jnp.asarray(x + rng.normal(0, 0.2, x.shape), jnp.float32), params)


# --- the reference: two views, one after the other, in float64 ---


def norm(x: np.ndarray) -> np.ndarray:
    return (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)


def mlp(params: dict, x: np.ndarray, norm_output: bool) -> np.ndarray:
    """A head of two layers on x[b e]."""
    one, two = (jax.tree.map(lambda a: np.asarray(a, np.float64), params[name]) for name in ("layer0", "layer1"))
    hidden = np.maximum(norm(x @ one["kernel"]) * one["norm_scale"] + one["norm_shift"], 0)
    out = hidden @ two["kernel"] + two.get("bias", 0)
    return norm(out) if norm_output else out


def cosine(x: np.ndarray, y: np.ndarray) -> float:
    return float(((x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)).mean())


def test_row45_loss_is_the_papers() -> None:
    objective, x = make(), np.asarray(embeddings(2), np.float64)
    params = moved(objective.init(jax.random.key(0)))
    z = [mlp(params["projector"], x[:, view], norm_output=True) for view in (0, 1)]
    p = [mlp(params["predictor"], each, norm_output=False) for each in z]
    expected = -cosine(p[0], z[1]) / 2 - cosine(p[1], z[0]) / 2
    value, metrics = jax.jit(objective.loss)(embeddings(2), ids(2), params)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["positive_similarity"], cosine(x[:, 0], x[:, 1]), atol=1e-6)
    unit = z[0] / np.linalg.norm(z[0], axis=1, keepdims=True)
    np.testing.assert_allclose(metrics["projection_std"], np.sqrt(unit.var(0).sum()), rtol=1e-5)


def test_row45_three_views_predict_one_another_in_all_orders() -> None:
    predicted, target = embeddings(3), embeddings(3, seed=1)
    expected = [
        cosine(*(np.asarray(x[:, v]) for x, v in ((predicted, i), (target, j)))) for i in range(3) for j in {0, 1, 2} - {i}
    ]
    np.testing.assert_allclose(siamese.of_others(siamese.agreement(predicted, target)), np.mean(expected), atol=1e-6)


def test_row45_loss_of_a_perfect_prediction_is_minus_one() -> None:
    z = jnp.stack([embeddings(1)[:, 0]] * 2, axis=1)
    np.testing.assert_allclose(-siamese.of_others(siamese.agreement(3 * z, z)), -1, rtol=1e-6)


def test_row45_gradient_of_one_half_stops_at_the_other_view() -> None:
    """The half cos(p1, z2) reaches nothing of view 2, and the whole loss gives each view what its own half does."""
    objective = make()
    params = objective.init(jax.random.key(0))
    made = siamese.make_heads(siamese_config(), 2, E, ("norm", "bias"))

    def half(x1: jax.Array, x2: jax.Array) -> jax.Array:
        z = made.projector(params["projector"], jnp.stack([x1, x2], axis=1))
        return -siamese.agreement(made.predictor(params["predictor"], z), z)[0, 1] / 2

    x = embeddings(2)
    first, second = jax.jit(jax.grad(half, argnums=(0, 1)))(x[:, 0], x[:, 1])
    assert jnp.abs(first).max() > 1e-4
    assert not second.any()
    whole = jax.jit(jax.grad(lambda x: objective.loss(x, ids(2), params)[0]))(x)
    np.testing.assert_allclose(whole[:, 0], first, atol=1e-7)


# --- batch norm ---


def test_row45_batch_norm_is_per_view_and_survives_large_means() -> None:
    x = np.random.default_rng(0).normal(1000, 0.1, (64, 2, 5)) + np.array([0, 7])[None, :, None]
    got = heads.batch_norm(jnp.asarray(x, jnp.float32))
    for view in (0, 1):
        np.testing.assert_allclose(got[:, view], norm(np.asarray(jnp.asarray(x, jnp.float32), np.float64)[:, view]), atol=5e-3)
    rounded = heads.batch_norm(jnp.asarray(x - 1000, jnp.bfloat16))
    assert rounded.dtype == jnp.float32 and abs(float(rounded.mean())) < 1e-6


@pytest.mark.parametrize("name", ["simsiam", "byol"])
@pytest.mark.parametrize(("devices", "cached"), [(8, False), (1, True), (8, True)])
def test_row45_row49_devices_and_micro_batches_change_nothing(name: str, devices: int, cached: bool) -> None:
    objective, mesh = make(name), mesh_of(devices)
    params = {"encoder": small_encoder()[1], "objective": moved(objective.init(jax.random.key(0)))}
    target = moved(params["objective"])

    def value(embed: Callable, given_z: jax.Array) -> Callable:
        def loss(params: dict, rows: object, ids: object) -> jax.Array:
            return objective.loss(embed(params["encoder"], rows), ids, params["objective"], Given(given_z, target))[0]

        return jax.jit(jax.value_and_grad(loss))

    given_z = embeddings(2, seed=9)
    expected = value(encode, given_z)(params, rows_of(2), ids(2))
    embed = grad_cache.cached(encode, 16, mesh, sharding.BATCH_AXES) if cached else encode  # 16 + 8: a ragged end
    rows, spread, given_z = sharding.to_global((rows_of(2), ids(2), np.asarray(given_z)), np.arange(B), B, mesh)
    got = value(embed, given_z)(params, rows, spread)
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-6)
    far = jax.tree.map(distance, got[1], expected[1])
    assert max(jax.tree.leaves(far)) < 2e-5, far


# --- BYOL ---


def test_row49_loss_is_the_papers_and_the_target_has_no_gradient() -> None:
    objective, x, other = make("byol"), np.asarray(embeddings(2), np.float64), np.asarray(embeddings(2, seed=1), np.float64)
    params = moved(objective.init(jax.random.key(0)))
    target = moved(params)
    z = [mlp(params["projector"], x[:, view], norm_output=False) for view in (0, 1)]
    p = [mlp(params["predictor"], each, norm_output=False) for each in z]
    follows = [mlp(target["projector"], other[:, view], norm_output=False) for view in (0, 1)]
    expected = 2 - 2 * cosine(p[0], follows[1]) + 2 - 2 * cosine(p[1], follows[0])

    def loss(given: Given) -> jax.Array:
        return objective.loss(embeddings(2), ids(2), params, given)[0]

    given = Given(embeddings(2, seed=1), target)
    np.testing.assert_allclose(loss(given), expected, rtol=1e-5)
    assert not any(leaf.any() for leaf in jax.tree.leaves(jax.grad(loss)(given)))


def test_row49_without_an_average_is_an_affine_map_of_simsiams_loss() -> None:
    """The target of momentum 0 is the online network: with equal heads, BYOL's loss is 4 + 4 · SimSiam's."""
    x = embeddings(2)
    params = make("byol").init(jax.random.key(0))
    value = make("byol").loss(x, ids(2), params, Given(x, params))[0]
    made = siamese.make_heads(siamese_config(), 2, E, ("linear", "linear"))
    projected = made.projector(params["projector"], x)
    cosines = siamese.agreement(made.predictor(params["predictor"], projected), projected)
    np.testing.assert_allclose(value, 4 - 4 * siamese.of_others(cosines), rtol=1e-6)


# --- mistakes ---


@pytest.mark.parametrize(
    ("name", "views", "changes", "key"),
    [
        ("simsiam", 1, {}, "config.data.copies=2"),
        ("simsiam", 2, {"heads.predictor": (6, 9)}, "config.heads.predictor"),
        ("simsiam", 2, {"heads.predictor": ()}, "config.heads.predictor"),
        ("simsiam", 2, {"heads.projector": ()}, f"embeddings that it predicts, {E}"),
        ("byol", 2, {"memory.kind": ""}, "config.memory.kind"),
    ],
)
def test_row45_row49_values_that_do_not_go_together_name_the_key(name: str, views: int, changes: dict, key: str) -> None:
    config = siamese_config(name)
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=key):
        registry.make_objective(config, views, E)


def test_row45_an_empty_projector_is_the_identity() -> None:
    x = embeddings(2)
    assert heads.Head((E,), "norm").init(jax.random.key(0)) == {}
    np.testing.assert_array_equal(heads.Head((E,), "norm")({}, x), x)
