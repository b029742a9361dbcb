"""The loss: its value and gradient against plain NumPy, and on a mesh against one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import base
from contrastive_jax import sharding
from contrastive_jax.objectives import pairs

B, E = 24, 10


def objective_config(**changes: object) -> ConfigDict:
    config = base.get_config().objective
    config.update(changes)
    return config


def inputs(seed: int = 0) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(B, 2, E))
    z /= np.linalg.norm(z, axis=-1, keepdims=True)
    return jnp.asarray(z, jnp.float32), jnp.asarray(rng.integers(0, 15, B), jnp.int32)


def reference(z: np.ndarray, doc: np.ndarray, log_temperature: float, mask_same_document: bool = True) -> float:
    """Symmetric InfoNCE, one pair at a time, in float64."""
    s = z[:, 0].astype(np.float64) @ z[:, 1].astype(np.float64).T / np.exp(log_temperature)
    total = 0.0
    for i in range(len(s)):
        keep = [j == i or not mask_same_document or doc[j] != doc[i] for j in range(len(s))]
        total += np.log(np.exp(s[i, keep]).sum()) + np.log(np.exp(s[keep, i]).sum()) - 2 * s[i, i]
    return total / (2 * len(s))


@pytest.mark.parametrize("mask", [True, False])
def test_value_and_gradient_equal_the_reference(mask: bool) -> None:
    objective = pairs.make(objective_config(mask_same_document=mask))
    z, doc = inputs()
    assert len(set(doc.tolist())) < B  # there is something to mask
    params = objective.init(jax.random.key(0))
    loss = jax.jit(lambda z, p: objective.loss(z, doc, p)[0])
    start = float(params["log_temperature"])
    assert start == pytest.approx(np.log(0.05))
    host, docs = np.asarray(z, np.float64), np.asarray(doc)
    np.testing.assert_allclose(loss(z, params), reference(host, docs, start, mask), rtol=1e-6)
    dz, dp = jax.grad(loss, argnums=(0, 1))(z, params)
    step = 1e-5
    for place in [(0, 0, 0), (3, 1, 4), (23, 0, 9), (11, 1, 2)]:
        nudge = np.zeros(host.shape)
        nudge[place] = step
        slope = (reference(host + nudge, docs, start, mask) - reference(host - nudge, docs, start, mask)) / (2 * step)
        np.testing.assert_allclose(dz[place], slope, rtol=1e-4, atol=1e-6)
    slope = (reference(host, docs, start + step, mask) - reference(host, docs, start - step, mask)) / (2 * step)
    np.testing.assert_allclose(dp["log_temperature"], slope, rtol=1e-4)


def test_masking_removes_the_pairs_of_one_document() -> None:
    z, _ = inputs()
    doubled, doc = jnp.concatenate([z, z]), jnp.tile(jnp.arange(B), 2)
    objective = pairs.make(objective_config())
    params = objective.init(jax.random.key(0))
    single, metrics = objective.loss(z, jnp.arange(B), params)
    both, doubled_metrics = objective.loss(doubled, doc, params)
    # Twice the documents: each row has every other document's keys twice, and its own once.
    s = np.asarray(z[:, 0] @ z[:, 1].T, np.float64) / 0.05
    np.fill_diagonal(s, np.diagonal(s) - np.log(2))
    rows = np.log(np.exp(s).sum(1)) + np.log(np.exp(s).sum(0))
    expected = (rows + 2 * np.log(2) - 2 * (np.diagonal(s) + np.log(2))).mean() / 2
    np.testing.assert_allclose(both, expected, rtol=1e-5)
    assert metrics["ignored_share"] == 0 and doubled_metrics["ignored_share"] == pytest.approx(1 / (2 * B))
    assert both != single


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 4, 1), (2, 2, 2)])
def test_mesh_gives_the_loss_and_gradients_of_one_device(shape: tuple[int, int, int]) -> None:
    config = base.get_config().mesh
    config.update(dict(zip(sharding.AXES, shape, strict=True)))
    mesh = sharding.make_mesh(config)
    z, doc = inputs()
    plain, spread = pairs.make(objective_config()), pairs.make(objective_config(), sharding.gather(mesh))
    params = plain.init(jax.random.key(0))

    def value(objective: pairs.Objective, z: jax.Array, doc: jax.Array) -> tuple:
        return jax.jit(jax.value_and_grad(lambda z, p: objective.loss(z, doc, p)[0], argnums=(0, 1)))(z, params)

    batch = sharding.to_global({"z": np.asarray(z), "doc": np.asarray(doc)}, np.arange(B), B, mesh)
    expected, got = value(plain, z, doc), value(spread, batch["z"], batch["doc"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-7), expected, got)


def test_temperature_is_held_in_its_range_and_can_be_frozen() -> None:
    objective = pairs.make(objective_config(temperature=0.02, temperature_min=0.01, temperature_max=0.05))
    for value, held in ((0.001, 0.01), (0.03, 0.03), (0.9, 0.05)):
        params = objective.project({"log_temperature": jnp.log(value)})
        np.testing.assert_allclose(jnp.exp(params["log_temperature"]), held, rtol=1e-5)
    frozen = pairs.make(objective_config(temperature_trainable=False))
    z, doc = inputs()
    gradient = jax.grad(lambda p: frozen.loss(z, doc, p)[0])(frozen.init(jax.random.key(0)))
    assert gradient["log_temperature"] == 0


def test_in_batch_top1() -> None:
    z = jnp.stack([jnp.eye(4), jnp.eye(4)[jnp.array([0, 1, 3, 2])]], axis=1)
    objective = pairs.make(objective_config())
    _, metrics = objective.loss(z, jnp.arange(4), objective.init(jax.random.key(0)))
    assert metrics["in_batch_top1"] == 0.5
    assert metrics["positive_similarity"] == 0.5
    np.testing.assert_allclose(metrics["negative_similarity"], 2 / 12, rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "key"),
    [({"name": "triplet"}, "name"), ({"temperature": 2.0}, "temperature"), ({"temperature_min": 0.0}, "temperature")],
)
def test_bad_values_name_the_key(changes: dict, key: str) -> None:
    with pytest.raises(ValueError, match=f"config.objective.{key}"):
        pairs.make(objective_config(**changes))
    with pytest.raises(ValueError, match=r"\[b b\], got \(2, 3\)"):
        pairs.info_nce(jnp.zeros((2, 3)))
