"""Who is paired with whom: both views, all views and averaged positives, each against a loop over the batch."""

import dense
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from objectives.composition import B, E, distance, embeddings, ids, make, mesh_of, objective_config

from contrastive_jax.config import UserError
from contrastive_jax.objectives import pairing
from contrastive_jax.objectives.objective import PairIds
from contrastive_jax.runtime import sharding

TEMPERATURE = 0.07


def nt_xent(z: jax.Array, host: PairIds) -> jax.Array:
    """The loss of SimCLR over all 2b embeddings; pairs that share a document or a text are no negatives."""
    keep, among = dense.kept_rows(host.span_hash), np.zeros((B, 2, B, 2), bool)
    for i in range(B):
        for j in range(B):
            shared = host.document[i] == host.document[j] or set(host.span_hash[i].tolist()) & set(host.span_hash[j].tolist())
            among[i, :, j, :] = keep[j] and not shared
        among[i, 0, i, 1] = among[i, 1, i, 0] = True
    logits = jnp.einsum("ise,jte->isjt", z, z) / TEMPERATURE
    every = jax.nn.logsumexp(jnp.where(among, logits, -jnp.inf), axis=(2, 3))
    own = jnp.stack([logits[i, 0, i, 1] for i in range(B)])
    return (every - own[:, None])[keep].mean()


def compare(changes: dict, views: int, plain, where: str, devices: int) -> dict:
    config, mesh, z, host = (
        objective_config(temperature=TEMPERATURE, where=where, **changes),
        mesh_of(devices),
        embeddings(views),
        ids(views),
    )
    objective = make(config, views, mesh)
    params = objective.init(jax.random.key(0))
    z_spread, ids_spread = sharding.to_global((np.asarray(z), host), np.arange(B), B, mesh)
    step = jax.jit(jax.value_and_grad(lambda z, ids: objective.loss(z, ids, params), has_aux=True))
    (value, metrics), gradient = step(z_spread, ids_spread)
    expected, slope = jax.value_and_grad(lambda z: plain(z, host))(z)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    assert distance(gradient, slope) < 1e-5
    return metrics


@pytest.mark.parametrize(("where", "devices"), [("gathered", 1), ("gathered", 8), ("ring", 8)])
def test_m1_both_views_are_anchors_and_negatives(where: str, devices: int) -> None:
    metrics = compare({"pairing": "both"}, 2, nt_xent, where, devices)
    z, others = np.asarray(embeddings(2), np.float64), ~np.eye(B, dtype=bool)
    expected = np.mean([(z[:, i] @ z[:, j].T)[others].mean() for i in (0, 1) for j in (0, 1)])
    np.testing.assert_allclose(metrics["negative_similarity"], expected, atol=1e-6)


def test_m1_two_views_have_twice_as_many_negatives_less_two() -> None:
    """Equal embeddings: the loss is the log of the positive and 2b - 2 negatives."""
    objective = make(objective_config(pairing="both", temperature=TEMPERATURE))
    z = jnp.broadcast_to(embeddings(2)[:1, :1], (B, 2, E))
    host = PairIds(jnp.arange(B), jnp.arange(2 * B).reshape(B, 2))
    value, metrics = objective.loss(z, host, objective.init(jax.random.key(0)))
    np.testing.assert_allclose(value, np.log(2 * B - 1), rtol=1e-6)
    assert abs(metrics["masked_share"]) < 1e-6


def simclr(z: jax.Array, host: PairIds) -> jax.Array:
    """DeCLUTR's: the positives are averaged first."""
    mean = z[:, 1:].mean(1)
    return nt_xent(jnp.stack([z[:, 0], mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)], axis=1), host)


@pytest.mark.parametrize("devices", [1, 8])
def test_row50_m1_positives_are_averaged_before_the_loss(devices: int) -> None:
    compare({"pairing": "both", "positives": "mean"}, 4, simclr, "gathered", devices)


@pytest.mark.parametrize(("where", "devices"), [("gathered", 1), ("ring", 8)])
def test_m1_all_pairs_of_views(where: str, devices: int) -> None:
    """CMC: the sum of InfoNCE in both directions over each two of three views."""
    config = objective_config(temperature=TEMPERATURE)

    def cmc(z: jax.Array, host: PairIds) -> jax.Array:
        # Pairs that share any text are no negatives, in each of the three problems.
        allowed, keep = dense.negatives(config, host, 1)
        total = jnp.float32(0)
        for i, j in ((0, 1), (0, 2), (1, 2)):
            s = z[:, i] @ z[:, j].T / TEMPERATURE
            masked = jnp.where(allowed[:, :, 0] | np.eye(B, dtype=bool), s, -jnp.inf)
            for logits in (masked, masked.T):
                total += jnp.where(keep, -jax.nn.log_softmax(logits).diagonal(), 0).sum() / keep.sum() / 2
        return total

    compare({"pairing": "all"}, 3, cmc, where, devices)


@pytest.mark.parametrize(
    ("changes", "views", "key"),
    [
        ({"pairing": "all"}, 2, "pairing"),
        ({"pairing": "both"}, 3, "pairing"),
        ({"positives": "mean"}, 2, "positives"),
        ({"positives": "mean", "pairing": "all"}, 4, "pairing"),
        ({"pairing": "all", "name": "mine"}, 3, "pairing"),
    ],
)
def test_m1_pairings_that_do_not_go_together_name_the_key(changes: dict, views: int, key: str) -> None:
    with pytest.raises(UserError, match=f"config.objective.{key}"):
        make(objective_config(**changes), views)


def test_row52_contexts_predict_later_views() -> None:
    """CPC, by NumPy in float64; and what a context has not seen does not move it."""
    config, z = objective_config(pairing="all", context=5, symmetric=False, temperature=TEMPERATURE), embeddings(4)
    objective, host = make(config, 4), PairIds(np.arange(B), np.arange(4 * B).reshape(B, 4))
    params = objective.init(jax.random.key(3))
    weights = {name: np.asarray(x, np.float64) for name, x in params["context"].items()}
    context, total = np.zeros((B, 5)), 0.0
    for i in range(3):
        of_input, of_context = np.asarray(z[:, i]) @ weights["input"] + weights["bias"], context @ weights["recurrent"]
        gates = 1 / (1 + np.exp(-(of_input + of_context)[:, :10]))
        new = np.tanh(of_input[:, 10:] + gates[:, :5] * of_context[:, 10:])
        context = gates[:, 5:] * context + (1 - gates[:, 5:]) * new
        for j in range(i + 1, 4):
            anchor = context @ weights["predict"][j - i - 1]
            logits = anchor / np.linalg.norm(anchor, axis=1, keepdims=True) @ np.asarray(z[:, j]).T / TEMPERATURE
            total += (np.log(np.exp(logits).sum(1)) - logits.diagonal()).mean()
    np.testing.assert_allclose(jax.jit(objective.loss)(z, host, params)[0], total, rtol=1e-5)
    of_anchor = jax.jacrev(lambda z: pairing.predict_views(params["context"], z)[0][0, 0])(z)  # of view 0 about view 1
    assert of_anchor[:, 0, 0].any() and not of_anchor[:, :, 1:].any()


def test_row52_token_states_are_chosen_among_the_tokens() -> None:
    rng = np.random.default_rng(0)
    states, size = rng.normal(size=(500, 7, 4)), rng.integers(1, 8, 500)
    segment = (np.arange(7) < size[:, None]).astype(np.int32)
    uniform = rng.random((500, 7)).astype(np.float32)
    chosen = np.asarray(pairing.choose_states(jnp.asarray(states), jnp.asarray(segment), jnp.asarray(uniform), 3))
    unit = states / np.linalg.norm(states, axis=-1, keepdims=True)
    places = np.array([[np.abs(unit[i] - chosen[i, c]).sum(-1).argmin() for c in range(3)] for i in range(500)])
    np.testing.assert_allclose(chosen, unit[np.arange(500)[:, None], places], atol=1e-6)
    assert (places < size[:, None]).all()
    assert all(len(set(row)) == min(3, n) for row, n in zip(places.tolist(), size, strict=True))
    counts = np.bincount(places[size == 7].ravel(), minlength=7)
    assert counts.min() > 0.5 * counts.mean()


@pytest.mark.parametrize(("where", "devices"), [("gathered", 1), ("ring", 8)])
def test_row52_the_positives_of_locals_are_token_states(where: str, devices: int) -> None:
    """DIM: one view and three of its token states, as [b 4 e]; the loss is that of three positives."""

    def dim(z: jax.Array, host: PairIds) -> jax.Array:
        host = PairIds(host.document, np.repeat(host.span_hash[:, :1], 4, axis=1))
        config = objective_config(name="jsd", temperature=TEMPERATURE)
        return dense.loss(config, z, host, {"log_temperature": jnp.log(TEMPERATURE), "bias": jnp.float32(-1)})

    host = PairIds(ids(2).document, ids(2).span_hash[:, :1])
    config, mesh, z = (
        objective_config(name="jsd", temperature=TEMPERATURE, where=where, locals=3, bias=-1.0),
        mesh_of(devices),
        embeddings(4),
    )
    objective = make(config, 1, mesh)
    params = objective.init(jax.random.key(0))
    spread = sharding.to_global((np.asarray(z), host), np.arange(B), B, mesh)
    value, gradient = jax.jit(jax.value_and_grad(lambda z, ids: objective.loss(z, ids, params)[0]))(*spread)
    expected, slope = jax.value_and_grad(lambda z: dim(z, host))(z)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    assert distance(gradient, slope) < 1e-5
