"""MoCo: the queue holds the keys of past steps, the momentum encoder follows, negatives come from the queue."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import shrink
from ml_collections import ConfigDict

from configs import moco
from contrastive_jax.config import default_config
from contrastive_jax.data import pipeline, prepared
from contrastive_jax.inference import forward
from contrastive_jax.objectives import pairs
from contrastive_jax.objectives import queue as queue_lib
from contrastive_jax.objectives.objective import Given, PairIds
from contrastive_jax.runtime import sharding
from contrastive_jax.training import build

B, S, E = 16, 3, 8


def config_of(**changes: object) -> ConfigDict:
    config = pairs.pair_config(default_config())
    config.update(symmetric=False, block=7, temperature=0.1)
    config.update(changes)
    return config


def batches(count: int) -> list[tuple[jax.Array, PairIds]]:
    rng = np.random.default_rng(0)
    z = rng.normal(size=(count, B, 2, E)).astype(np.float32)
    z /= np.linalg.norm(z, axis=-1, keepdims=True)
    ids = [PairIds(rng.integers(0, 30, B).astype(np.int32), rng.integers(0, 60, (B, 2)).astype(np.int32)) for _ in range(count)]
    return [(jnp.asarray(a), b) for a, b in zip(z, ids, strict=True)]


@pytest.mark.parametrize(("where", "devices"), [("ring", 8), ("gathered", 4), ("local", 1)])
@pytest.mark.parametrize("loss", ["infonce", "siglip"])
def test_loss_equals_a_loop_over_past_batches(loss: str, where: str, devices: int) -> None:
    config = config_of(name=loss, where=where, bias=-2.0, mask_duplicates=True)
    mesh = sharding.make_mesh(default_config().mesh, jax.devices()[:devices])
    objective = pairs.make_objective(config, 2, E, mesh, sharding.BATCH_AXES)
    params, queue = objective.init(jax.random.key(0)), queue_lib.empty_queue(B, S, E)
    step = jax.jit(
        lambda z, ids, queue, k: objective.loss(z, ids, params, Given(keys=queue_lib.queue_keys(config, queue, k)))[0]
    )
    push = jax.jit(queue_lib.push)
    past: list[tuple] = []
    for k, (z, ids) in enumerate(batches(5)):
        z_spread, ids_spread = sharding.to_global((np.asarray(z), ids), np.arange(B), B, mesh)
        queue = push(queue, z_spread[:, 1], ids_spread, jnp.int32(k))
        past = [*past, (np.asarray(z, np.float64), ids)][-S:]
        seen: set = set()
        total, rows = 0.0, 0
        for i in range(B):
            texts = set(ids.span_hash[i].tolist())
            if tuple(ids.span_hash[i]) in seen:
                continue
            seen.add(tuple(ids.span_hash[i]))
            logits = []
            for other, (keys, of) in enumerate(past):
                for j in range(B):
                    own = other == len(past) - 1 and i == j
                    if not own and of.document[j] != ids.document[i] and not texts & set(of.span_hash[j].tolist()):
                        logits.append(past[-1][0][i, 0] @ keys[j, 1] / 0.1 + params.get("bias", 0.0))
            positive = past[-1][0][i, 0] @ past[-1][0][i, 1] / 0.1 + params.get("bias", 0.0)
            negative = np.array(logits)
            if loss == "infonce":
                total += np.log(np.exp(positive) + np.exp(negative).sum()) - positive
            else:
                total += np.log1p(np.exp(-positive)) + np.log1p(np.exp(negative)).sum()
            rows += 1
        np.testing.assert_allclose(step(z_spread, ids_spread, queue, jnp.int32(k)), total / rows, rtol=1e-5)


def test_a_slot_that_was_never_written_has_no_keys() -> None:
    """Its step was skipped: the memory stays as it was, and the step number goes on."""
    (z, ids), config = batches(1)[0], config_of(name="infonce")
    queue = queue_lib.push(queue_lib.empty_queue(B, S, E), z[:, 1], ids, jnp.int32(1))
    valid = np.asarray(queue_lib.queue_keys(config, queue, jnp.int32(1)).ids.valid)
    np.testing.assert_array_equal(valid, np.broadcast_to([False, True, False], (B, S)))


def test_a_source_without_in_batch_negatives_has_none_in_the_queue_either() -> None:
    """Its documents, numbered below -1 by class, are compared whether or not those of other sources are."""
    (z, ids), labels = batches(1)[0], jnp.zeros(B)
    losses = {}
    for mask, document in ((True, -2 - ids.document % 3), (False, -2 - ids.document % 3), (False, ids.document)):
        config = config_of(name="infonce", mask_same_document=mask)
        objective = pairs.make_objective(config, 2, E)
        of_batch = PairIds(jnp.asarray(document), jnp.asarray(ids.span_hash), labels)
        queue = queue_lib.push(queue_lib.empty_queue(B, S, E), z[:, 1], of_batch, jnp.int32(0))
        keys = queue_lib.queue_keys(config, queue, jnp.int32(0))
        losses[mask, int(document[0]) < 0] = objective.loss(z, of_batch, objective.init(jax.random.key(0)), Given(keys=keys))[0]
    assert losses[False, True] == losses[True, True] < 0.95 * losses[False, False]


def test_step_fills_the_queue_and_moves_the_momentum_encoder(dataset: str) -> None:
    config = shrink(moco.get_config(), dataset)
    config.memory.momentum, config.model.dropout = 0.75, 0.0
    mesh = sharding.make_mesh(config.mesh)
    run = build.build(config, mesh, 320)
    windows, rows = prepared.open_split(dataset, "train"), np.arange(config.data.batch_size)
    stream = pipeline.batches(windows, config.data, 0)
    state = run.init()
    jax.tree.map(np.testing.assert_array_equal, state.memory["target"]["encoder"], state.params["encoder"])
    embed = forward.make_forward(run.encoder.apply, mesh)
    slots = config.memory.queue
    for k in range(slots + 1):
        host = next(stream)
        before = jax.device_get(state)
        state, _, z = run.train_step(state, sharding.to_global(host, rows, len(rows), mesh))
        expected = embed(before.memory["target"]["encoder"], host.tokens[:, 1, 0], host.segment[:, 1, 0])
        np.testing.assert_allclose(state.memory["queue"].z[:, k % slots], expected, atol=1e-5)
        np.testing.assert_allclose(z[:, 1], expected, atol=1e-5)
        np.testing.assert_array_equal(state.memory["queue"].document[:, k % slots], host.document)
        np.testing.assert_array_equal(state.memory["queue"].span_hash[:, k % slots], host.span_hash[:, ::-1])
        jax.tree.map(
            lambda m, old, new: np.testing.assert_allclose(m, 0.75 * old + 0.25 * new, atol=1e-6),
            state.memory["target"]["encoder"],
            before.memory["target"]["encoder"],
            state.params["encoder"],
        )
    assert state.memory["queue"].z.sharding.spec == sharding.BATCH
