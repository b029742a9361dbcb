"""Deep InfoMax's measures of a representation, against distributions whose information is known."""

import types

import jax
import numpy as np
import pytest

from contrastive_jax.evals import information, query_key
from contrastive_jax.evals.task import Options


def measure(samples: np.ndarray, parts: list[int], seed: int = 0) -> float:
    return float(information.divergence(jax.random.key(seed), samples.astype(np.float32), np.array(parts)))


def test_m10_mine_finds_the_information_of_gaussians() -> None:
    rng, dim = np.random.default_rng(0), 4
    rho = (1 - np.exp(-2 / dim)) ** 0.5  # 1 nat: -dim / 2 log(1 - rho²)
    x, noise = rng.normal(size=(2, 10_000, dim))
    samples = np.concatenate([x, rho * x + (1 - rho**2) ** 0.5 * noise], axis=1)
    parts = [0] * dim + [1] * dim
    assert measure(samples, parts) == pytest.approx(1, rel=0.1)
    assert measure(np.concatenate([x, noise], axis=1), parts) == pytest.approx(0, abs=0.02)


@pytest.mark.slow
def test_m10_mine_finds_information_without_correlation() -> None:
    x, noise = np.random.default_rng(0).normal(size=(2, 10_000))
    # |x| decides y up to noise: E[x y] = 0, and a quadratic form of (x, y) sees nothing.
    y = np.sign(np.abs(x) - 0.6745) + 0.1 * noise
    samples = np.stack([x, y], axis=1)
    assert 0.5 < measure(samples, [0, 1]) < 1.1 * np.log(2)
    assert measure(samples, [0, 1]) == measure(samples, [0, 1]) != measure(samples, [0, 1], seed=1)


def test_m10_ndm_is_zero_for_independent_coordinates_and_large_for_copies() -> None:
    rng = np.random.default_rng(0)
    z = rng.normal(size=(10_000, 8))
    covariance = 0.6 + 0.4 * np.eye(3)
    correlated = rng.multivariate_normal(np.zeros(3), covariance, 10_000)
    assert measure(z, [*range(8)]) == pytest.approx(0, abs=0.02)
    assert measure(correlated, [0, 1, 2]) == pytest.approx(-0.5 * np.linalg.slogdet(covariance)[1], rel=0.1)
    assert measure(np.concatenate([z[:, :4], z[:, :4]], axis=1), [*range(8)]) > 4


def test_m10_the_task_measures_texts_views_and_coordinates() -> None:
    rng, n = np.random.default_rng(0), 1600
    query, noise = rng.normal(size=(2, n, 8))
    query[:, 1] = query[:, 0]  # dependent coordinates
    z = np.stack([query, 0.8 * query + 0.6 * noise], axis=1).reshape(2 * n, 8)
    tokens = np.arange(2 * n, dtype=np.int32).reshape(n, 2, 1)  # each text is one token, which says nothing of the others
    pairs = query_key.Pairs(tokens, tokens >= 0, tokens, np.arange(n))
    model = types.SimpleNamespace(forward=lambda tokens, mask: z[tokens[:, 0]].astype(np.float32))
    data = query_key.HeldOut(pairs, lambda: ([], []), True, 800, {"seed": 0})
    rows = {name: row["nats"] for name, row in information.TASK.score(model, data, Options()).items()}
    assert rows.keys() == {"mine_input", "mine_views", "ndm"}
    assert rows["mine_input"] < 0.1 and rows["mine_views"] > 1.5 and rows["ndm"] > 1.5
    assert information.TASK.protocol(model, data, Options()).items() >= {"coordinates": 16, "seed": 0}.items()
