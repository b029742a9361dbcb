"""Fused attention equals the plain one in value and gradient; the Pallas kernel is interpreted here."""

import functools
import logging
import pathlib
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import recipe, shrink
from ml_collections import ConfigDict

from contrastive_jax.config import UserError, default_config
from contrastive_jax.data import pipeline, prepared
from contrastive_jax.inference import batching
from contrastive_jax.models import attention, encoder, fused_attention
from contrastive_jax.models.dropout import Noise
from contrastive_jax.models.layer_context import LayerContext
from contrastive_jax.planning import hardware
from contrastive_jax.runtime import sharding
from contrastive_jax.runtime.layout import Layout, on_mesh


def model_config(**changes: object) -> ConfigDict:
    config = default_config().model
    config.update(num_heads=4, num_kv_heads=4, head_dim=16, **changes)
    return config


def packed_segments(n: int, length: int, seed: int = 0) -> np.ndarray:
    """Returns segments int32[n length]: each row has three spans and padding at the end, but the first row is one span."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(n):
        sizes = rng.multinomial(length - 4, [0.4, 0.3, 0.2, 0.1]) + 1
        rows.append(np.repeat([1, 2, 3, 0], sizes))
    rows[0] = np.ones(length, int)
    return np.array(rows, np.int32)


def check_equals_plain(
    config: ConfigDict,
    layout: Layout,
    n: int,
    length: int,
    other: attention.Attend,
    window: int | None = None,
    noise: Noise | None = None,
    dtype: type = jnp.float32,
    bound: float = 2e-6,
    span_length: np.ndarray | None = None,
) -> None:
    """Compares value and gradient; with `span_length` int32[n] a row is a span and padding, without it rows are packed."""
    rng = np.random.default_rng(1)
    shapes = [(n, length, heads, config.head_dim) for heads in (config.num_heads, config.num_kv_heads, config.num_kv_heads)]
    inputs = [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]
    segment = packed_segments(n, length)
    if span_length is not None:
        segment = (np.arange(length) < span_length[:, None]).astype(np.int32)
    weight = rng.normal(size=shapes[0]) * (segment > 0)[:, :, None, None]  # the output on padding does not matter
    position, window_size = jnp.arange(length)[None], None if window is None else jnp.int32(window)
    lengths = None if span_length is None else jnp.asarray(span_length)
    context = LayerContext(jnp.asarray(segment), position, lengths, window_size, noise=noise)

    def run(attend: attention.Attend, kind: type) -> list[np.ndarray]:
        def loss(inputs: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
            out = attend(*inputs, context)
            assert out.dtype == kind
            return (out.astype(jnp.float32) * weight).sum(), out * (weight != 0)

        (_, out), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))([x.astype(kind) for x in inputs])
        return [np.asarray(x, np.float32) for x in (out, *gradients)]

    plain = run(functools.partial(attention.plain, config), jnp.float32)  # of the same inputs, rounded to `dtype`
    for expected, actual in zip(plain, run(other, dtype), strict=True):
        assert np.linalg.norm(actual - expected) <= bound * np.linalg.norm(expected)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [5, 130, 300])
def test_kernel_equals_plain(causal: bool, length: int) -> None:
    config = model_config(causal=causal)
    layout = Layout()
    check_equals_plain(config, layout, 3, length, functools.partial(attention.fused, config, layout))


@pytest.mark.parametrize("causal", [False, True])
def test_kernel_with_grouped_heads_window_and_dropout(causal: bool) -> None:
    config = model_config(causal=causal, attention_dropout=0.3)
    config.num_kv_heads = 2
    noise = Noise(jax.random.key(3), jnp.array([7, 1, 4]))
    layout = Layout()
    check_equals_plain(config, layout, 3, 140, functools.partial(attention.fused, config, layout), window=9, noise=noise)


@pytest.mark.parametrize("tensor", [1, 2])
def test_kernel_on_eight_devices(tensor: int) -> None:
    config = model_config(causal=True, attention_dropout=0.2)
    config.num_kv_heads = 2
    mesh_config = ConfigDict({"data": 2, "fsdp": -1, "tensor": tensor})
    layout = on_mesh(sharding.make_mesh(mesh_config))
    noise = Noise(jax.random.key(3), jnp.arange(16))
    check_equals_plain(config, layout, 16, 40, functools.partial(attention.fused, config, layout), noise=noise)


def test_kernel_in_bfloat16_stays_near_float32() -> None:
    config = model_config()
    layout = Layout()
    fused = functools.partial(attention.fused, config, layout)
    check_equals_plain(config, layout, 3, 200, fused, dtype=jnp.bfloat16, bound=0.01)


@pytest.mark.parametrize(
    ("mesh", "width", "dtype", "bound"),
    [(None, 16, "float32", 3e-6), (1, 64, "float32", 3e-6), (2, 32, "float32", 3e-6), (None, 64, "bfloat16", 0.02)],
)
def test_projections_and_kernel_as_one_function_equal_plain(mesh: int | None, width: int, dtype: str, bound: float) -> None:
    """On one device and on eight, of which 1 or 2 share the heads; two heads of 64 lie beside each other in the lanes."""
    config = model_config(causal=True, attention_dropout=0.2, dtype=dtype)
    config.head_dim = width
    layout = Layout()
    if mesh:
        layout = on_mesh(sharding.make_mesh(ConfigDict({"data": 2, "fsdp": -1, "tensor": mesh})))
    rng = np.random.default_rng(2)
    n, length, d, m = 16, 40, 24, config.num_heads * width
    x = jnp.asarray(rng.normal(size=(n, length, d)), dtype)
    kernels = tuple(jnp.asarray(rng.normal(size=(d, m)) / d**0.5, dtype) for _ in range(3))
    segment = packed_segments(n, length)
    weight = rng.normal(size=(n, length, m)) * (segment > 0)[:, :, None]
    noise = Noise(jax.random.key(3), jnp.arange(n))
    context = LayerContext(jnp.asarray(segment), jnp.arange(length)[None], noise=noise)

    def separate(x: jax.Array, kernels: tuple) -> jax.Array:
        heads = ((x @ kernel).reshape(n, length, -1, width) for kernel in kernels)
        return attention.plain(config, *heads, context).reshape(n, length, m)

    def run(attend: Callable, *inputs: Any) -> list[np.ndarray]:
        def loss(*inputs: Any) -> tuple[jax.Array, jax.Array]:
            out = attend(*inputs).astype(jnp.float32) * weight
            return out.sum(), out

        (_, out), gradients = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(*inputs)
        return [np.asarray(y, np.float32) for y in jax.tree.leaves((out, gradients))]

    wide = jax.tree.map(lambda y: y.astype(jnp.float32), (x, kernels))  # the same inputs, rounded to `dtype`
    expected = run(separate, *wide)
    actual = run(lambda x, kernels: fused_attention.project_and_attend(config, layout, x, kernels, context), x, kernels)
    for one, other in zip(expected, actual, strict=True):
        assert np.linalg.norm(other - one) <= bound * np.linalg.norm(one)


@pytest.mark.parametrize(
    ("changes", "projects"),
    [
        ({}, True),
        ({"num_kv_heads": 2}, False),
        ({"position": "rotary"}, False),
        ({"bias": True}, False),
        ({"attention": "auto"}, False),
    ],
)
def test_an_encoder_projects_in_the_kernel_where_it_may(changes: dict, projects: bool) -> None:
    """With equal vectors and gradients: those of the other attention."""
    config = model_config(attention="fused", bias=False, position="learned", num_layers=2, d_model=32, remat="attention")
    config.update(max_length=12, d_ff=32, **changes)
    assert attention.projects_with_kernel(config, Layout()) == projects
    tokens = np.random.default_rng(0).integers(4, 50, (3, 12)).astype(np.int32)
    segment = (np.arange(12) < np.array([[12], [5], [1]])).astype(np.int32)

    def gradient(kind: str) -> Any:
        own = config.copy_and_resolve_references()
        own.attention = kind
        model = encoder.make_encoder(own, 50)
        params = model.init(jax.random.key(0))
        return jax.jit(jax.value_and_grad(lambda p: jnp.sum(model.apply(p, tokens, segment)[:, :3])))(params)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), gradient("plain"), gradient("fused"))


@pytest.mark.parametrize(("causal", "window"), [(False, None), (True, None), (False, 7)])
def test_the_gpu_path_equals_plain(causal: bool, window: int | None) -> None:
    """The call for cuDNN is run by XLA here; only a GPU can test cuDNN itself."""
    config = model_config(causal=causal)
    config.num_kv_heads = 2
    other = functools.partial(attention.cudnn, config, implementation="xla")
    check_equals_plain(config, Layout(), 3, 50, other, window=window)


@pytest.mark.parametrize("causal", [False, True])
def test_lengths_in_place_of_a_mask_equal_plain(causal: bool) -> None:
    """Of rows that are not packed: full ones, short ones, one with a single token, one without any."""
    config = model_config(causal=causal)
    lengths = np.array([50, 17, 1, 0, 49], np.int32)
    other = functools.partial(attention.cudnn, config, implementation="xla")
    check_equals_plain(config, Layout(), 5, 50, other, span_length=lengths)


def test_rows_that_are_not_packed_are_a_span_and_then_padding(dataset: pathlib.Path) -> None:
    """What `LayerContext.span_length` relies on, in training and in inference."""
    config = shrink(recipe("debug"), dataset)
    records = prepared.open_split(str(dataset), "train")
    batch = next(pipeline.batches(records, config.data, 0, np.arange(16)))
    assert batch.segment.max() == 1 and batch.segment.min() == 0 and (np.diff(batch.segment, axis=-1) <= 0).all()
    masks = []

    def forward(tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
        masks.append(mask)
        return np.zeros((len(tokens), 2), np.float32)

    batching.embed_ragged(forward, [[1] * size for size in (3, 40, 1, 17, 8)], 64, batching.Limits(80, 80, 80))
    assert masks and all((np.diff(mask.astype(int), axis=-1) <= 0).all() for mask in masks)


@pytest.mark.parametrize(
    ("changes", "length", "masked", "dropout", "capability", "reason"),
    [
        ({}, 129, False, False, "9.0", ""),
        ({}, 128, True, False, "8.0", ""),
        ({"head_dim": 256}, 128, False, False, "9.0", ""),
        ({"head_dim": 256}, 128, False, False, "8.6", "config.model.head_dim=256: cuDNN's needs a multiple of 8 up to 128"),
        ({"head_dim": 256}, 128, False, False, "", "config.model.head_dim=256"),
        ({"head_dim": 20}, 128, False, False, "10.0", "config.model.head_dim=20: cuDNN's needs a multiple of 8 up to 256"),
        ({"dtype": "float32"}, 128, False, False, "9.0", "config.model.dtype='float32'"),
        ({"attention_dropout": 0.1}, 128, False, True, "9.0", "config.model.attention_dropout=0.1"),
        ({}, 129, True, False, "9.0", "rows of 129 tokens"),
        ({}, 128, False, False, "7.5", "compute capability 7.5: cuDNN's needs 8.0"),
    ],
)
def test_why_not_cudnn(changes: dict, length: int, masked: bool, dropout: bool, capability: str, reason: str) -> None:
    config = model_config(dtype="bfloat16")
    config.update(changes)
    given = attention.why_not_cudnn(config, length, masked, dropout, capability)
    assert given.startswith(reason) if not reason.startswith("compute") else reason in given
    assert bool(given) == bool(reason)


class Gpu(Layout):
    """The layout of one GPU, of the generation before cuDNN's attention."""

    platform, compute_capability = "gpu", "7.5"


def test_what_cudnn_refuses_is_plain_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    config = model_config(dtype="bfloat16")
    rows = jnp.ones((1, 8, 4, 16), jnp.bfloat16)
    context = LayerContext(jnp.ones((1, 8), jnp.int32), jnp.arange(8)[None])
    attention.warn_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger="absl"):
        for _ in range(2):
            out = attention.make_attend(config, Gpu())(rows, rows, rows, context)
    np.testing.assert_array_equal(out, attention.plain(config, rows, rows, rows, context))
    assert [record.message for record in caplog.records] == [
        "attention is plain, which is slower and stores the scores: this GPU has compute capability 7.5: cuDNN's needs 8.0 "
        "(A100) or newer"
    ]
    config.attention = "fused"
    with pytest.raises(UserError, match=r"attention='fused': this GPU has compute capability 7.5.*; or choose 'plain'"):
        attention.make_attend(config, Gpu())(rows, rows, rows, context)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("causal", "packed", "mask_type"), [(True, False, "CAUSAL"), (False, False, "PADDING"), (True, True, "CAUSAL")]
)
def test_the_compiled_call_of_cudnn_has_no_array_for_a_mask(causal: bool, packed: bool, mask_type: str) -> None:
    """But for packed rows. `pip install .[plan]` first."""
    pytest.importorskip("jax_plugins.xla_cuda12")
    config = model_config(dtype="bfloat16", causal=causal)
    config.head_dim = 64
    device = hardware.describe_devices(hardware.parse_target("gpu:h100:1x1"))[0]
    layout = on_mesh(sharding.make_mesh(ConfigDict({"data": 1, "fsdp": 1, "tensor": 1}), [device]))
    attend = attention.make_attend(config, layout)

    def loss(rows: jax.Array, segment: jax.Array, length: jax.Array) -> jax.Array:
        context = LayerContext(segment, jnp.arange(128)[None], None if packed else length)
        return attend(rows, rows, rows, context).astype(jnp.float32).sum()

    one = jax.sharding.SingleDeviceSharding(device)
    shapes = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=one)
        for shape, dtype in (((8, 128, 4, 64), jnp.bfloat16), ((8, 128), jnp.int32), ((8,), jnp.int32))
    ]
    text = jax.jit(jax.grad(loss)).lower(*shapes).compile().as_text()
    assert text.count(f'"mask_type": "{mask_type}"') == 2  # forward and backward
    assert ("ScaleBiasSoftmax" in text) == packed


@pytest.mark.parametrize(
    ("heads", "width", "fills"),
    [
        (12, 64, True),
        (8, 128, True),
        (4, 256, True),
        (8, 32, True),
        (16, 96, False),
        (8, 80, False),
        (2, 192, False),
        (1, 64, False),
    ],
)
def test_the_kernel_runs_on_a_tpu_where_whole_heads_fill_its_lanes(heads: int, width: int, fills: bool) -> None:
    """Mosaic takes no block of 96 lanes, although 16 heads of 96 are a multiple of 128."""
    tpu = types.SimpleNamespace(platform="tpu", tensor_shards=1)
    config = model_config()
    config.update(num_heads=heads, num_kv_heads=heads, head_dim=width)
    assert attention.runs_kernel(config, tpu) is fills
    if not fills:
        with pytest.raises(UserError, match=f"config.model.head_dim={width} do not fill the 128 lanes of a TPU"):
            fused_attention.make_kernel_config(config, tpu, (8, 128, heads, width), 128, LayerContext(None, None))


def test_auto_is_plain_on_cpu_and_fused_refuses_long_rows() -> None:
    config = model_config()
    assert attention.make_attend(config, Layout()).func is attention.plain
    config.attention = "fused"
    attend = attention.make_attend(config, Layout())
    rows = jnp.zeros((1, 4224, 4, 16))
    with pytest.raises(UserError, match="rows of at most 4096 tokens"):
        attend(rows, rows, rows, LayerContext(jnp.ones((1, 4224), jnp.int32), jnp.arange(4224)[None]))
