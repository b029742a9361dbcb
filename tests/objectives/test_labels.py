"""Losses of labelled pairs against double loops in NumPy: values and gradients, on 1 and 8 devices, with copies and without."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from objectives import composition

from contrastive_jax.config import UserError, default_config
from contrastive_jax.objectives import labels, registry
from contrastive_jax.objectives.objective import PairIds
from contrastive_jax.runtime import sharding

B, E = 24, 16
NAN = float("nan")


def config_of(name: str, copies: int = 1, **of_labels: object) -> ConfigDict:
    config = default_config()
    config.objective.name = name
    config.data.update(sampler="fields", copies=copies)
    config.labels.update(classes=(2, 3), scale=5.0)
    config.labels.update(of_labels)
    return config


def pairs(views: int, label: list[float], seed: int = 0) -> tuple[jax.Array, PairIds]:
    z = np.random.default_rng(seed).normal(size=(B, views, E))
    z = jnp.asarray(z / np.linalg.norm(z, axis=-1, keepdims=True), jnp.float32)
    ids = jnp.arange(B, dtype=jnp.int32)
    return z, PairIds(ids, jnp.stack([ids] * views, 1), jnp.asarray(label, jnp.float32))


def scores() -> list[float]:
    """Some equal, some missing."""
    label = np.random.default_rng(1).integers(0, 11, B) / 2
    label[[3, 17]] = NAN
    return label.tolist()


def classes() -> list[float]:
    label = np.random.default_rng(2).integers(0, 5, B).astype(float)
    label[[0, 5, 6]] = -1, NAN, NAN
    return label.tolist()


def cosent_loop(z: np.ndarray, label: np.ndarray) -> float:
    """The double loop of the formula; temperature 1 / 20."""
    cosine, total = (z[:, 0] * z[:, 1]).sum(-1), 1.0
    for c, y in zip(cosine.tolist(), label.tolist(), strict=True):
        for other, lower in zip(cosine.tolist(), label.tolist(), strict=True):
            if y > lower:
                total += math.exp(20 * (other - c))
    return np.log(total)


def cosine_loop(z: np.ndarray, label: np.ndarray) -> float:
    cosine = (z[:, 0] * z[:, 1]).sum(-1)
    return np.mean([(c - y / 5) ** 2 for c, y in zip(cosine, label, strict=True) if not np.isnan(y)])


def probabilities(z: np.ndarray, label: np.ndarray, params: dict, product: bool = False) -> np.ndarray:
    """Of each copy and class, [b k c]: a softmax over the classes of the label's own space."""
    u, v = z[:, 0::2] * 4, z[:, 1::2] * 4  # √e = 4
    x = np.concatenate([u, v, np.abs(u - v), *[u * v] * product], axis=-1)
    logits = x @ np.asarray(params["kernel"], np.float64) + np.asarray(params.get("bias", 0.0), np.float64)
    weights = np.exp(logits)
    for i, y in enumerate(label):
        if y >= 0:
            weights[i, :, range(2, 5) if y < 2 else range(2)] = 0
    return weights / weights.sum(-1, keepdims=True)


def softmax_loop(z: np.ndarray, label: np.ndarray, params: dict, rdrop: float = 0.0, product: bool = False) -> float:
    """The mean of -Σ log p(y) over pairs with a label, and α / 2 · [KL(p|q) + KL(q|p)] over all."""
    p = probabilities(z, label, params, product)
    losses = [-np.log(p[i, :, int(y)]).sum() for i, y in enumerate(label) if y >= 0]
    total = np.mean(losses)
    if rdrop:
        tiny = np.maximum(p, 1e-300)
        forth = (p[:, 0] * np.log(tiny[:, 0] / tiny[:, 1])).sum(-1)
        back = (p[:, 1] * np.log(tiny[:, 1] / tiny[:, 0])).sum(-1)
        total += rdrop * np.mean((forth + back) / 2)
    return total


def numeric_gradient(loss: Callable[[np.ndarray], float], z: jax.Array) -> np.ndarray:
    """By central differences in float64."""
    z, step = np.asarray(z, np.float64), 1e-5
    gradient = np.zeros_like(z)
    for index in np.ndindex(z.shape):
        ends = [z.copy(), z.copy()]
        ends[0][index] += step
        ends[1][index] -= step
        gradient[index] = (loss(ends[0]) - loss(ends[1])) / (2 * step)
    return gradient


def check(config: ConfigDict, z: jax.Array, ids: PairIds, expected: Callable[[np.ndarray, np.ndarray, dict], float]) -> None:
    """Value and gradient equal the loop's, on one device and on 8."""
    objective = registry.make_objective(config, z.shape[1], E)
    params = objective.init(jax.random.key(0))
    label = np.asarray(ids.label)

    def loss(z: jax.Array, ids: PairIds) -> jax.Array:
        return objective.loss(z, ids, params)[0]

    value = expected(np.asarray(z, np.float64), label, params)
    slope = numeric_gradient(lambda z: expected(z, label, params), z)
    spread = jax.NamedSharding(composition.mesh_of(8), sharding.BATCH)
    for given in ((z, ids), jax.device_put((z, ids), spread)):
        got, gradient = jax.jit(jax.value_and_grad(loss))(*given)
        np.testing.assert_allclose(got, value, rtol=2e-6)
        assert composition.distance(gradient, slope) < 1e-5


def test_row55_cosent_equals_the_double_loop() -> None:
    check(config_of("cosent"), *pairs(2, scores()), lambda z, label, _: cosent_loop(z, label))


def test_row55_copies_are_pairs_of_their_own() -> None:
    z, ids = pairs(4, scores())
    check(config_of("cosent", 2), z, ids, lambda z, y, _: cosent_loop(z.reshape(-1, 2, E), np.repeat(y, 2)))


def test_row55_cosent_is_unchanged_by_a_monotone_map_of_the_labels_and_by_equal_labels() -> None:
    logits, label = jax.random.normal(jax.random.key(0), (50,)), jax.random.randint(jax.random.key(1), (50,), 0, 6) / 5
    value = labels.cosent_loss(logits, label)
    np.testing.assert_allclose(labels.cosent_loss(logits, jnp.exp(3 * label) - 7), value, rtol=1e-7)
    assert labels.cosent_loss(logits, jnp.ones(50)) == 0
    assert labels.cosent_loss(logits, jnp.full(50, NAN)) == 0
    far = labels.cosent_loss(jnp.array([300.0, -300.0]), jnp.array([0.0, 1.0]))
    np.testing.assert_allclose(far, 600)  # no overflow


def test_row55_cosine_regression_equals_the_loop() -> None:
    check(config_of("cosine"), *pairs(2, scores()), lambda z, label, _: cosine_loop(z, label))


@pytest.mark.parametrize("product", [False, True])
def test_row55_the_softmax_of_masked_label_spaces_equals_the_loop(product: bool) -> None:
    z, ids = pairs(2, classes())
    check(config_of("softmax", product=product), z, ids, lambda z, y, params: softmax_loop(z, y, params, product=product))


def test_row55_a_class_of_another_label_space_has_no_gradient() -> None:
    z, ids = pairs(2, [0.0, 1.0] * (B // 2))
    objective = registry.make_objective(config_of("softmax", bias=False), 2, E)
    params = objective.init(jax.random.key(0))
    assert set(params) == {"kernel"}
    gradient = jax.grad(lambda params: objective.loss(z, ids, params)[0])(params)["kernel"]
    assert (gradient[:, 2:] == 0).all() and (gradient[:, :2] != 0).any()


def test_row51_rdrop_equals_both_divergences_and_m15_unlabelled_pairs_count_in_them() -> None:
    z, ids = pairs(4, classes())
    check(config_of("softmax", 2, rdrop=4.0), z, ids, lambda z, y, params: softmax_loop(z, y, params, 4.0))


def test_m15_without_any_label_the_divergence_is_the_loss() -> None:
    z, ids = pairs(4, [-1.0] * B)
    objective = registry.make_objective(config_of("softmax", 2, rdrop=0.5), 4, E)
    value, metrics = objective.loss(z, ids, objective.init(jax.random.key(0)))
    np.testing.assert_allclose(value, 0.5 * metrics["divergence"])
    assert value > 0 and metrics["accuracy"] == 0


def test_row51_equal_copies_have_a_divergence_of_exactly_0() -> None:
    z, ids = pairs(2, classes())
    z = jnp.concatenate([z, z], axis=1)
    objective = registry.make_objective(config_of("softmax", 2, rdrop=4.0), 4, E)
    params = objective.init(jax.random.key(0))
    assert objective.loss(z, ids, params)[1]["divergence"] == 0
    one = registry.make_objective(config_of("softmax"), 2, E).loss(z[:, :2], ids, params)[0]
    np.testing.assert_allclose(objective.loss(z, ids, params)[0], 2 * one, rtol=1e-6)  # -log p₁(y) - log p₂(y)


def test_row51_a_single_text_has_a_class_too() -> None:
    config = config_of("softmax", 2, rdrop=1.0)
    z, ids = pairs(2, classes())
    objective = registry.make_objective(config, 2, E)
    assert objective.init(jax.random.key(0))["kernel"].shape == (E, 5)
    assert np.isfinite(objective.loss(z, ids, objective.init(jax.random.key(0)))[0])


def test_row55_what_does_not_go_together_is_refused() -> None:
    config = config_of("softmax", rdrop=1.0)
    with pytest.raises(UserError, match=r"config.labels.rdrop=1.0: .* set config.data.copies=2, not 1"):
        registry.make_objective(config, 2, E)
    with pytest.raises(UserError, match=r"config.data.views=3: config.objective.name='cosent' takes 2"):
        registry.make_objective(config_of("cosent"), 3, E)
    config = config_of("cosine")
    config.data.sampler = "neighbours"
    with pytest.raises(UserError, match=r"needs labels: prepare the data with --pairs, and set config.data.sampler='fields'"):
        registry.make_objective(config, 2, E)


def entailment_loop(z: np.ndarray, premise: np.ndarray) -> float:
    """InfoNCE in one direction: each premise has to find its hypothesis among all others' and all contradictions."""
    score, losses = np.exp(np.einsum("ae,bve->abv", z[:, 0], z[:, 1:]) * 20), []
    for i in range(len(z)):
        others = score[i, premise != premise[i], 0].sum() + score[i, :, 1].sum()
        losses.append(-np.log(score[i, i, 0] / (score[i, i, 0] + others)))
    return np.mean(losses)


def test_m12_entailment_has_one_direction_and_a_repeated_premise_is_no_negative_of_itself() -> None:
    z, ids = pairs(3, [0.0] * B)
    premise = np.arange(B) // 2  # each comes twice, with two hypotheses
    span_hash = np.arange(3 * B).reshape(B, 3) + 1000
    span_hash[:, 0], z = premise, z.at[1::2, 0].set(z[::2, 0])
    ids = ids._replace(span_hash=jnp.asarray(span_hash, jnp.int32))
    config = default_config()
    config.objective.symmetric, config.data.hard_negatives = False, 1
    check(config, z, ids, lambda z, *_: entailment_loop(z, premise))
