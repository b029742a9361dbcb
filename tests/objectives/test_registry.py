"""The objectives by name: their weights in the total, those that add to others, and the run that has none."""

import jax
import numpy as np
import pytest
from objectives import composition

from contrastive_jax.config import UserError, default_config
from contrastive_jax.objectives import registry, spread
from contrastive_jax.objectives.objective import Given

PARTS = [(slice(0, 12), 4), (slice(12, 20), 3)]  # of the pairs, and how many views count


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


def test_extra_losses_are_added_with_their_weights_and_stand_alone_without_the_first() -> None:
    config, (z, ids) = default_config(), (composition.embeddings(2), composition.ids(2))
    first = registry.make_objective(config, 2, composition.E)
    params = first.init(jax.random.key(0))
    plain = [spread.spread_mean(config, 2, composition.E).loss(z, ids, {})[0], first.loss(z, ids, params)[0]]
    config.objective.update(weight=0.5, extra=(("spread_mean", 3.0),))
    value, metrics = registry.make_objective(config, 2, composition.E).loss(z, ids, params)
    np.testing.assert_allclose(value, 3 * plain[0] + 0.5 * plain[1], rtol=1e-6)
    np.testing.assert_allclose([metrics["extra_spread_mean"], metrics["batch_loss"]], plain, rtol=1e-6)
    config.objective.weight = 0
    alone = registry.make_objective(config, 2, composition.E)
    assert alone.init(jax.random.key(0)) == {}
    np.testing.assert_allclose(alone.loss(z, ids, {})[0], 3 * plain[0], rtol=1e-6)
    config.objective.extra = (("infonce", 1.0),)
    with pytest.raises(UserError, match="config.objective.extra: no loss 'infonce'; there are similarity, embedding"):
        registry.make_objective(config, 2, composition.E)


@pytest.mark.parametrize("name", ["margin_mse", "kl"])
def test_documents_without_a_score_do_not_count(name: str) -> None:
    """The loss of pairs with fewer documents, weighted by what counts: margins, or pairs."""
    config = default_config()
    config.data.sampler, config.objective.name = "fields", name
    loss = registry.make_objective(config, 4, composition.E).loss
    z, ids = composition.embeddings(4), composition.ids(4)
    scores = np.random.default_rng(0).normal(size=(composition.B, 3)).astype(np.float32)
    whole, short = (loss(z[part, :views], ids._replace(scores=scores[part, : views - 1]), {})[0] for part, views in PARTS)
    scores[12:, 2] = scores[20:, 1] = np.nan  # from 20 on one score alone, which says nothing
    value, gradient = jax.value_and_grad(lambda z: loss(z, ids._replace(scores=scores), {})[0])(z)
    counts = (12 * 2, 8) if name == "margin_mse" else (12, 8)
    np.testing.assert_allclose(value, np.average([whole, short], weights=counts), rtol=1e-6)
    assert np.isfinite(gradient).all() and not gradient[20:].any() and not gradient[12:, 3].any()
    with pytest.raises(UserError, match=f"'{name}': the pairs of config.data.dir=.* have no scores"):
        loss(z, ids, {})
    with pytest.raises(UserError, match=f"'{name}' compares the documents of a pair .* config.data.views=3 or more"):
        registry.make_objective(config, 2, composition.E)


def test_embeddings_follow_a_target_of_their_own_width() -> None:
    config = default_config()
    config.objective.name = "embedding"
    with pytest.raises(UserError, match="'embedding' needs a target; set config.memory.kind='frozen'"):
        registry.make_objective(config, 2, composition.E)
    config.memory.kind = "frozen"
    loss, z = registry.make_objective(config, 2, composition.E).loss, composition.embeddings(2)
    np.testing.assert_allclose(loss(z, composition.ids(2), {}, Given(z))[0], 0, atol=1e-6)
    with pytest.raises(UserError, match="vectors of 5 numbers with vectors of 16; set config.model.embedding_dim=5"):
        loss(z, composition.ids(2), {}, Given(z[..., :5]))


def test_a_guide_needs_a_target() -> None:
    config = default_config()
    config.objective.update(mask_guide=True, mask_margin=0.0)
    for kind in ("", "queue"):
        config.memory.kind = kind
        with pytest.raises(UserError, match="'mask_guide' needs a target; set config.memory.kind='frozen'"):
            registry.make_objective(config, 2, composition.E)
