"""The views of a step: copies of a text are positives of each other, and random numbers belong to rows."""

import jax
import jax.numpy as jnp
import numpy as np
from conftest import recipe, shrink

from contrastive_jax.config import default_config
from contrastive_jax.data import pipeline, prepared
from contrastive_jax.models.dropout import Noise, row_uniform
from contrastive_jax.objectives import pairs
from contrastive_jax.runtime import sharding
from contrastive_jax.training import build, views
from contrastive_jax.training.noise import Vocabulary


def test_copies_are_rows_of_their_own_with_the_same_text(dataset: str) -> None:
    config = shrink(recipe("debug"), dataset)
    config.data.copies = 2
    batch = next(pipeline.batches(prepared.open_split(dataset, "train"), config.data, 0))
    rows, ids = views.make_views(config, Vocabulary(320, {}))(batch, jax.random.key(0))
    b = config.data.batch_size
    assert rows.tokens.shape == rows.segment.shape == (b, 4, 1, 24)
    np.testing.assert_array_equal(rows.tokens[:, :2], rows.tokens[:, 2:])
    np.testing.assert_array_equal(rows.tokens[:, :2], batch.tokens)
    np.testing.assert_array_equal(ids.span_hash[:, :2], ids.span_hash[:, 2:])
    assert len(np.unique(rows.row)) == 4 * b


def test_copies_of_a_text_are_positives_and_no_negatives() -> None:
    """The dense loss with each pair's own text masked, whether or not duplicates are."""
    rng = np.random.default_rng(0)
    z = rng.normal(size=(6, 2, 8)).astype(np.float32)
    z /= np.linalg.norm(z, axis=-1, keepdims=True)
    text = np.array([1, 2, 3, 4, 2, 6], np.int32)  # pair 4 repeats the text of pair 1
    ids = views.PairIds(np.arange(6, dtype=np.int32), np.stack([text, text], axis=1))
    config = pairs.pair_config(default_config())
    config.update(temperature=0.5, symmetric=False)
    logits = z[:, 0] @ z[:, 1].T / 0.5
    for masked in (True, False):
        config.mask_duplicates = masked
        objective = pairs.make_objective(config, 2, 8)
        kept = [0, 1, 2, 3, 5] if masked else range(6)
        expected = np.mean([np.log(np.exp(logits[i, list(kept)]).sum()) - logits[i, i] for i in kept])
        value, metrics = objective.loss(jnp.asarray(z), ids, objective.init(jax.random.key(0)))
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        np.testing.assert_allclose(metrics["dropped_share"], 1 / 6 if masked else 0, atol=1e-6)


def test_a_step_with_copies_is_the_same_on_any_mesh_and_in_micro_batches(dataset: str) -> None:
    config = shrink(recipe("debug"), dataset)
    config.data.copies, config.model.dropout, config.model.num_layers = 2, 0.2, 0
    host = next(pipeline.batches(prepared.open_split(dataset, "train"), config.data, 0))
    values = []
    for devices, micro_batch in ((1, 0), (8, 8)):
        config.micro_batch = micro_batch
        mesh = sharding.make_mesh(config.mesh, jax.devices()[:devices])
        run = build.build(config, mesh, 320)
        batch = sharding.to_global(host, np.arange(16), 16, mesh)
        _, metrics, z = run.train_step(run.init(), batch)
        assert z.shape == (16, 4, 16)
        assert float(jnp.abs(z[:, 0] - z[:, 2]).max()) > 0.05  # dropout differs
        values.append((float(metrics["loss"]), float(metrics["gradient_norm"]), np.asarray(z)))
    for other in values[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), other, values[0])


def test_random_numbers_belong_to_a_rows_number() -> None:
    rng, numbers = jax.random.key(3), np.arange(4096, dtype=np.int32)
    uniform = np.asarray(row_uniform(Noise(rng, numbers), (5, 3)))
    assert uniform.min() >= 0 and uniform.max() < 1
    np.testing.assert_array_equal(uniform[[7, 9]], row_uniform(Noise(rng, np.array([7, 9], np.int32)), (5, 3)))
    assert not np.array_equal(uniform, row_uniform(Noise(jax.random.key(4), numbers), (5, 3)))
    counts = np.histogram(uniform, 64, (0, 1))[0]
    expected = uniform.size / 64
    assert ((counts - expected) ** 2 / expected).sum() < 110  # χ² with 63 degrees of freedom: 1 in 10,000
    flat = uniform.reshape(len(uniform), -1)
    correlations = np.corrcoef(np.concatenate([flat, np.roll(flat, 1, 0)], axis=1).T) - np.eye(30)
    assert np.abs(correlations).max() < 5 / 64
