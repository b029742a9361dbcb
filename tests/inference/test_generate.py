"""Texts are written token by token: what a model has learned by heart comes back, and draws have their distribution."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import recipe, shrink
from etils import epath
from scipy import stats

from contrastive_jax.config import UserError, default_config
from contrastive_jax.inference import generate
from contrastive_jax.inference.generate import Options, continue_rows, draw
from contrastive_jax.models import encoder as encoder_lib
from contrastive_jax.objectives import tokens as token_losses
from contrastive_jax.training import loop, views
from contrastive_jax.training.views import Rows


def test_row57_draws_are_from_the_likeliest_tokens() -> None:
    probabilities = np.array([0.1, 0.4, 0.05, 0.3, 0.15])
    logits = jnp.tile(jnp.log(jnp.asarray(probabilities, jnp.float32)), (20_000, 1))
    for top_k, top_p, kept in ((0, 1.0, range(5)), (2, 1.0, [1, 3]), (0, 0.5, [1, 3]), (0, 0.71, [1, 3, 4]), (1, 1.0, [1])):
        counts = np.bincount(draw(logits, top_k, top_p, jax.random.key(0)), minlength=5)
        expected = np.where(np.isin(range(5), list(kept)), probabilities, 0)
        assert (counts[expected == 0] == 0).all()
        expected = expected[expected > 0] / expected.sum() * 20_000
        assert len(expected) == 1 or stats.chisquare(counts[counts > 0], expected).pvalue > 1e-4


def test_row57_rows_grow_until_their_end() -> None:
    tokens = jnp.array([[7, 1, 0, 0, 0, 0], [7, 8, 1, 0, 0, 0]])
    segment = jnp.array([[1, 2, 0, 0, 0, 0], [1, 1, 2, 0, 0, 0]])

    def count_up(tokens: jax.Array, segment: jax.Array) -> jax.Array:
        last = jnp.take_along_axis(tokens, (segment > 0).sum(1, keepdims=True) - 1, axis=1)[:, 0]
        return jax.nn.one_hot(last + 1, 9) * 100

    for limit, expected in ((3, [[7, 1, 2, 3, 4, 0], [7, 8, 1, 2, 3, 4]]), (9, [[7, 1, 2, 3, 4, 0], [7, 8, 1, 2, 3, 4]])):
        rows, parts = continue_rows(count_up, tokens, segment, 4, Options(tokens=limit, top_k=1), jax.random.key(0))
        np.testing.assert_array_equal(rows, expected)
        np.testing.assert_array_equal((parts == 2).sum(1), [4, 4])
    rows, _ = continue_rows(count_up, tokens, segment, 4, Options(tokens=2, top_k=1), jax.random.key(0))
    np.testing.assert_array_equal(rows, [[7, 1, 2, 3, 0, 0], [7, 8, 1, 2, 3, 0]])


def test_row57_what_was_learned_by_heart_is_written_exactly() -> None:
    """Eight pairs of texts; greedy decoding gives the second text of each."""
    rng, b, size, w = np.random.default_rng(0), 8, 7, 32
    texts = np.concatenate([np.full((b, 2, 1), 4), rng.integers(8, w, (b, 2, size - 2)), np.full((b, 2, 1), 5)], axis=2)
    rows = Rows(
        jnp.asarray(texts[:, :, None], jnp.int32), jnp.ones((b, 2, 1, size), jnp.int32), jnp.zeros((b, 2, 1), jnp.int32)
    )
    joined = views.join_views(rows, False)
    targets = jax.tree.map(lambda x: x.reshape(b, 2 * size), views.next_tokens(joined, True))
    tokens, segment = (x.reshape(b, 2 * size) for x in (joined.tokens, joined.segment))
    config = default_config()
    config.model.update(num_layers=1, d_model=32, num_heads=4, num_kv_heads=4, head_dim=8, d_ff=64, init_std=0.1)
    config.data.join, config.tokens.name = "next", "seq2seq"
    encoder, loss = encoder_lib.make_encoder(config.model, w), token_losses.make_token_loss(config, 32, w)
    params = {"encoder": encoder.init(jax.random.key(0)), "tokens": loss.init(jax.random.key(1))}
    optimizer = optax.adam(1e-2)

    def value(params: dict) -> jax.Array:
        encoding = encoder.encode(params["encoder"], tokens, segment, joined=True)
        return token_losses.mean(loss.loss(params["tokens"], encoding.table, encoding.states, targets))[0]

    @jax.jit
    def train(params: dict) -> tuple:
        def step(state: tuple, _: None) -> tuple:
            params, moments = state
            found, gradient = jax.value_and_grad(value)(params)
            updates, moments = optimizer.update(gradient, moments)
            return (optax.apply_updates(params, updates), moments), found

        return jax.lax.scan(step, (params, optimizer.init(params)), length=150)

    (params, _), values = train(params)
    assert values[-1] < 0.05 < values[0]
    begun = (jnp.arange(2 * size) <= size)[None] & (segment > 0)
    fake = type("Model", (), {"encoder": encoder})
    next_token = generate.make_next_token(fake, params, [0, 1, 2, 3, 4])
    cut = tokens * begun, segment * begun
    written, _ = jax.jit(lambda: continue_rows(next_token, *cut, 5, Options(tokens=size, top_k=1), jax.random.key(0)))()
    np.testing.assert_array_equal(written, tokens)


def test_row57_a_run_writes_pairs(dataset: pathlib.Path, tmp_path: pathlib.Path) -> None:
    config = shrink(recipe("seq2seq", "simbert"), dataset)
    config.steps = 2
    loop.train(loop.set_up(config, epath.Path(tmp_path / "run")), 2)
    source, target = epath.Path(tmp_path / "texts.txt"), epath.Path(tmp_path / "pairs.jsonl")
    source.write_text("The cat 7 sat.\nA dog ran!\n\nA mat.\n")
    generate.generate(str(tmp_path / "run"), source, target, Options(samples=6, keep=2, top_k=0, tokens=12, batch=2))
    pairs = [json.loads(line) for line in target.read_text().splitlines()]
    assert 3 <= len(pairs) <= 6 and {pair["text1"] for pair in pairs} == {"The cat 7 sat.", "A dog ran!", "A mat."}
    assert all(pair["text2"] not in ("", pair["text1"]) for pair in pairs)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["tokens"]["name"] = "lm"
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="^--model=.*: only a run with config.tokens.name='seq2seq' has learned to write texts"):
        generate.Writer(str(tmp_path / "run"), Options())
