"""Token losses equal their formulas, and a step with one is the same on any mesh, cached or direct."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import RESERVED, recipe, shrink
from ml_collections import ConfigDict

from contrastive_jax.config import UserError, default_config
from contrastive_jax.data import pipeline, prepared
from contrastive_jax.objectives import tokens
from contrastive_jax.objectives.tokens import Targets
from contrastive_jax.runtime import sharding
from contrastive_jax.training import build

N, L, D, W, ROWS = 6, 9, 8, 20, 32


def make_config(**of_tokens: object) -> ConfigDict:
    config = default_config()
    config.noise.ops = (("mask", 0.3),)
    config.model.init_std = 0.5
    config.tokens.update(of_tokens)
    return config


def inputs() -> tuple[jax.Array, jax.Array, Targets]:
    rng = np.random.default_rng(0)
    table, states = rng.normal(size=(ROWS, D)), rng.normal(size=(N, L, D))
    real = np.arange(L) < rng.integers(4, L + 1, (N, 1))
    picked = real & (rng.random((N, L)) < 0.4)
    picked[0] = False  # a row without any
    return jnp.asarray(table, jnp.float32), jnp.asarray(states, jnp.float32), Targets(picked, rng.integers(0, W, (N, L)), real)


def transform(params: dict, x: np.ndarray) -> np.ndarray:
    """BERT's, in float64."""
    if not params:
        return x
    y = x @ np.float64(params["dense"]["kernel"]) + np.float64(params["dense"]["bias"])
    y = np.float64(jax.nn.gelu(jnp.asarray(y), approximate=False))
    return (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-12)


@pytest.mark.parametrize(("head", "positions"), list(itertools.product(["linear", "mlp"], [0, 3, 50])))
def test_row53_masked_tokens_equal_the_dense_formula(head: str, positions: int) -> None:
    loss = tokens.make_token_loss(make_config(name="mlm", head=head, positions=positions), D, W)
    params, (table, states, targets) = loss.init(jax.random.key(0)), inputs()
    params["bias"] = jnp.linspace(-1, 1, W)
    sums = loss.loss(params, table, states, targets)
    logits = transform(params["hidden"], np.float64(states)) @ np.float64(table)[:W].T + np.linspace(-1, 1, W)
    of_token = np.take_along_axis(logits, targets.token[..., None], -1)[..., 0]
    dense = np.log(np.exp(logits).sum(-1)) - of_token
    counts = targets.picked & (np.cumsum(targets.picked, 1) <= (positions or L))
    np.testing.assert_allclose(sums.loss, (dense * counts).sum(1), rtol=2e-6)
    np.testing.assert_array_equal(sums.number, counts.sum(1))
    np.testing.assert_array_equal(sums.right, ((logits.argmax(-1) == targets.token) & counts).sum(1))
    gradient = jax.grad(lambda states: tokens.mean(loss.loss(params, table, states, targets))[0])(states)
    moved = np.abs(gradient).max(-1) > 0
    np.testing.assert_array_equal(moved, counts)
    if head == "linear":
        probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True) - np.eye(W)[targets.token]
        expected = probabilities @ np.float64(table)[:W] * counts[..., None] / counts.sum()
        np.testing.assert_allclose(gradient, expected, atol=2e-7)
    of_table = jax.grad(lambda table: loss.loss(params, table, states, targets).loss.sum())(table)
    assert not np.abs(of_table[W:]).any() and np.abs(of_table[:W]).all(1).any()


@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_row47_replaced_tokens_equal_the_binary_cross_entropy(head: str) -> None:
    loss = tokens.make_token_loss(make_config(name="replaced", head=head), D, W)
    params, (table, states, targets) = loss.init(jax.random.key(0)), inputs()
    params["bias"] = jnp.float32(0.3)
    sums = loss.loss(params, table, states, targets)
    p = 1 / (1 + np.exp(-(transform(params["hidden"], np.float64(states)) @ np.float64(params["kernel"]) + 0.3)))
    dense = -np.where(targets.picked, np.log(p), np.log(1 - p)) * targets.real
    np.testing.assert_allclose(sums.loss, dense.sum(1), rtol=2e-6)
    np.testing.assert_array_equal(sums.number, targets.real.sum(1))
    np.testing.assert_array_equal(sums.right, (((p > 0.5) == targets.picked) & targets.real).sum(1))
    value, metrics = tokens.mean(sums)
    np.testing.assert_allclose(value, dense.sum() / targets.real.sum(), rtol=2e-6)
    assert metrics["token_loss"] == value


@pytest.mark.parametrize(
    ("name", "weight"),
    [("mlm", 2.0), *(pytest.param(*each, marks=pytest.mark.slow) for each in (("replaced", 2.0), ("bilm", 0.0)))],
)
def test_a_step_with_a_token_loss_is_the_same_on_any_mesh_cached_and_direct(name: str, weight: float, dataset: str) -> None:
    config = shrink(recipe("debug"), dataset)
    config.noise.ops, config.tokens.name, config.tokens.head = (("mask", 0.15),), name, "mlp"
    config.objective.weight, config.model.dropout, config.model.num_layers = weight, 0.2, 0
    config.data.update(copies=2, pack_pairs=2, pack_rows=2)
    if name == "bilm":
        config.data.update(pack_pairs=1, pack_rows=1)
        config.model.update(num_layers=1, mixer="lstm", mlp="none", norm="affine", position="none", zero_init_branches=False)
    host = next(pipeline.batches(prepared.open_split(dataset, "train"), config.data, 0))
    found = []
    for devices, micro_batch in ((1, 0), (4, 8)):
        config.micro_batch = micro_batch
        mesh = sharding.make_mesh(config.mesh, jax.devices()[:devices])
        run = build.build(config, mesh, 320, RESERVED)
        start = run.init()
        assert bool(start.params["objective"]) == bool(weight)
        state, metrics, _ = run.train_step(start, sharding.to_global(host, np.arange(16), 16, mesh))
        parts = ("loss", "token_loss", "token_accuracy", "gradient_norm")
        # The first moments are 0.1 times the clipped gradient.
        found.append(jax.device_get(({part: metrics[part] for part in parts}, state.opt_state[1].mu)))
    total = weight * metrics["batch_loss"] + metrics["token_loss"]  # both as they are without weights
    np.testing.assert_allclose(found[0][0]["loss"], total, rtol=1e-5)
    scale = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(found[0][1]))
    for values, moments in found[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6), values, found[0][0])
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6 * scale), moments, found[0][1])


def test_weight_0_builds_no_token_loss() -> None:
    config = make_config(name="mlm", weight=0.0)
    assert tokens.make_token_loss(config, D, W) is None


def test_m3_elmos_two_language_models_equal_the_dense_formula() -> None:
    config = make_config(name="bilm")
    config.model.update(mixer="lstm", mlp="none", norm="affine")
    loss = tokens.make_token_loss(config, D, W)
    params, (table, states, targets) = loss.init(jax.random.key(0)), inputs()
    sums = loss.loss(params, table, states, targets)
    expected, count, right = np.zeros(N), np.zeros(N), np.zeros(N)
    for number, step in enumerate((1, -1)):
        x = np.float64(states)[:, :, number * D // 2 : (number + 1) * D // 2] @ np.float64(params["kernel"][number])
        logits = x @ np.float64(table)[:W].T
        for row in range(N):
            for place in range(L):
                if 0 <= place + step < L and targets.real[row, place] and targets.real[row, place + step]:
                    token = targets.token[row, place + step]
                    expected[row] += np.log(np.exp(logits[row, place]).sum()) - logits[row, place, token]
                    right[row] += logits[row, place].argmax() == token
                    count[row] += 1
    np.testing.assert_allclose(sums.loss, expected, rtol=2e-6)
    np.testing.assert_array_equal(sums.number, count)
    np.testing.assert_array_equal(sums.right, right)
    config.model.update(mlp="gelu", norm="layernorm")
    with pytest.raises(
        UserError, match="^config.tokens.name='bilm': .* set config.model.mlp='none', config.model.norm='affine'$"
    ):
        tokens.make_token_loss(config, D, W)
    config.model.update(mlp="none", norm="affine")
    config.data.pack_pairs = 2
    with pytest.raises(
        UserError, match="^config.data.pack_pairs=2: config.tokens.name='bilm' would predict .*; set config.data.pack_pairs=1$"
    ):
        tokens.make_token_loss(config, D, W)
