"""The mesh and its rules; the optimiser's schedule and regex rules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from configs import base
from contrastive_jax import build, optim, sharding


def mesh(data: int = -1, fsdp: int = 1, tensor: int = 1) -> jax.sharding.Mesh:
    return sharding.make_mesh(ConfigDict({"data": data, "fsdp": fsdp, "tensor": tensor}))


def test_mesh_takes_what_remains() -> None:
    assert dict(mesh(-1, 2, 2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert dict(mesh(1, -1).shape) == {"data": 1, "fsdp": 8, "tensor": 1}


@pytest.mark.parametrize("sizes", [(3, 1, 1), (-1, 3, 1), (-1, -1, 1), (0, 8, 1), (4, 1, 1)])
def test_impossible_mesh_is_refused(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match=r"config.mesh.data="):
        mesh(*sizes)


def test_rules_collide_or_do_not_divide() -> None:
    m = mesh(1, 2, 4)
    assert sharding.spec(("layers", "embed", "heads", None), (2, 6, 8, 5), m, "w") == P(None, "fsdp", "tensor", None)
    with pytest.raises(ValueError, match="w: logical axes .* collide"):
        sharding.spec(("heads", "mlp"), (8, 8), m, "w")
    with pytest.raises(ValueError, match="heads of size 6 does not divide over config.mesh.tensor=4"):
        sharding.spec(("heads",), (6,), m, "w")
    with pytest.raises(ValueError, match="'width' is not in sharding.RULES"):
        sharding.spec(("width",), (6,), m, "w")


def test_optimiser_state_lies_where_its_parameter_lies() -> None:
    config = base.get_config()
    run = build.build(config, mesh(2, 2, 2), vocab_size=300)
    kernel = run.shapes.params["encoder"]["transformer"]["blocks"]["mlp"]["up"]["kernel"]
    assert kernel.sharding.spec == P(None, "fsdp", "tensor")
    moments = [x for x in jax.tree.leaves(run.shapes.opt_state) if x.shape == kernel.shape and x.sharding == kernel.sharding]
    assert len(moments) == 2
    assert run.shapes.params["encoder"]["transformer"]["embedding"].shape == (384, 256)


def test_to_global_and_back() -> None:
    m = mesh(2, 2, 2)
    rows = sharding.rows_of_process(12, m)
    np.testing.assert_array_equal(rows, np.arange(12))
    x = np.arange(12 * 3).reshape(12, 3)
    spread = sharding.to_global({"x": x}, rows, 12, m)["x"]
    assert spread.sharding.spec == sharding.BATCH and spread.addressable_shards[0].data.shape == (3, 3)
    np.testing.assert_array_equal(jax.device_get(spread), x)
    with pytest.raises(ValueError, match="config.data.batch_size=10 must be a positive multiple of .* = 4"):
        sharding.rows_of_process(10, m)


def optim_config(**changes: object) -> ConfigDict:
    config = base.get_config().optim
    config.update(changes)
    return config


@pytest.mark.parametrize(
    ("name", "end", "expected"),
    [
        ("cosine", 0.0, {0: 0, 5: 0.5, 10: 1, 60: 0.5, 110: 0}),
        ("cosine", 0.2, {10: 1, 60: 0.6, 110: 0.2}),
        ("linear", 0.0, {5: 0.5, 10: 1, 35: 0.75, 110: 0}),
        ("rsqrt", 0.0, {0: 0, 9: 0.9, 10: 1, 40: 0.5, 90: 1 / 3}),
        ("constant", 0.0, {0: 0, 10: 1, 109: 1}),
    ],
)
def test_schedules(name: str, end: float, expected: dict[int, float]) -> None:
    schedule = optim.schedule(optim_config(schedule=name, learning_rate=2.0, warmup_steps=10, end_factor=end), 110)
    for step, value in expected.items():
        np.testing.assert_allclose(schedule(step), 2 * value, atol=1e-6)


def test_decay_and_rate_follow_the_first_matching_rule() -> None:
    params = {"mlp": {"kernel": jnp.ones(3), "bias": jnp.ones(3)}, "embedding": jnp.ones(3)}
    config = optim_config(
        learning_rate=0.1,
        warmup_steps=0,
        schedule="constant",
        weight_decay=0.5,
        learning_rate_rules=(("embed", 0.0), (".*", 2.0)),
    )
    optimizer = optim.make(config, 10, params)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    np.testing.assert_allclose(updates["mlp"]["kernel"], -0.1 * 2 * 0.5)
    np.testing.assert_allclose(updates["mlp"]["bias"], 0)
    np.testing.assert_allclose(updates["embedding"], 0)


def test_clipping_and_adam_equal_a_plain_reference() -> None:
    config = optim_config(
        learning_rate=0.1, warmup_steps=0, schedule="constant", weight_decay=0.0, clip_norm=1.0, b1=0.9, b2=0.98
    )
    params = {"kernel": jnp.asarray([1.0, 2.0])}
    optimizer = optim.make(config, 10, params)
    state, m, v, expected = optimizer.init(params), np.zeros(2), np.zeros(2), np.array([1.0, 2.0])
    for t in range(1, 4):
        gradient = np.array([3.0, -4.0]) * t
        updates, state = optimizer.update({"kernel": jnp.asarray(gradient, jnp.float32)}, state, params)
        params = jax.tree.map(jnp.add, params, updates)
        clipped = gradient / np.linalg.norm(gradient)
        m, v = 0.9 * m + 0.1 * clipped, 0.98 * v + 0.02 * clipped**2
        expected = expected - 0.1 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.98**t)) + config.eps)
    np.testing.assert_allclose(params["kernel"], expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": "exp"}, "config.optim.schedule='exp'"),
        ({"warmup_steps": 50}, "config.optim.warmup_steps=50 must be in"),
        ({"learning_rate": 0.0}, "config.optim.learning_rate"),
        ({"b2": 1.0}, "config.optim.b2"),
        ({"weight_decay": -1.0}, "config.optim.weight_decay"),
        ({"weight_decay_rules": (("bias", 0.0),)}, "no pattern matches kernel"),
        ({"learning_rate_rules": (("(", 0.0),)}, "config.optim.learning_rate_rules"),
    ],
)
def test_bad_values_name_the_key(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        optim.make(optim_config(**changes), 50, {"kernel": jnp.ones(3)})
