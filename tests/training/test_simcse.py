"""SimCSE: a span and itself, told apart by dropout alone."""

import pathlib

import jax
import numpy as np
import pytest
from conftest import VOCAB, recipe, shrink
from ml_collections import ConfigDict

from contrastive_jax.data import pipeline, prepared
from contrastive_jax.runtime import sharding
from contrastive_jax.training import build


def first_step(config: ConfigDict, devices: int) -> tuple[np.ndarray, float, np.ndarray]:
    """The embeddings [b 2 e] and the loss of the first step, and the spans' hashes [b]."""
    host = next(pipeline.batches(prepared.open_split(config.data.dir, "train"), config.data, 0))
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:devices])
    run = build.build(config, mesh, VOCAB)
    batch = sharding.to_global(host, np.arange(config.data.batch_size), config.data.batch_size, mesh)
    _, metrics, z = run.train_step(run.init(), batch)
    return np.asarray(z), float(metrics["loss"]), host.span_hash[:, 0]


@pytest.fixture
def config(dataset: pathlib.Path) -> ConfigDict:
    config = shrink(recipe("simcse"), dataset)
    config.model.zero_init_branches = False
    config.objective.mask_same_document = False
    return config


def test_row51_simcse_copies_differ_by_dropout_the_same_on_1_and_8_devices(config: ConfigDict) -> None:
    z, loss, text = first_step(config, 1)
    assert z.shape == (16, 2, 16) and len(set(text)) == 16
    assert np.linalg.norm(z[:, 0] - z[:, 1], axis=1).min() > 0.05
    spread, loss_of_8, _ = first_step(config, 8)
    np.testing.assert_allclose(spread, z, atol=1e-5)
    logits = (z[:, 0] @ z[:, 1].T / 0.05).astype(np.float64)
    expected = np.log(np.exp(logits).sum(1)) - np.diag(logits)
    np.testing.assert_allclose([loss, loss_of_8], expected.mean(), rtol=1e-5)


def test_row51_simcse_without_dropout_has_equal_copies(config: ConfigDict) -> None:
    config.model.update(dropout=0.0, attention_dropout=0.0)
    z, _, _ = first_step(config, 8)
    np.testing.assert_array_equal(z[:, 0], z[:, 1])
