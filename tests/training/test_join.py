"""Joined rows: the second text sees the first, never the other way round, and its tokens are what a seq2seq loss predicts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import RESERVED, VOCAB, recipe, shrink
from ml_collections import ConfigDict
from test_noise import WORD_START, WORDS

from contrastive_jax.config import UserError, default_config
from contrastive_jax.data import pipeline, prepared
from contrastive_jax.data.batch import Batch
from contrastive_jax.models import encoder as encoder_lib
from contrastive_jax.models.attention import attention_mask
from contrastive_jax.models.layer_context import LayerContext
from contrastive_jax.objectives import tokens as token_losses
from contrastive_jax.objectives.tokens import Targets
from contrastive_jax.runtime import sharding
from contrastive_jax.training import build, views
from contrastive_jax.training.noise import Vocabulary
from contrastive_jax.training.views import Rows

N, L, W = 6, 10, 64


def small_model(**changes: object) -> ConfigDict:
    model = default_config().model
    model.update(num_layers=2, d_model=16, num_heads=4, num_kv_heads=4, head_dim=4, d_ff=32, init_std=0.3, attention="plain")
    model.update(changes)
    return model


def some_rows() -> Rows:
    rng = np.random.default_rng(0)
    segment = (np.arange(L) < rng.integers(4, L + 1, (N, 2, 1, 1))).astype(np.int32)
    words = rng.integers(8, W, (N, 2, 1, L)).astype(np.int32) * segment
    targets = Targets(segment > 0, jnp.asarray(words + 100 * segment), segment > 0)
    return Rows(jnp.asarray(words), jnp.asarray(segment), jnp.arange(2 * N).reshape(N, 2, 1), targets)


def flat(rows: Rows) -> tuple[jax.Array, jax.Array]:
    return tuple(x.reshape(-1, x.shape[-1]) for x in (rows.tokens, rows.segment))


def joined_by_hand(rows: Rows, first: int) -> tuple[np.ndarray, np.ndarray]:
    words, segment = np.zeros((2, N, 2 * L), np.int32)
    for i in range(N):
        parts = [np.asarray(rows.tokens)[i, v, 0][np.asarray(rows.segment)[i, v, 0] > 0] for v in (first, 1 - first)]
        both = np.concatenate(parts)
        words[i, : len(both)], segment[i, : len(both)] = both, np.repeat([1, 2], [*map(len, parts)])
    return words, segment


@pytest.mark.parametrize("both", [False, True])
def test_row57_two_views_share_a_row(both: bool) -> None:
    rows = some_rows()
    joined = views.join_views(rows, both)
    assert joined.tokens.shape == (N, 1 + both, 1, 2 * L)
    for view in range(1 + both):
        words, segment = joined_by_hand(rows, view)
        np.testing.assert_array_equal(joined.tokens[:, view, 0], words)
        np.testing.assert_array_equal(joined.segment[:, view, 0], segment)
        np.testing.assert_array_equal(joined.targets.token[:, view, 0], words + 100 * (segment > 0))
        np.testing.assert_array_equal(joined.row[:, view], rows.row[:, view])
        targets = views.next_tokens(joined, True)
        for i in range(N):
            (places,) = np.nonzero(np.asarray(targets.picked)[i, view, 0])
            second = np.flatnonzero(segment[i] == 2)
            np.testing.assert_array_equal(places, second[:-1])
            np.testing.assert_array_equal(np.asarray(targets.token)[i, view, 0][places], words[i, second[1:]])


def test_row57_half_of_the_sources_are_masked_and_no_target_is() -> None:
    n, place, rows = 2000, np.arange(2 * L), []
    words = np.random.default_rng(0).integers(8, VOCAB, (n, 2, 1, L)).astype(np.int32)
    words[..., 0], words[..., -1] = 4, 5
    batch = Batch(*map(jnp.asarray, (words, np.ones_like(words), np.arange(n), np.zeros((n, 2), np.int32))))
    for clean_rows in (0.0, 0.5):
        config = recipe("seq2seq", "roformer_sim")
        assert config.noise.clean_rows == 0.5
        config.noise.clean_rows = clean_rows
        rows.append(jax.device_get(jax.jit(views.make_views(config, WORDS))(batch, jax.random.key(0))[0]))
    every, half = (x.tokens[..., :L] for x in rows)
    for x in rows:
        assert x.tokens.shape == (n, 2, 1, 2 * L)
        np.testing.assert_array_equal(x.tokens[..., L:], words[:, ::-1])  # before noise
        np.testing.assert_array_equal(x.targets.picked, np.broadcast_to((place >= L) & (place < 2 * L - 1), x.tokens.shape))
        np.testing.assert_array_equal(x.targets.token[..., L:-1], words[:, ::-1, :, 1:])
    begins = WORD_START[words] & (words >= 8)
    begins[..., 1] = True
    share = (every == 3)[begins].mean()
    assert abs(share - 0.15 * 0.8) < 0.012
    could, changed = ((x != words).any((2, 3)) for x in (every, half))
    np.testing.assert_array_equal(half[changed], every[changed])
    assert not (changed & ~could).any()
    assert abs(changed[could].mean() - 0.5) < 4 * 0.5 / np.sqrt(could.sum())
    of_both = changed[could.all(1)].mean(1)  # each of the two rows of a pair has a coin of its own
    assert abs((of_both == 0.5).mean() - 0.5) < 4 * 0.5 / np.sqrt(len(of_both))


def test_m2_a_language_model_predicts_the_next_token_of_each_span() -> None:
    segment = np.array([2, 2, 2, 1, 1, 0], np.int32)
    words = np.array([11, 12, 13, 21, 22, 0], np.int32)
    rows = Rows(*(jnp.asarray(x).reshape(1, 1, 1, -1) for x in (words, segment)), jnp.zeros((1, 1, 1), jnp.int32))
    targets = views.next_tokens(rows, False)
    np.testing.assert_array_equal(targets.picked[0, 0, 0], [True, True, False, True, False, False])
    np.testing.assert_array_equal(np.asarray(targets.token)[targets.picked], [12, 13, 22])


def test_row57_the_prefix_mask_equals_unilms_cumsum_rule() -> None:
    """bert4keras' mask: i attends to j where cumsum(s)_j <= cumsum(s)_i, s being 0 on the first text and 1 on the second."""
    segment = np.array([[1, 1, 1, 2, 2, 2, 2, 0]], np.int32)
    mask = np.asarray(attention_mask(small_model(), LayerContext(jnp.asarray(segment), jnp.arange(8)[None], joined=True)))[0]
    total = np.cumsum(segment[0] == 2)
    np.testing.assert_array_equal(mask[:7, :7], (total[None] <= total[:, None])[:7, :7])
    assert not mask[:7, 7].any()
    narrow = small_model(part_mask="bottleneck")
    mask = np.asarray(attention_mask(narrow, LayerContext(jnp.asarray(segment), jnp.arange(8)[None], joined=True)))[0]
    np.testing.assert_array_equal(mask[3:7, :3], np.array([[True, False, False]] * 4))
    np.testing.assert_array_equal(mask[3:7, 3:7], np.tri(4, dtype=bool))
    assert mask[:3, :3].all() and not mask[:3, 3:].any()


@pytest.mark.parametrize(("part_mask", "position"), [("prefix", "rotary"), ("prefix", "learned"), ("bottleneck", "rotary")])
def test_row57_z_of_a_joined_row_is_that_of_its_first_text(part_mask: str, position: str) -> None:
    model, rows = small_model(part_mask=part_mask, position=position, max_length=2 * L), some_rows()
    encoder = encoder_lib.make_encoder(model, W)
    params = encoder.init(jax.random.key(0))
    alone = encoder.apply(params, *flat(rows))
    joined = views.join_views(rows, True)
    z = encoder.apply(params, *flat(joined), joined=True)
    np.testing.assert_allclose(z, alone, atol=1e-6)
    full = encoder_lib.make_encoder(small_model(part_mask="full", position=position, max_length=2 * L), W)
    assert np.abs(full.apply(params, *flat(joined), joined=True) - alone).max() > 1e-3


@pytest.mark.parametrize("part_mask", ["prefix", "bottleneck"])
def test_row57_a_seq2seq_gradient_reaches_the_first_text_through_its_first_token_at_least(part_mask: str) -> None:
    joined = views.join_views(some_rows(), False)
    words, segment = flat(joined)
    targets = jax.tree.map(lambda x: x.reshape(-1, 2 * L), views.next_tokens(joined, True))
    config = default_config()
    config.data.join, config.tokens.name = "next", "seq2seq"
    loss = token_losses.make_token_loss(config, 16, W)
    model = small_model(part_mask=part_mask, num_layers=1)
    head, params = loss.init(jax.random.key(1)), encoder_lib.make_encoder(model, W).init(jax.random.key(0))
    table, index = params["transformer"]["embedding"], jnp.arange(words.size).reshape(words.shape)

    def value(own: jax.Array) -> jax.Array:
        """With an embedding of its own at each place: tokens have no gradient."""
        moved = params | {"transformer": params["transformer"] | {"embedding": own}}
        states = encoder_lib.make_encoder(model, len(own)).encode(moved, index, segment, joined=True).states
        return token_losses.mean(loss.loss(head, table, states, targets))[0]

    gradient = np.abs(jax.grad(value)(table[words].reshape(-1, 16))).max(-1).reshape(words.shape)
    assert (gradient[:, 0] > 0).all()
    assert ((gradient[:, 1:] > 0) & (segment[:, 1:] == 1)).any() == (part_mask == "prefix")


@pytest.mark.parametrize("variant", ["simbert", pytest.param("t5", marks=pytest.mark.slow)])
def test_row54_row57_a_joined_step_is_the_same_on_any_mesh_cached_and_direct(variant: str, dataset: str) -> None:
    config = shrink(recipe("seq2seq", variant), dataset)
    host = next(pipeline.batches(prepared.open_split(dataset, "train"), config.data, 0))
    found = []
    for devices, micro_batch in ((1, 0), (8, 8)):
        config.micro_batch = micro_batch
        mesh = sharding.make_mesh(config.mesh, jax.devices()[:devices])
        run = build.build(config, mesh, 320, RESERVED)
        _, metrics, z = run.train_step(run.init(), sharding.to_global(host, np.arange(16), 16, mesh))
        assert z.shape == (16, 2 if variant == "simbert" else 1, 16)
        found.append(jax.device_get([metrics[part] for part in ("loss", "token_loss", "gradient_norm")]))
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.join": "both", "data.pack_pairs": 2}, "config.data.join='both': needs config.data.pack_pairs=1: packed rows"),
        ({"data.join": "next"}, "config.data.join='next': needs config.objective.weight=0"),
        ({"data.join": "both", "data.views": 3}, "config.data.join='both': needs two views"),
        ({"data.join": "both", "data.delimiters": False}, "config.data.join='both': needs config.data.delimiters=True"),
        ({"data.join": "both", "model.mixer": "conv"}, "config.data.join='both': needs config.model.mixer='attention'"),
        ({"tokens.name": "seq2seq"}, "config.tokens.name='seq2seq': needs config.data.join"),
        ({"tokens.name": "lm"}, "config.tokens.name='lm': needs config.model.causal=True"),
    ],
)
def test_row57_what_cannot_be_joined_is_refused(changes: dict, message: str) -> None:
    config = default_config()
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=f"^{message}"):
        views.make_views(config, Vocabulary(320, RESERVED))


def test_row57_fused_attention_refuses_joined_rows() -> None:
    words, segment = flat(views.join_views(some_rows(), False))
    encoder = encoder_lib.make_encoder(small_model(attention="fused"), W)
    with pytest.raises(
        UserError, match="^config.model.attention='fused': it has no masks for config.data.join; choose 'plain'"
    ):
        jax.eval_shape(lambda params: encoder.apply(params, words, segment, joined=True), encoder.init(jax.random.key(0)))
