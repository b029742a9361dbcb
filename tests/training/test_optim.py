"""The optimiser: its schedules, its rules by regex, and AdamW itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from contrastive_jax.config import UserError, default_config
from contrastive_jax.models import encoder
from contrastive_jax.training import optim


def optim_config(**changes: object) -> ConfigDict:
    config = default_config().optim
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
    schedule = optim.make_schedule(optim_config(schedule=name, learning_rate=2.0, warmup_steps=10, end_factor=end), 110)
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
    optimizer = optim.make_optimizer(config, 10, params)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    np.testing.assert_allclose(updates["mlp"]["kernel"], -0.1 * 2 * 0.5)
    np.testing.assert_allclose(updates["mlp"]["bias"], 0)
    np.testing.assert_allclose(updates["embedding"], 0)


def test_no_table_of_embeddings_decays_by_default() -> None:
    config = default_config()
    config.model.update(num_layers=1, ngrams=((2, 128),), position="learned", token_weights=True, embedding_dim=8)
    init = encoder.make_encoder(config.model, 50).init
    params = jax.tree.map(lambda x: jnp.ones(x.shape), {"encoder": jax.eval_shape(init, jax.random.key(0))})
    config.optim.update(warmup_steps=0, schedule="constant", weight_decay=0.5)
    optimizer = optim.make_optimizer(config.optim, 10, params)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    transformer = updates["encoder"].pop("transformer")
    assert not any(transformer[name].any() for name in ("embedding", "position_embedding"))
    assert not transformer["ngrams"]["order_2"].any() and updates["encoder"]["projection"]["kernel"].any()


def test_row45_a_constant_rate_is_the_peak_at_every_step() -> None:
    params = {"predictor": jnp.ones(3), "projector": jnp.ones(3)}
    config = optim_config(
        learning_rate=0.2,
        warmup_steps=5,
        weight_decay=0.5,
        weight_decay_rules=((".*", 1.0),),
        constant_rate_rules=(("predictor", 1.0), (".*", 0.0)),
    )
    optimizer, schedule = optim.make_optimizer(config, 20, params), optim.make_schedule(config, 20)
    state = optimizer.init(params)
    for step in range(20):
        updates, state = optimizer.update(jax.tree.map(jnp.zeros_like, params), state, params)
        np.testing.assert_allclose(updates["predictor"], -0.2 * 0.5, rtol=1e-6)
        np.testing.assert_allclose(updates["projector"], -float(schedule(step)) * 0.5, rtol=1e-6)


def test_clipping_and_adam_equal_a_plain_reference() -> None:
    config = optim_config(
        learning_rate=0.1, warmup_steps=0, schedule="constant", weight_decay=0.0, clip_norm=1.0, b1=0.9, b2=0.98
    )
    params = {"kernel": jnp.asarray([1.0, 2.0])}
    optimizer = optim.make_optimizer(config, 10, params)
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
        ({"warmup_steps": 50}, "config.optim.warmup_steps=50 must be in"),
        ({"weight_decay_rules": (("bias", 0.0),)}, "no pattern matches kernel"),
        ({"learning_rate_rules": (("(", 0.0),)}, "config.optim.learning_rate_rules"),
    ],
)
def test_bad_values_name_the_key(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        optim.make_optimizer(optim_config(**changes), 50, {"kernel": jnp.ones(3)})
