"""Embeddings of n-grams: which row of a table each n-gram has, and what the encoder makes of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from ml_collections import ConfigDict
from models.test_encoder import VOCAB, make_model, make_rows, model_config

from contrastive_jax.config import UserError, check, default_config
from contrastive_jax.huggingface.families import family_of
from contrastive_jax.models import encoder
from contrastive_jax.models.ngrams import ngram_rows
from contrastive_jax.runtime import layout, sharding

SIZES = ((2, 128), (3, 256))


def hashed(gram: tuple[int, ...], rows: int) -> int:
    """The row of one n-gram in Python's integers."""
    value = 0
    for token in gram:
        value = ((value ^ token) * 0x9E3779B1) % 2**32
        value ^= value >> 15
    return value % rows


def embed(params: dict, tokens: list[int]) -> np.ndarray:
    """The bag of tokens and n-grams of one span, n-gram by n-gram: a unit vector float64[d]."""
    table = {name: np.asarray(x, np.float64) for name, x in params["transformer"]["ngrams"].items()}
    total = np.asarray(params["transformer"]["embedding"], np.float64)[tokens].sum(0)
    for order, rows in SIZES:
        for end in range(order, len(tokens) + 1):
            total += table[f"order_{order}"][hashed(tuple(tokens[end - order : end]), rows)]
    return total / np.linalg.norm(total)


def test_a_bag_with_ngrams_equals_a_loop_over_its_ngrams() -> None:
    model, params = make_model(model_config(num_layers=0, position="none", final_norm=False, ngrams=SIZES))
    tokens, mask = make_rows()
    z = model.apply(params, tokens, mask)
    for row, row_mask, vector in zip(np.asarray(tokens), np.asarray(mask), z, strict=True):
        np.testing.assert_allclose(vector, embed(params, row[row_mask].tolist()), atol=1e-6)


def test_no_ngram_reaches_into_another_span_of_a_packed_row() -> None:
    config = model_config(num_layers=0, position="none", ngrams=SIZES)
    params, model = make_model(config)[1], encoder.make_encoder(config, VOCAB)
    rows = np.array([[3, 4, 5, 6], [7, 8, 9, 0], [1, 2, 0, 0]])
    packed = jnp.asarray([[*rows[0], *rows[1, :3], *rows[2, :2], 0, 0]])
    segment = jnp.asarray([[1] * 4 + [2] * 3 + [3] * 2 + [0] * 2])
    z = jax.jit(lambda params: model.apply(params, packed, segment, packing=(3, 1)))(params)
    np.testing.assert_allclose(z, jax.jit(model.apply)(params, jnp.asarray(rows), jnp.asarray(rows > 0)), atol=2e-6)


def test_the_order_of_tokens_matters_to_a_bag_with_ngrams_alone() -> None:
    tokens, mask = make_rows()
    moved = {}
    for ngrams in ((), SIZES):
        model, params = make_model(model_config(num_layers=0, position="none", final_norm=False, ngrams=ngrams))
        full = tokens[-1:], mask[-1:]
        moved[ngrams] = float(jnp.abs(model.apply(params, *full) - model.apply(params, full[0][:, ::-1], full[1])).max())
    assert moved[()] < 1e-6
    assert moved[SIZES] > 1e-2


def test_tables_begin_at_0_and_each_ngram_of_the_rows_has_a_gradient() -> None:
    model, params = make_model(model_config(num_layers=0, position="none", ngrams=SIZES))
    first = jax.jit(lambda rng: model.init(rng)["transformer"]["ngrams"])(jax.random.key(0))
    assert not any(jnp.any(table) for table in first.values())
    tokens, mask = make_rows()
    gradient = jax.jit(jax.grad(lambda p: model.apply(p, tokens, mask)[:, :3].sum()))(params)["transformer"]["ngrams"]
    for order, rows in SIZES:
        spans = [row[row_mask].tolist() for row, row_mask in zip(np.asarray(tokens), np.asarray(mask), strict=True)]
        grams = {hashed(tuple(s[i : i + order]), rows) for s in spans for i in range(len(s) - order + 1)}
        changed = set(np.flatnonzero(np.abs(gradient[f"order_{order}"]).sum(1)).tolist())
        assert changed == grams


def test_eight_devices_equal_one() -> None:
    """Over data 2 x fsdp 2 x tensor 2, where each device has a part of a table: vectors and the gradients of the tables."""
    tokens, mask = (jnp.concatenate([x[1:], x[1:]]) for x in make_rows())
    mesh = sharding.make_mesh(ConfigDict({"data": 2, "fsdp": 2, "tensor": 2}))
    config = model_config(num_layers=0, position="none", ngrams=SIZES)
    one, params = make_model(config)
    many = encoder.make_encoder(config, VOCAB, layout.on_mesh(mesh))
    placed = sharding.place(params, sharding.tree_shardings(many.axes, jax.eval_shape(lambda: params), mesh))
    assert placed["transformer"]["ngrams"]["order_2"].sharding.spec == PartitionSpec("tensor", "fsdp")

    def gradient(model: encoder.Encoder, params: dict) -> tuple[dict, jax.Array]:
        def first_sum(params: dict) -> tuple[jax.Array, jax.Array]:
            z = model.apply(params, tokens, mask)
            return z[:, :5].sum(), z

        return jax.jit(jax.grad(first_sum, has_aux=True))(params)

    (expected, whole), (computed, z) = gradient(one, params), gradient(many, placed)
    np.testing.assert_allclose(z, whole, atol=3e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-5), computed, expected)


@pytest.mark.parametrize("rows", [1024, 1280])
def test_the_hash_fills_a_table_evenly(rows: int) -> None:
    """All 65,536 pairs of 256 tokens: the counts per row vary as those of throws at random do (chi square per row near 1)."""
    first, second = np.divmod(np.arange(256**2), 256)
    tokens = jnp.asarray(np.stack([first, second], 1), jnp.int32)
    row = np.asarray(ngram_rows(tokens, jnp.ones_like(tokens), 2, rows))
    np.testing.assert_array_equal(row[:, 0], rows)  # no pair ends at the first token
    counts = np.bincount(row[:, 1], minlength=rows)
    assert counts.size == rows
    assert 0.8 < counts.var() / counts.mean() < 1.2


@pytest.mark.parametrize("ngrams", [((1, 128),), ((2, 100),), ((2, 0),), ((2, 128), (2, 256)), (2, 128)])
def test_wrong_sizes_are_one_line(ngrams: tuple) -> None:
    config = default_config()
    config.model.ngrams = ngrams
    with pytest.raises(UserError, match=r"model.ngrams.*give \(tokens of an n-gram, rows of its table\) pairs"):
        check(config)


def test_transformers_has_no_such_encoder() -> None:
    with pytest.raises(UserError, match=r"config.model.ngrams=\(\(2, 128\),\): transformers has no such encoder"):
        family_of(model_config(ngrams=((2, 128),), num_layers=1).to_dict())
