"""Fused attention equals the plain one in value and gradient; the Pallas kernel is interpreted here."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import base
from contrastive_jax import sharding
from contrastive_jax.models import attention
from contrastive_jax.models.layout import Layout
from contrastive_jax.models.rows import Noise, Rows


def model(**changes: object) -> ConfigDict:
    config = base.get_config().model
    config.update(num_heads=4, num_kv_heads=4, head_dim=16, **changes)
    return config


def packed(n: int, length: int, seed: int = 0) -> np.ndarray:
    """Rows of a few spans and padding at the end; the first row is one whole span."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(n):
        sizes = rng.multinomial(length - 4, [0.4, 0.3, 0.2, 0.1]) + 1
        rows.append(np.repeat([1, 2, 3, 0], sizes))
    rows[0] = np.ones(length, int)
    return np.array(rows, np.int32)


def check(
    config: ConfigDict,
    layout: Layout,
    n: int,
    length: int,
    other: attention.Attend,
    window: int | None = None,
    noise: Noise | None = None,
    dtype: type = jnp.float32,
    bound: float = 2e-6,
) -> None:
    rng = np.random.default_rng(1)
    shapes = [(n, length, heads, config.head_dim) for heads in (config.num_heads, config.num_kv_heads, config.num_kv_heads)]
    inputs = [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]
    segment = packed(n, length)
    weight = rng.normal(size=shapes[0]) * (segment > 0)[:, :, None, None]  # padding is nobody's business
    place, size = jnp.arange(length)[None], None if window is None else jnp.int32(window)
    given = Rows(jnp.asarray(segment), place, size, noise=noise)

    def run(attend: attention.Attend, kind: type) -> list[np.ndarray]:
        def loss(inputs: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
            out = attend(*inputs, given)
            assert out.dtype == kind
            return (out.astype(jnp.float32) * weight).sum(), out * (weight != 0)

        (_, out), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))([x.astype(kind) for x in inputs])
        return [np.asarray(x, np.float32) for x in (out, *gradients)]

    plain = run(functools.partial(attention.plain, config), jnp.float32)  # of the same, rounded, inputs
    for expected, found in zip(plain, run(other, dtype), strict=True):
        assert np.linalg.norm(found - expected) <= bound * np.linalg.norm(expected)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [5, 130, 300])
def test_kernel_equals_plain(causal: bool, length: int) -> None:
    config = model(causal=causal)
    layout = Layout()
    check(config, layout, 3, length, functools.partial(attention.fused, config, layout))


@pytest.mark.parametrize("causal", [False, True])
def test_kernel_with_grouped_heads_window_and_dropout(causal: bool) -> None:
    config = model(causal=causal, attention_dropout=0.3)
    config.num_kv_heads = 2
    noise = Noise(jax.random.key(3), jnp.array([7, 1, 4]))
    layout = Layout()
    check(config, layout, 3, 140, functools.partial(attention.fused, config, layout), window=9, noise=noise)


@pytest.mark.parametrize("tensor", [1, 2])
def test_kernel_on_eight_devices(tensor: int) -> None:
    config = model(causal=True, attention_dropout=0.2)
    config.num_kv_heads = 2
    mesh_config = ConfigDict({"data": 2, "fsdp": -1, "tensor": tensor})
    layout = Layout(sharding.make_mesh(mesh_config), sharding.BATCH[0], "tensor")
    noise = Noise(jax.random.key(3), jnp.arange(16))
    check(config, layout, 16, 40, functools.partial(attention.fused, config, layout), noise=noise)


def test_kernel_in_bfloat16_stays_near_float32() -> None:
    config = model()
    layout = Layout()
    fused = functools.partial(attention.fused, config, layout)
    check(config, layout, 3, 200, fused, dtype=jnp.bfloat16, bound=0.01)


@pytest.mark.parametrize(("causal", "window"), [(False, None), (True, None), (False, 7)])
def test_the_gpu_path_equals_plain(causal: bool, window: int | None) -> None:
    """The call for cuDNN, run by XLA: what cuDNN itself computes only a GPU can tell."""
    config = model(causal=causal)
    config.num_kv_heads = 2
    other = functools.partial(attention.cudnn, config, implementation="xla")
    check(config, Layout(), 3, 50, other, window=window)


def test_auto_is_plain_on_cpu_and_fused_says_what_it_cannot() -> None:
    config = model()
    assert attention.make(config, Layout()).func is attention.plain
    config.attention = "fused"
    attend = attention.make(config, Layout())
    rows = jnp.zeros((1, 4224, 4, 16))
    with pytest.raises(ValueError, match="rows of at most 4096 tokens"):
        attend(rows, rows, rows, Rows(jnp.ones((1, 4224), jnp.int32), jnp.arange(4224)[None]))
