"""Bounds on mutual information: known values, their order, and MINE's moving average."""

import dense
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from objectives.composition import E, distance, embeddings, ids, make, objective_config

from contrastive_jax.config import UserError
from contrastive_jax.objectives import pairs
from contrastive_jax.objectives.objective import PairIds

MI, D, K = 2.0, 20, 4096
RHO = np.sqrt(1 - np.exp(-2 * MI / D))  # -d/2 log(1 - rho²) = 2


def gaussian_pairs(log_ratio_plus: float) -> tuple[jax.Array, dict]:
    """Vectors of K Gaussian pairs whose inner product and bias are the optimal critic, log p(x, y) / p(x) p(y) + a constant."""
    rng, scale = np.random.default_rng(0), 1 - RHO**2
    x = rng.normal(size=(K, D))
    y = RHO * x + np.sqrt(scale) * rng.normal(size=(K, D))

    def square(v: np.ndarray) -> np.ndarray:
        return -(RHO**2) * np.square(v).sum(1, keepdims=True) / (2 * scale)

    one = np.ones((K, 1))
    z = np.stack([np.hstack([RHO * x / scale, square(x), one]), np.hstack([y, one, square(y)])], axis=1)
    return jnp.asarray(z, jnp.float32), {"log_temperature": jnp.float32(0), "bias": jnp.float32(MI + log_ratio_plus)}


def bound(name: str, log_ratio_plus: float = 0.0) -> tuple[float, dict]:
    z, params = gaussian_pairs(log_ratio_plus)
    host = PairIds(jnp.arange(K), jnp.arange(2 * K).reshape(K, 2))
    objective = pairs.make_objective(objective_config(name=name, block=1024, temperature=1.0), 2, D + 2)
    value, metrics = jax.jit(objective.loss)(z, host, objective.init(jax.random.key(0)) | params)
    return -float(value), metrics


def test_row52_m11_bounds_of_gaussian_pairs_with_the_optimal_critic() -> None:
    dv, nwj = bound("dv")[0], bound("nwj", 1.0)[0]
    infonce, metrics = bound("infonce")
    information = float(metrics["mutual_information"])
    assert nwj <= dv + 1e-5
    for value in (dv, nwj, information):
        assert abs(value - MI) < 0.05 * MI
    assert information <= np.log(K)
    np.testing.assert_allclose(information, np.log(K) + infonce, rtol=1e-5)
    # With the best of critics the Jensen-Shannon objective is 2 log 2 - 2 JS(P || Q), of one-dimensional log ratios.
    z, _ = gaussian_pairs(0.0)
    s = np.asarray(z[:, 0] @ z[:, 1].T, np.float64) + MI
    soft = np.logaddexp(0, s)
    expected = (soft - s).diagonal().mean() + (soft.sum() - soft.trace()) / (K * (K - 1))
    np.testing.assert_allclose(bound("jsd")[0], -expected, rtol=1e-5)


def test_row52_nwj_at_the_best_bias_is_dv() -> None:
    z, host = embeddings(2), ids(2)

    def losses(name: str, biases: list[float]) -> list[float]:
        loss = jax.jit(make(objective_config(name=name, temperature=0.2)).loss)
        values = [loss(z, host, {"log_temperature": jnp.log(0.2), "bias": jnp.float32(bias)}) for bias in biases]
        return [float(value) for value, _ in values]

    dv, shifted = losses("dv", [0.0, 5.0])
    np.testing.assert_allclose(dv, shifted, rtol=1e-5)  # it does not see a constant
    allowed, keep = dense.negatives(objective_config(), host, 1)
    s = np.asarray(z[:, 0] @ z[:, 1].T, np.float64) / 0.2
    best = 1 - float(np.log(np.exp(s)[allowed[:, :, 0]].mean()))
    np.testing.assert_allclose(dv, 1 - best - s.diagonal()[keep].mean(), rtol=1e-5)
    low, at_best, high = losses("nwj", [best - 0.5, best, best + 0.5])
    np.testing.assert_allclose(at_best, dv, rtol=1e-5)
    assert min(low, high) > at_best


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_row52_mine_divides_the_gradient_by_a_moving_average(decay: float) -> None:
    """Three batches, each against the gradient of E_Q[e^s] / average - E_P[s]; with a decay of 0 that is DV's."""
    config, host = objective_config(name="mine", average_decay=decay, temperature=0.5), ids(2)
    mine, dv = make(config), make(objective_config(name="dv", temperature=0.5))
    allowed, keep = (jnp.asarray(x) for x in dense.negatives(config, host, 1))

    def expectations(z: jax.Array) -> tuple[jax.Array, jax.Array]:
        """E_P[s] and E_Q[e^s]."""
        s = z[:, 0] @ z[:, 1].T / 0.5
        return s.diagonal()[keep].mean(), jnp.where(allowed[:, :, 0], jnp.exp(s), 0).sum() / allowed.sum()

    params, average = mine.init(jax.random.key(0)), None
    for seed in range(3):
        z = embeddings(2, seed)
        now = float(expectations(z)[1])
        average = now if average is None else decay * average + (1 - decay) * now
        by_hand = jax.grad(lambda z, average: expectations(z)[1] / average - expectations(z)[0])(z, average)
        (value, metrics), gradient = jax.value_and_grad(mine.loss, has_aux=True)(z, host, params)
        of_dv, gradient_of_dv = jax.value_and_grad(lambda z, params: dv.loss(z, host, params)[0])(z, params)
        np.testing.assert_allclose(value, of_dv, rtol=1e-6)
        assert distance(gradient, by_hand) < 1e-5
        assert (distance(gradient, gradient_of_dv) < 1e-6) == (not decay or seed == 0)
        params = mine.project(params, metrics)
        np.testing.assert_allclose(np.exp(params["log_average"]), average, rtol=1e-5)


def test_row52_one_moving_average_refuses_several_prefixes() -> None:
    with pytest.raises(UserError, match="config.objective.matryoshka"):
        make(objective_config(name="mine", matryoshka=((4, 1.0), (E, 1.0))))


def test_m5_siglip_with_the_bias_of_its_noise_is_nce() -> None:
    """Gutmann and Hyvärinen's loss of words of unequal frequency, with log p(y | x) = s + log Pn(y) and k noise words."""
    rng = np.random.default_rng(0)
    z, noise = np.asarray(embeddings(2), np.float64), rng.dirichlet(np.ones(24))
    k = len(z) - 1
    log_model = z[:, 0] @ z[:, 1].T / 0.2 + np.log(noise)  # of word j after word i
    data = 1 / (1 + np.exp(np.log(k * noise) - log_model))  # the probability that word j comes from the text
    expected = -(np.log(data).trace() + np.log1p(-data).sum() - np.log1p(-data).trace()) / len(z)
    objective = make(objective_config(name="siglip", bias=-np.log(k), temperature=0.2))
    host = PairIds(np.arange(24), np.arange(48).reshape(24, 2))
    params = objective.init(jax.random.key(0))
    np.testing.assert_allclose(jax.jit(objective.loss)(jnp.asarray(z), host, params)[0], expected, rtol=1e-5)
