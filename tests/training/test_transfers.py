"""Nothing that a traced function closes over lives on a device, and the loop copies nothing between host and device in passing.

Under `jax.transfer_guard("disallow")` a GPU or TPU refuses both; see `transfers.py` for how a CPU is made to refuse them.
"""

import json
import pathlib
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import RECIPES, VOCAB, recipe, shrink
from ml_collections import ConfigDict
from transfers import TransferError, array_constants, like_an_accelerator

import contrastive_jax
from contrastive_jax.runtime import checkpoint, digest, sharding
from contrastive_jax.training import build, log_line
from contrastive_jax.training import step as step_lib


def programs(config: ConfigDict) -> dict[str, Any]:
    """The jaxpr of each program of a run, by name."""
    run = build.build(config, sharding.make_mesh(config.mesh), VOCAB)
    params, batch = run.shapes.params, build.batch_shapes(config, run.mesh)
    traced = {"init": run.init.trace(), "train step": run.train_step.trace(run.shapes, batch)}
    z = traced["train step"].out_info[2]
    rows = jax.ShapeDtypeStruct((8, config.data.length), jnp.int32)
    mask = jax.ShapeDtypeStruct(rows.shape, bool)
    traced["encode"] = jax.jit(run.encoder.apply).trace(params["encoder"], rows, mask)
    traced["sample of the log line"] = log_line.make_sample(run.mesh).trace(z)
    for name, item in checkpoint_items(run.shapes).items():
        leaves = jax.tree.leaves(item)
        traced[f"hash of {name}"] = digest.hash_arrays.trace(leaves, replicated=sharding.replicated(run.mesh))
    return {name: program.jaxpr for name, program in traced.items()}


def checkpoint_items(shapes: step_lib.TrainState) -> dict[str, Any]:
    return {name: item for name in checkpoint.ITEMS if (item := getattr(shapes, name)) != ()}


@pytest.mark.parametrize(("name", "argument"), RECIPES)
def test_a1_no_traced_function_closes_over_a_device_array(name: str, argument: str, dataset: pathlib.Path) -> None:
    config = shrink(recipe(name, *[argument] * bool(argument)), dataset)
    config.model.dropout = 0.1
    found = {name: constants for name, jaxpr in programs(config).items() if (constants := array_constants(jaxpr))}
    assert not found


def test_a1_constants_are_found_wherever_they_are() -> None:
    key, array, host = jax.random.key(0), jnp.arange(3), np.arange(3)

    def inner(x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda total, y: (total + y * array.sum(), None), x, host)[0]

    def outer(x: jax.Array) -> jax.Array:
        return jax.jit(inner)(x) + jax.random.uniform(key)

    assert sorted(array_constants(jax.jit(outer).trace(jnp.int32(1)).jaxpr)) == ["int32[3]", "key<fry>[]"]
    assert not array_constants(jax.jit(lambda x: jax.random.uniform(jax.random.key(0)) + host[0] + x).trace(1.0).jaxpr)


def test_a1_implicit_copies_are_refused_as_on_an_accelerator() -> None:
    x = jax.device_put(np.arange(3.0))
    implicit = {
        "float": lambda: float(jax.jit(jnp.sum)(x)),
        "bool": lambda: bool(jax.jit(jnp.all)(x)),
        "index": lambda: [1, 2][jax.jit(jnp.argmin)(x)],
        "numpy": lambda: np.asarray(x),
        "list": lambda: np.mean([x, x]),
        "text": lambda: f"{jax.jit(jnp.sum)(x):.3f}",
        "constant": lambda: jax.jit(lambda y: y + x)(x),
    }
    with like_an_accelerator(), jax.transfer_guard("disallow"):
        for name, copy in implicit.items():
            with pytest.raises(TransferError):
                copy()
                pytest.fail(name)
        np.testing.assert_array_equal(jax.device_get(x), np.arange(3.0))
        with jax.transfer_guard("allow"):
            np.asarray(x)
    assert memoryview(x).nbytes == 12  # open again


@pytest.mark.parametrize("name", ["debug", "moco"])
def test_a1_the_loop_makes_no_implicit_copy(name: str, dataset: pathlib.Path, tmp_path: pathlib.Path) -> None:
    config = shrink(recipe(name), dataset)
    config.update(steps=6, log_every=2, checkpoint_every=2)
    config.update(**({"eval_every": 2} if name == "debug" else {"micro_batch": 8}))  # moco also with gradient caching
    config.model.dropout = 0.1
    with like_an_accelerator():
        assert contrastive_jax.train(config, tmp_path, stop_at=3) == 3
        assert contrastive_jax.train(config, tmp_path) == 6
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [2, 4, 6]
    assert [line["step"] for line in lines if "query_key/mean/top5" in line] == ([0, 2, 4, 6] if name == "debug" else [])
