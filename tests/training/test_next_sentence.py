"""Next-sentence prediction: which pairs get a text of another document, and what a step makes of them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import RESERVED, recipe, shrink
from ml_collections import ConfigDict

from contrastive_jax.config import UserError, default_config
from contrastive_jax.data import pipeline, prepared
from contrastive_jax.data.batch import Batch
from contrastive_jax.models import encoder as encoder_lib
from contrastive_jax.objectives.labels import check_labels
from contrastive_jax.runtime import sharding
from contrastive_jax.runtime.randomness import step_key
from contrastive_jax.training import build, views
from contrastive_jax.training.noise import Vocabulary

B, L = 4096, 6


def config_of(**changes: object) -> ConfigDict:
    config = default_config()
    config.update_from_flattened_dict({"data.join": "next", "data.random_next": 0.5, "model.part_mask": "full"})
    config.update_from_flattened_dict({"objective.name": "softmax"} | changes)
    return config


def pairs_of_documents() -> Batch:
    """Each token of view v of pair i is 2 i + v; a third of the pairs have the document of their counterpart."""
    size = np.random.default_rng(0).integers(2, L + 1, (B, 2, 1, 1))
    segment = (np.arange(L) < size).astype(np.int32)
    number = 2 * np.arange(B)[:, None] + np.arange(2)
    document = np.arange(B)
    document[B // 2 :: 3] = document[: B // 2 : 3]
    return Batch(*map(jnp.asarray, (number[..., None, None] * segment, segment, document, 1000 + number)))


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_row53_the_texts_of_a_row_share_a_document_exactly_where_labelled_so(share: float) -> None:
    batch = pairs_of_documents()
    make = jax.jit(views.make_views(config_of(**{"data.random_next": share}), Vocabulary(2 * B, {})))
    rows, ids = make(batch, jax.random.key(0))
    tokens, segment, document = (np.asarray(x) for x in (rows.tokens[:, 0, 0], rows.segment[:, 0, 0], batch.document))
    first = tokens[:, 0] // 2
    second = np.max(tokens * (segment == 2), axis=1)
    np.testing.assert_array_equal(first, np.arange(B))
    np.testing.assert_array_equal(second % 2, 1)
    label = np.asarray(ids.label)
    np.testing.assert_array_equal(label, document[first] != document[second // 2])
    np.testing.assert_array_equal(second // 2, np.where(label > 0, (first + B // 2) % B, first))
    np.testing.assert_array_equal(ids.span_hash[:, 1], 1000 + second)  # of the texts that are in the row
    np.testing.assert_array_equal((segment == 2).sum(1), np.asarray(batch.segment)[second // 2, 1, 0].sum(1))
    able = document != np.roll(document, B // 2)
    assert able.sum() < B and not label[~able].any()
    assert abs(label[able].mean() - share) < 4 * np.sqrt(share * (1 - share) / able.sum())
    again = make(batch, jax.random.key(1))[1].label
    assert 0.3 < np.mean(label[able] == again[able]) < 0.8  # other coins in another step


def dense(config: ConfigDict, params: dict, rows: views.Rows, label: np.ndarray) -> jax.Array:
    """BERT's loss, all rows at once: the vocabulary at every token, and two logits of the first token."""
    encoder, head = encoder_lib.make_encoder(config.model, build.padded_vocab(320)), params["tokens"]
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[3:]), rows)
    _, states, table = encoder.encode(params["encoder"], flat.tokens, flat.segment, joined=True)
    x = jax.nn.gelu(states @ head["hidden"]["dense"]["kernel"] + head["hidden"]["dense"]["bias"], approximate=False)
    x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-12)
    x = x * head["hidden"]["norm"]["scale"] + head["hidden"]["norm"]["bias"]
    logits = x @ table[: len(head["bias"])].T + head["bias"]
    of_tokens = optax.softmax_cross_entropy_with_integer_labels(logits, flat.targets.token)
    masked = (of_tokens * flat.targets.picked).sum() / flat.targets.picked.sum()
    h = states[:, 0] / jnp.linalg.norm(states[:, 0], axis=-1, keepdims=True) * np.sqrt(states.shape[-1])
    two = h @ params["objective"]["kernel"] + params["objective"]["bias"]
    margin = (two[:, 1] - two[:, 0]) * (2 * label - 1)
    return config.tokens.weight * masked + config.objective.weight * jnp.log1p(jnp.exp(-margin)).mean()


def test_row53_a_step_equals_the_dense_loss_on_1_and_8_devices_cached_and_direct(dataset: str) -> None:
    config = shrink(recipe("noise", "bert"), dataset)
    config.model.init_std, config.model.dropout = 0.3, 0.0
    config.objective.weight, config.tokens.weight = 2.0, 0.5
    host = next(pipeline.batches(prepared.open_split(dataset, "train"), config.data, 0))
    make = views.make_views(config, Vocabulary(320, RESERVED))
    rng = step_key(jax.random.key(config.seed), "views", jnp.int32(0))
    rows, ids = make(jax.tree.map(jnp.asarray, host), rng)
    label = np.asarray(ids.label)
    assert 0 < label.sum() < len(label)
    expected = None
    for devices, micro_batch in ((1, 0), (8, 8)):
        config.micro_batch = micro_batch
        mesh = sharding.make_mesh(config.mesh, jax.devices()[:devices])
        run = build.build(config, mesh, 320, RESERVED)
        state = run.init()
        if expected is None:
            value, gradient = jax.jit(jax.value_and_grad(lambda params: dense(config, params, rows, label)))(state.params)
            assert optax.tree.norm(gradient["objective"]) > 1e-2
            expected = jax.device_get((value, optax.tree.norm(gradient)))
        _, metrics, z = run.train_step(state, sharding.to_global(host, np.arange(16), 16, mesh))
        assert z.shape == (16, 1, 16)
        np.testing.assert_allclose((metrics["loss"], metrics["gradient_norm"]), expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.join": "both"}, "config.data.random_next=0.5: needs config.data.join='next'"),
        ({"labels.classes": (3,)}, "config.data.random_next=0.5: needs .* config.labels.classes="),
        (
            {"objective.weight": 0.0, "tokens.name": "mlm", "noise.ops": (("mask", 0.15),)},
            "config.data.random_next=0.5: needs .* with a weight",
        ),
        ({"objective.name": "infonce"}, "config.data.join='next': needs config.objective.weight=0"),
        ({"data.copies": 2, "data.sampler": "span"}, "config.data.join='next': needs .* data.copies=1"),
        ({"model.part_mask": "prefix"}, "config.data.join='next': needs config.model.part_mask='full'"),
        (
            {"model.causal": True},
            "config.data.join='next': needs config.model.part_mask='full', blocks and no config.model.causal",
        ),
        ({"data.random_next": 0.0}, "config.objective.name='softmax' needs labels"),
    ],
)
def test_row53_what_cannot_be_predicted_is_refused(changes: dict, message: str) -> None:
    config = config_of(**changes)
    with pytest.raises(UserError, match=f"^{message}"):
        build.build(config, sharding.make_mesh(config.mesh), 320, RESERVED)


def test_row53_data_need_no_labels_of_their_own() -> None:
    check_labels(config_of(), [])
    with pytest.raises(UserError, match="have no labels"):
        check_labels(config_of(**{"data.random_next": 0.0}), [])
