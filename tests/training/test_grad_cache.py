"""Gradient caching: micro-batches of any size give the direct embeddings and gradients."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import shrink

from configs import debug
from contrastive_jax.config import UserError, default_config
from contrastive_jax.models import encoder
from contrastive_jax.runtime import sharding
from contrastive_jax.training import build, grad_cache

B, LENGTH, VOCAB = 24, 7, 50


def rows() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    mask = np.arange(LENGTH) < rng.integers(1, LENGTH + 1, (B, 1))
    return {
        "tokens": rng.integers(0, VOCAB, (B, LENGTH)).astype(np.int32),
        "segment": mask.astype(np.int32),
        "row": np.arange(B, dtype=np.int32),
    }


@pytest.mark.parametrize(
    ("micro_batch", "devices", "rows_at_once"), [(64, 1, 24), (23, 1, 12), (16, 1, 12), (8, 1, 8), (16, 8, 16), (64, 8, 24)]
)
def test_micro_batches_are_even_and_no_larger_than_the_batch(micro_batch: int, devices: int, rows_at_once: int) -> None:
    seen = set()

    def encode(params: dict, x: jax.Array) -> jax.Array:
        seen.add(len(x))
        return x * params["factor"]

    mesh = sharding.make_mesh(default_config().mesh, jax.devices()[:devices])
    cached = grad_cache.cached(encode, micro_batch, mesh, sharding.BATCH_AXES)
    x = np.arange(2.0 * B).reshape(B, 2)
    np.testing.assert_array_equal(jax.jit(cached)({"factor": 3.0}, x), 3 * x)
    assert seen == {rows_at_once}


@pytest.mark.parametrize(
    ("micro_batch", "devices"),
    [pytest.param(7, 1, marks=pytest.mark.slow), (16, 8), pytest.param(12, 4, marks=pytest.mark.slow)],
)  # 7, and 16 of 24: a ragged end
def test_equals_direct_with_dropout_and_a_token_loss(micro_batch: int, devices: int) -> None:
    config = default_config().model
    config.update(num_layers=1, d_model=8, num_heads=2, num_kv_heads=2, head_dim=4, d_ff=16, dropout=0.3, attention_dropout=0.2)
    model = encoder.make_encoder(config, VOCAB)
    params = jax.jit(model.init)(jax.random.key(0))
    mesh = sharding.make_mesh(default_config().mesh, jax.devices()[:devices])
    batch = sharding.to_global(rows(), np.arange(B), B, mesh)

    def encode(params: dict, batch: dict) -> dict:
        z = model.apply(params, batch["tokens"], batch["segment"], jax.random.key(3), batch["row"])
        # A loss of tokens: its sum and its count a row, so that the mean is over the whole batch's tokens.
        logits = z @ params["transformer"]["embedding"].T
        token_loss = -jnp.take_along_axis(jax.nn.log_softmax(logits), batch["tokens"], axis=1) * batch["segment"]
        return {"z": z, "token_loss": token_loss.sum(1), "token_count": batch["segment"].sum(1)}

    def value(embed: Callable, params: dict, batch: dict) -> tuple:
        out = embed(params, batch)
        logits = jnp.where(jnp.eye(B, dtype=bool), -1e30, out["z"] @ out["z"].T / 0.05)
        contrast = jax.nn.logsumexp(logits, axis=1).mean()
        return contrast + out["token_loss"].sum() / out["token_count"].sum(), out["z"]

    def run(embed: Callable) -> tuple:
        return jax.jit(jax.value_and_grad(functools.partial(value, embed), has_aux=True))(params, batch)

    cached = grad_cache.cached(encode, micro_batch, mesh, sharding.BATCH_AXES)
    ((got, z), gradient), ((expected, direct), reference) = run(cached), run(encode)
    np.testing.assert_allclose(z, direct, atol=1e-6)
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    # The bias of keys has no gradient but rounding: a softmax does not see it.
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(reference))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * scale), gradient, reference)


def test_activations_of_one_micro_batch_at_a_time() -> None:
    """What the step keeps grows with the micro-batch, not with the batch."""

    def temporaries(batch: int, micro_batch: int) -> int:
        config = default_config()
        config.model.update(num_layers=4, d_model=32, d_ff=128, num_heads=2, num_kv_heads=2, head_dim=16)
        config.data.update(batch_size=batch)
        config.micro_batch = micro_batch
        mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
        run = build.build(config, mesh, VOCAB)
        shapes = build.batch_shapes(config, mesh)
        return run.train_step.lower(run.shapes, shapes).compile().memory_analysis().temp_size_in_bytes

    direct, cached = temporaries(256, 0), temporaries(256, 16)
    assert cached < direct / 6
    assert temporaries(512, 16) < 1.5 * cached


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"micro_batch": 12}, "config.micro_batch=12 must be a multiple of mesh.data × mesh.fsdp × data.pack_pairs = 8"),
        ({"micro_batch": 8, "micro_batch_tokens": 4096}, "at most one of them may be set"),
        ({"micro_batch_tokens": 100}, "on each of 8 shards has 384 tokens"),
    ],
)
def test_bad_micro_batches_name_the_key(changes: dict, message: str, dataset: str) -> None:
    config = shrink(debug.get_config(), dataset)
    config.update(changes)
    with pytest.raises(UserError, match=message):
        build.build(config, sharding.make_mesh(config.mesh), VOCAB)


def test_a_budget_of_tokens_is_rounded_down(dataset: str) -> None:
    config = shrink(debug.get_config(), dataset)
    config.micro_batch_tokens = 2 * 24 * 20
    assert build.micro_batch_pairs(config, sharding.make_mesh(config.mesh)) == 16
