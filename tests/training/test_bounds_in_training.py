"""The recipes of mutual information: a step is the same on any mesh and in micro-batches, and MINE's average follows it."""

import jax
import numpy as np
import pytest
from conftest import recipe, shrink
from ml_collections import ConfigDict

from contrastive_jax.config import UserError
from contrastive_jax.data import pipeline, prepared
from contrastive_jax.runtime import sharding
from contrastive_jax.training import build


def step(config: ConfigDict, dataset: str, devices: int) -> tuple:
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:devices])
    run = build.build(config, mesh, 320)
    host = next(pipeline.batches(prepared.open_split(dataset, "train"), config.data, 0))
    return run.train_step(run.init(), sharding.to_global(host, np.arange(16), 16, mesh))


@pytest.mark.parametrize(
    ("variant", "vectors"),
    [("dim", 9), pytest.param("cpc", 4, marks=pytest.mark.slow), pytest.param("mine", 2, marks=pytest.mark.slow)],
)
def test_row52_a_step_is_the_same_on_any_mesh_and_in_micro_batches(variant: str, vectors: int, dataset: str) -> None:
    config, values = shrink(recipe("information", variant), dataset), []
    config.model.update(dropout=0.2, zero_init_branches=False)
    for devices, micro_batch in ((1, 0), (8, 8)):
        config.micro_batch = micro_batch
        state, metrics, z = step(config, dataset, devices)
        assert z.shape == (16, vectors, 16)
        if variant == "mine":
            np.testing.assert_array_equal(state.params["objective"]["log_average"], metrics["log_average"])
        values.append((float(metrics["loss"]), float(metrics["gradient_norm"]), np.asarray(z)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), *values)


def test_m5_the_bias_of_skip_grams_stands_still(dataset: str) -> None:
    config = shrink(recipe("skipgram"), dataset)
    state, _, _ = step(config, dataset, 1)
    assert state.params["objective"]["bias"] == np.float32(config.objective.bias)
    np.testing.assert_allclose(config.objective.bias, -np.log(recipe("skipgram").data.batch_size - 1), atol=0.01)


def test_row52_token_states_need_rows_and_widths_of_their_own(dataset: str) -> None:
    config = shrink(recipe("information", "dim"), dataset)
    config.model.embedding_dim = 8
    with pytest.raises(UserError, match=r"config.objective.locals: needs config.data.pack_pairs=1"):
        step(config, dataset, 1)
