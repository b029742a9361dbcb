"""The objectives by name: their weight in the total, and the run that has none."""

import jax
import numpy as np
import pytest
from objectives import composition

from contrastive_jax.config import UserError, default_config
from contrastive_jax.objectives import registry


def test_the_weight_scales_the_loss_and_0_builds_nothing() -> None:
    config = default_config()
    z, ids = composition.embeddings(2), composition.ids(2)
    whole = registry.make_objective(config, 2, composition.E)
    params = whole.init(jax.random.key(0))
    config.objective.weight = 0.25
    value, metrics = registry.make_objective(config, 2, composition.E).loss(z, ids, params)
    np.testing.assert_allclose(value, 0.25 * whole.loss(z, ids, params)[0], rtol=1e-6)
    assert metrics["in_batch_top1"] == whole.loss(z, ids, params)[1]["in_batch_top1"]
    config.objective.weight = 0
    nothing = registry.make_objective(config, 1, composition.E)
    assert nothing.init(jax.random.key(0)) == {}
    assert nothing.loss(z, ids, {}) == (0, {})


def test_a_pair_loss_needs_two_views() -> None:
    with pytest.raises(
        UserError, match=r"config.objective.name='infonce' needs two views, .*set config.data.copies=2, or config.objective"
    ):
        registry.make_objective(default_config(), 1, 8)
