"""UniVAE's bottleneck: draws have their distribution, and nothing but the latents passes from the first text to the second."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from scipy import special

from contrastive_jax.config import UserError, default_config
from contrastive_jax.config.dense import vector_size
from contrastive_jax.models import encoder as encoder_lib
from contrastive_jax.models.attention import attention_mask
from contrastive_jax.models.dropout import Noise
from contrastive_jax.models.latent import sample_direction
from contrastive_jax.models.layer_context import LayerContext


def model_config(**changes: object) -> ConfigDict:
    model = default_config().model
    model.update(num_layers=3, d_model=16, num_heads=4, num_kv_heads=4, head_dim=4, d_ff=32, init_std=0.3, pooling="cls")
    model.update(latent=6, latent_layers=2, part_mask="bottleneck", attention="plain")
    model.update(changes)
    return model


@pytest.mark.parametrize("kappa", [1.0, 32.0, 1e4])
def test_row60_draws_have_the_mean_cosine_of_their_distribution(kappa: float) -> None:
    n, k = 20_000, 16
    mean = np.random.default_rng(0).normal(size=(n, k)).astype(np.float32)
    mean /= np.linalg.norm(mean, axis=1, keepdims=True)
    z = np.asarray(sample_direction(jnp.asarray(mean), kappa, Noise(jax.random.key(0), np.arange(n, dtype=np.int32))))
    np.testing.assert_allclose(np.linalg.norm(z, axis=1), 1, atol=1e-5)
    cosine = (z * mean).sum(1)
    expected = special.ive(k / 2, kappa) / special.ive(k / 2 - 1, kappa)
    assert abs(cosine.mean() - expected) < 4 * cosine.std() / np.sqrt(n) + 1e-5
    rest = z - cosine[:, None] * mean
    assert np.abs((rest / np.linalg.norm(rest, axis=1, keepdims=True)).mean(0)).max() < 4 / np.sqrt(n * k)


def test_row60_the_masks_are_univaes() -> None:
    """Within a part only, the second one causal; in the last layers all see place 0 too."""
    segment = jnp.array([[1, 1, 1, 2, 2, 2]])
    context = LayerContext(segment, jnp.arange(6)[None], joined=True)
    below, above = (
        np.asarray(attention_mask(model_config(), context._replace(passes=jnp.bool_(passes))))[0] for passes in (False, True)
    )
    expected = np.zeros((6, 6), bool)
    expected[:3, :3], expected[3:, 3:] = True, np.tri(3, dtype=bool)
    np.testing.assert_array_equal(below, expected)
    expected[3:, 0] = True
    np.testing.assert_array_equal(above, expected)


def test_row60_the_second_text_depends_on_the_latents_alone_and_they_are_the_embedding() -> None:
    model = model_config()
    encoder = encoder_lib.make_encoder(model, 64)
    params = encoder.init(jax.random.key(0))
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(8, 64, (4, 12)), jnp.int32)
    segment = jnp.tile(jnp.repeat(jnp.array([1, 2]), 6), (4, 1))
    first = encoder.encode(params, tokens, segment, joined=True)
    other = encoder.encode(params, tokens.at[:, 3].add(1) % 64, segment, joined=True)
    assert first.z.shape == (4, 12) and vector_size(model) == 12
    np.testing.assert_allclose(np.linalg.norm(first.z, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(np.asarray(first.z).reshape(4, 2, 6), axis=2), 0.5**0.5, atol=1e-6)
    np.testing.assert_allclose(first.z, encoder.apply(params, tokens[:, :6], segment[:, :6]), atol=1e-6)
    assert np.abs(first.z - other.z).max() > 1e-3 and np.abs(first.states - other.states)[:, 6:].max() > 1e-4
    # With the latents' way out closed, whose bias stays, the second text knows nothing of the first.
    latent = params["transformer"]["blocks"]["latent"]
    latent["leave"]["kernel"] = jnp.zeros_like(latent["leave"]["kernel"])
    model.latent_layers = 1  # else place 0 attends to its own text in the layer before the last
    closed = encoder_lib.make_encoder(model, 64)
    states = [closed.encode(params, x, segment, joined=True).states for x in (tokens, tokens.at[:, 3].add(1) % 64)]
    np.testing.assert_array_equal(states[0][:, 6:], states[1][:, 6:])


def test_row60_a_high_concentration_is_an_autoencoder() -> None:
    tokens = jnp.asarray(np.random.default_rng(0).integers(8, 64, (4, 12)), jnp.int32)
    segment = jnp.tile(jnp.repeat(jnp.array([1, 2]), 6), (4, 1))
    differences = []
    for kappa in (32.0, 1e4):
        encoder = encoder_lib.make_encoder(model_config(latent_kappa=kappa), 64)
        params = encoder.init(jax.random.key(0))
        drawn, mean = (encoder.encode(params, tokens, segment, rng, joined=True).states for rng in (jax.random.key(1), None))
        differences.append(float(jnp.abs(drawn - mean)[:, 6:].mean()))
    assert differences[1] < differences[0] / 10


def test_row60_more_latent_layers_than_layers_are_refused() -> None:
    with pytest.raises(UserError, match="^config.model.latent=6: needs config.model.latent_layers=4 or more layers"):
        encoder_lib.make_encoder(model_config(latent_layers=4), 64)
