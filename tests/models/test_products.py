"""Products with factors in bfloat16 and sums in float32: value and gradients, and an encoder that is made of them."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from models.test_encoder import make_model, make_rows, model_config

from contrastive_jax.models import ops


def rounded(x: np.ndarray) -> np.ndarray:
    return x.astype(ml_dtypes.bfloat16).astype(np.float64)


@pytest.mark.parametrize("rows", [(3, 5), (7,)], ids=["tokens", "vectors"])
def test_value_and_gradients_are_float64_products_of_the_rounded_factors(rows: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    x, kernel, g = (rng.normal(size=shape).astype(np.float32) for shape in ((*rows, 64), (64, 48), (*rows, 48)))
    y, backward = jax.vjp(ops.bfloat16_product, jnp.asarray(x), jnp.asarray(kernel))
    of_x, of_kernel = backward(jnp.asarray(g))
    assert {y.dtype, of_x.dtype, of_kernel.dtype} == {jnp.dtype(jnp.float32)}
    for found, expected in (
        (y, rounded(x) @ rounded(kernel)),
        (of_x, rounded(g) @ rounded(kernel).T),
        (of_kernel, rounded(x).reshape(-1, 64).T @ rounded(g).reshape(-1, 48)),
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert np.abs(y - x.astype(np.float64) @ kernel).max() > 1e-3  # the factors were rounded


def test_int8_products_are_exact_sums_of_the_rounded_factors() -> None:
    rng = np.random.default_rng(0)
    x, kernel = (rng.normal(size=shape).astype(np.float32) for shape in ((3, 5, 64), (64, 48)))
    scales = np.abs(x).max(-1, keepdims=True) / 127, np.abs(kernel).max(0, keepdims=True) / 127
    expected = (np.round(x / scales[0]) @ np.round(kernel / scales[1])) * scales[0] * scales[1]
    y = ops.int8_product(jnp.asarray(x), jnp.asarray(kernel))
    assert np.isclose(y, expected, rtol=1e-5, atol=1e-5).mean() > 0.999  # a factor at .5 may be rounded either way
    np.testing.assert_array_equal(ops.int8_product(jnp.asarray(x[:, 0]), jnp.asarray(kernel)), y[:, 0])


@pytest.mark.parametrize("scan", [False, True])
def test_embeddings_and_gradients_are_near_to_those_of_float32_products(scan: bool) -> None:
    tokens, mask = make_rows()
    found = {}
    for products in ("float32", "bfloat16"):
        model, params = make_model(model_config(products=products, scan=scan, embedding_dim=8))
        assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(params))
        z, gradient = jax.value_and_grad(lambda p, model=model: model.apply(p, tokens, mask)[:, :3].sum())(params)
        found[products] = [np.asarray(z), *map(np.asarray, jax.tree.leaves(gradient))]
    for exact, near in zip(found["float32"], found["bfloat16"], strict=True):
        assert np.linalg.norm(near - exact) < 0.03 * np.linalg.norm(exact) + 1e-6
    assert any((near != exact).any() for exact, near in zip(found["float32"], found["bfloat16"], strict=True))
