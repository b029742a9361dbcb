"""The mesh, the sharding rules, and global arrays."""

import pathlib

import jax
import numpy as np
import pytest
from conftest import recipe, shrink
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from contrastive_jax.config import UserError, default_config
from contrastive_jax.data import pipeline, prepared
from contrastive_jax.runtime import layout, sharding
from contrastive_jax.training import build


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1) -> jax.sharding.Mesh:
    return sharding.make_mesh(ConfigDict({"data": data, "fsdp": fsdp, "tensor": tensor}))


def test_an_axis_of_size_minus_one_takes_the_remaining_devices() -> None:
    assert dict(make_mesh(-1, 2, 2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert dict(make_mesh(1, -1).shape) == {"data": 1, "fsdp": 8, "tensor": 1}


@pytest.mark.parametrize("sizes", [(3, 1, 1), (-1, 3, 1), (-1, -1, 1), (0, 8, 1), (4, 1, 1)])
def test_impossible_mesh_is_refused(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(UserError, match=r"config.mesh.data="):
        make_mesh(*sizes)


def test_rules_that_collide_and_sizes_that_do_not_divide_are_refused() -> None:
    mesh = make_mesh(1, 2, 4)
    spec = sharding.parameter_spec(("layers", "embed", "heads", None), (2, 6, 8, 5), mesh, "w")
    assert spec == P(None, "fsdp", "tensor", None)
    with pytest.raises(ValueError, match="w: logical axes .* collide"):
        sharding.parameter_spec(("heads", "mlp"), (8, 8), mesh, "w")
    with pytest.raises(UserError, match="heads of size 6 does not divide over config.mesh.tensor=4"):
        sharding.parameter_spec(("heads",), (6,), mesh, "w")
    with pytest.raises(ValueError, match="'width' is not in sharding.RULES"):
        sharding.parameter_spec(("width",), (6,), mesh, "w")


def test_optimiser_state_lies_where_its_parameter_lies() -> None:
    config = default_config()
    run = build.build(config, make_mesh(2, 2, 2), vocab_size=300)
    kernel = run.shapes.params["encoder"]["transformer"]["blocks"]["mlp"]["up"]["kernel"]
    assert kernel.sharding.spec == P(None, "fsdp", "tensor")
    moments = [x for x in jax.tree.leaves(run.shapes.opt_state) if x.shape == kernel.shape and x.sharding == kernel.sharding]
    assert len(moments) == 2
    assert run.shapes.params["encoder"]["transformer"]["embedding"].shape == (384, 256)


def test_global_arrays_hold_the_rows_of_the_process() -> None:
    mesh = make_mesh(2, 2, 2)
    rows = sharding.rows_of_process(12, mesh)
    np.testing.assert_array_equal(rows, np.arange(12))
    x = np.arange(12 * 3).reshape(12, 3)
    spread = sharding.to_global({"x": x}, rows, 12, mesh)["x"]
    assert spread.sharding.spec == sharding.BATCH and spread.addressable_shards[0].data.shape == (3, 3)
    np.testing.assert_array_equal(jax.device_get(spread), x)
    with pytest.raises(UserError, match="config.data.batch_size=10 must be a positive multiple of .* = 4"):
        sharding.rows_of_process(10, mesh)


def test_the_shards_of_a_batch_are_those_of_its_layout() -> None:
    mesh = make_mesh(2, 2, 2)
    assert sharding.batch_shards(mesh) == layout.on_mesh(mesh).batch_shards == 4
    assert layout.on_mesh(mesh).tensor_shards == 2
    assert layout.Layout().batch_shards == layout.Layout().tensor_shards == 1
    assert sharding.batch_shards(sharding.all_devices_mesh()) == 8


def test_a_step_of_cpt_text_is_the_same_over_data_fsdp_and_tensor(dataset: pathlib.Path) -> None:
    """Its last block computes the last token alone, with other products of the sharded heads' kernels than the other blocks."""
    config = shrink(recipe("cpt_text", "s"), dataset)
    config.model.dtype, config.optim.warmup_steps = "float32", 0
    host = next(pipeline.batches(prepared.open_split(dataset, "train"), config.data, 0))
    results = []
    for devices, shards in ((1, 1), (8, 2)):
        config.mesh.update(data=-1, fsdp=shards, tensor=shards)
        mesh = sharding.make_mesh(config.mesh, jax.devices()[:devices])
        run = build.build(config, mesh, 320)
        assert build.computes_one_token(config)
        _, metrics, z = run.train_step(run.init(), sharding.to_global(host, np.arange(16), 16, mesh))
        results.append((jax.device_get(z), [float(metrics[name]) for name in ("loss", "gradient_norm")]))
    (z, figures), (expected, reference) = results
    np.testing.assert_allclose(z, expected, atol=1e-6)
    np.testing.assert_allclose(figures, reference, rtol=1e-5)
