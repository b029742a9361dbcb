"""The target of a run: how it follows the parameters, and what a step sees of it. MoCo's queue has test_queue.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import recipe, shrink
from ml_collections import ConfigDict

from contrastive_jax.config import UserError, default_config
from contrastive_jax.data import pipeline, prepared
from contrastive_jax.inference import forward
from contrastive_jax.objectives.objective import PairIds
from contrastive_jax.runtime import sharding
from contrastive_jax.training import build, memory
from contrastive_jax.training.views import Rows


def encode(params: dict, rows: Rows, rng: jax.Array | None) -> memory.Encoded:
    return memory.Encoded(rows.tokens[:, :, 0].astype(jnp.float32) * params["encoder"] + (0 if rng is None else 100))


def config_of(**of_memory: object) -> ConfigDict:
    config = default_config()
    config.steps, config.objective.name = 10, "similarity"
    config.memory.update(of_memory)
    return config


@pytest.mark.parametrize("rise", [False, True])
def test_row49_the_average_is_the_closed_sum_of_all_parameters(rise: bool) -> None:
    config = config_of(kind="average", momentum=0.9, rise=rise)
    followed, rng = memory.make_memory(config, encode, 3, 1), np.random.default_rng(0)
    snapshots = [{"encoder": jnp.float32(x), "objective": {"w": jnp.float32(-x)}, "tokens": {}} for x in rng.normal(size=8)]
    state = followed.init(snapshots[0])
    assert state.keys() == {"target"} and state["target"].keys() == {"encoder", "objective"}
    for step, params in enumerate(snapshots[1:]):
        state = followed.after_step(state, params, jnp.int32(step))
    m = [1 - 0.1 * (np.cos(np.pi * k / 10) + 1) / 2 if rise else 0.9 for k in range(7)]
    weights = [np.prod(m)] + [(1 - m[k]) * np.prod(m[k + 1 :]) for k in range(7)]
    expected = sum(weight * float(params["encoder"]) for weight, params in zip(weights, snapshots, strict=True))
    np.testing.assert_allclose(state["target"]["encoder"], expected, rtol=1e-6)
    np.testing.assert_allclose(state["target"]["objective"]["w"], -expected, rtol=1e-6)


def test_row56_a_frozen_target_stands_still_and_has_no_dropout() -> None:
    frozen = memory.make_memory(config_of(kind="frozen"), encode, 3, 1)
    params = {"encoder": jnp.float32(2), "objective": {}}
    state = frozen.init(params)
    tokens = jnp.arange(6).reshape(2, 3, 1, 1)
    rows, ids = Rows(tokens, tokens, tokens[..., 0]), PairIds(jnp.arange(2), tokens[:, :, 0, 0])
    after, given = frozen.before_step(state, rows, ids, jnp.int32(0), jax.random.key(0))
    np.testing.assert_array_equal(given.z[..., 0], 2 * tokens[:, :, 0, 0])
    assert given.params == {} and given.keys is None
    moved = frozen.after_step(after, {"encoder": jnp.float32(9), "objective": {}}, jnp.int32(0))
    assert moved["target"]["encoder"] == 2


def test_row49_a_step_moves_the_average_and_gives_its_embeddings(dataset: str) -> None:
    config = shrink(recipe("bag"), dataset)
    config.objective.name = "similarity"
    config.memory.update(kind="average", momentum=0.75)
    mesh = sharding.make_mesh(config.mesh)
    run = build.build(config, mesh, 320)
    host = next(pipeline.batches(prepared.open_split(dataset, "train"), config.data, 0))
    start = run.init()
    before = jax.device_get(start)
    state, _, z = run.train_step(start, sharding.to_global(host, np.arange(16), 16, mesh))
    expected = jax.tree.map(lambda t, p: 0.75 * t + 0.25 * p, before.memory["target"], {**state.params})
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), state.memory["target"], expected)
    embed = forward.make_forward(run.encoder.apply, mesh)
    direct = embed(before.params["encoder"], host.tokens[:, 1, 0], host.segment[:, 1, 0])
    np.testing.assert_allclose(z[:, 1], direct, atol=1e-5)  # both views are trained


def test_row56_a_target_at_which_no_loss_looks_is_refused() -> None:
    for kind in ("average", "frozen"):
        for name, weight in (("infonce", 1.0), ("simsiam", 1.0), ("similarity", 0.0)):
            config = config_of(kind=kind)
            config.objective.update(name=name, weight=weight)
            with pytest.raises(UserError, match=f"^config.memory.kind='{kind}': no loss looks at the target; set ''"):
                memory.make_memory(config, encode, 2, 1)
    config.tokens.name = "distil"
    memory.make_memory(config, encode, 2, 1)
    config.tokens.weight = 0.0
    with pytest.raises(UserError, match="no loss looks at the target"):
        memory.make_memory(config, encode, 2, 1)
