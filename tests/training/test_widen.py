"""A model made twice as wide gives the same cosines, and its copies learn different things."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import recipe, shrink
from etils import epath
from ml_collections import ConfigDict

from contrastive_jax.config import UserError, default_config
from contrastive_jax.data import tokenizer
from contrastive_jax.inference import text_model
from contrastive_jax.models import encoder
from contrastive_jax.training import loop, warm_start

VOCAB, LENGTH, K = 50, 12, 3
SIZES = dict(num_layers=2, d_model=24, num_heads=4, num_kv_heads=2, head_dim=6, d_ff=20, init_std=0.2, max_length=LENGTH)
ARCHITECTURES = {
    "bert": dict(norm_position="post", final_norm=False, embedding_norm=True, position="learned", mlp="gelu_exact"),
    "gpt": dict(causal=True, position="learned", pooling="eos"),
    "modern": dict(embedding_norm=True, mlp="geglu", bias=False, local_window=3, global_every=2),
    "llama": dict(norm="rmsnorm", mlp="swiglu", pooling="cls"),
    "projected": dict(embedding_dim=10, mlp="quick_gelu"),
    "dense": dict(dense=((14, "tanh", True), (10, "identity", False))),
}


def model_config(name: str, k: int = 1) -> ConfigDict:
    config = default_config().model
    config.update(SIZES | ARCHITECTURES[name], attention="plain")
    config.update({key: k * config[key] for key in warm_start.WIDENED})
    return config


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_row58_a_widened_model_has_the_same_cosines_and_its_copies_part(name: str) -> None:
    narrow, wide = (encoder.make_encoder(model_config(name, k), VOCAB) for k in (1, K))
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(narrow.init, jax.random.key(0))

    def draw(path: tuple, x: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.asarray(rng.normal("scale" in str(path[-1]), 0.3, x.shape), jnp.float32)

    params = jax.tree_util.tree_map_with_path(draw, shapes)
    widened = warm_start.widen(params, model_config(name, K), K)
    jax.tree.map(lambda a, b: np.testing.assert_equal(a.shape, b.shape), widened, jax.eval_shape(wide.init, jax.random.key(0)))
    tokens = rng.integers(0, VOCAB, (6, LENGTH)).astype(np.int32)
    mask = np.arange(LENGTH) < np.array([2, 5, 7, 9, 11, 12])[:, None]
    z, z_wide = narrow.apply(params, tokens, mask), wide.apply(widened, tokens, mask)
    np.testing.assert_allclose(z_wide @ z_wide.T, z @ z.T, atol=1e-5)
    expected = z if name in ("projected", "dense") else np.tile(z, K) / K**0.5
    np.testing.assert_allclose(z_wide, expected, atol=1e-5)

    @jax.jit
    def step(params: dict) -> dict:
        def loss(params: dict) -> jax.Array:
            z = wide.apply(params, tokens, mask)
            return -jax.nn.log_softmax(z[:3] @ z[3:].T / 0.1).trace()

        return jax.tree.map(lambda p, g: p - 0.05 * g, params, jax.grad(loss)(params))

    for _ in range(5):
        widened = step(widened)
    copies = np.split(np.asarray(widened["transformer"]["embedding"]), K, axis=1)
    for one, other in ((0, 1), (0, 2), (1, 2)):
        used = np.unique(tokens[mask])
        assert np.abs(copies[one] - copies[other])[used].max() > 1e-4


@pytest.mark.slow
def test_row58_a_run_starts_twice_as_wide_as_another(dataset: pathlib.Path, tmp_path: pathlib.Path) -> None:
    config = shrink(recipe("debug"), dataset)
    config.steps, config.model.zero_init_branches = 2, False
    loop.train(loop.set_up(config, epath.Path(tmp_path / "narrow")), 2)
    narrow = text_model.load(str(tmp_path / "narrow"))
    config.init_from, config.init_widen = str(tmp_path / "narrow"), 2
    setup = loop.set_up(config, epath.Path(tmp_path / "wide"))
    assert [setup.config.model[key] for key in warm_start.WIDENED] == [32, 8, 8, 64]
    assert [config.model[key] for key in warm_start.WIDENED] == [16, 4, 4, 32]  # the caller's is as it was
    manifest = {"tokenizer_sha256": tokenizer.load(dataset).sha256}  # the test's dataset does not say it
    state = setup.run.init(warm_start.encoder_params(setup.config, manifest, setup.run.mesh))
    tokens = np.random.default_rng(0).integers(8, 300, (8, 12)).astype(np.int32)
    z = setup.run.encoder.apply(jax.device_get(state.params["encoder"]), tokens, tokens > 0)
    expected = narrow.forward(tokens, tokens > 0)
    np.testing.assert_allclose(z @ z.T, expected @ expected.T, atol=1e-5)
    assert json.loads((tmp_path / "narrow" / "config.json").read_text())["init_widen"] == 1


def test_what_the_wide_model_lacks_or_adds_is_left_out() -> None:
    """As `build.overlay` does it: a projection of the narrow model is dropped, n-grams of the wide one begin at 0."""
    narrow = encoder.make_encoder(model_config("projected"), VOCAB)
    params = jax.tree.map(lambda x: np.ones(x.shape, np.float32), jax.eval_shape(narrow.init, jax.random.key(0)))
    wide = model_config("projected", K)
    wide.update(embedding_dim=0, ngrams=((2, 128),))
    widened = warm_start.widen(params, wide, K)
    expected = jax.eval_shape(encoder.make_encoder(wide, VOCAB).init, jax.random.key(0))
    assert "projection" in params and expected["transformer"].pop("ngrams")
    jax.tree.map(lambda a, b: np.testing.assert_equal(a.shape, b.shape), widened, expected)


def test_row58_what_cannot_be_widened_is_one_line() -> None:
    config = default_config()
    config.init_widen = 2
    with pytest.raises(UserError, match="^config.init_widen=2: there is no model to widen; set config.init_from$"):
        warm_start.resolve(config)
    mixed = default_config().model
    mixed.update(mixer="fourier", position="none")
    with pytest.raises(
        UserError,
        match="^config.init_widen=2: only attention can be widened, without latents, not config.model.mixer='fourier'",
    ):
        warm_start.widen({}, mixed, 2)
