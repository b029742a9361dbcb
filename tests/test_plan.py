"""The plan: what it reads out of compiled programs is what they do, and it compiles every shipped recipe for its hardware."""

import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, overrides, recipe
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from contrastive_jax import build, sharding
from contrastive_jax.planning import estimate, hardware, program

MESH = {"data": 2, "fsdp": 4, "tensor": 1}


def costs(function: object, *shapes: jax.ShapeDtypeStruct) -> estimate.Cost:
    mesh = sharding.make_mesh(ConfigDict(MESH))
    parsed = program.parse(jax.jit(function).lower(*shapes).compile().as_text())
    return estimate.Model(parsed, hardware.parse("cpu:8"), mesh, None).computation(parsed.entry)


def spread(shape: tuple[int, ...], *spec: object) -> jax.ShapeDtypeStruct:
    mesh = sharding.make_mesh(ConfigDict(MESH))
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P(*spec)))


def test_loops_are_multiplied_and_products_counted() -> None:
    def chain(x: jax.Array, w: jax.Array) -> jax.Array:
        step = lambda x, w: (jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, length=3)[0], None)  # noqa: E731
        return jax.lax.scan(step, x, w)[0]

    cost = costs(chain, spread((48, 64)), spread((5, 64, 64)))
    assert cost["flops"] == 5 * 3 * 2 * 48 * 64 * 64
    assert cost["seconds"] >= cost["flops"] / hardware.CHIPS["cpu"].flops
    assert not any(key[0] == "traffic" for key in cost)


def test_transfers_are_told_by_kind_and_axis() -> None:
    mesh = sharding.make_mesh(ConfigDict(MESH))

    def step(x: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.lax.with_sharding_constraint(w, NamedSharding(mesh, P())), x.sum()

    cost = costs(step, spread((16, 32), ("data", "fsdp")), spread((32, 40), None, "fsdp"))
    assert cost["traffic", "all-gather", "fsdp", "count"] == 1
    assert cost["traffic", "all-gather", "fsdp", "bytes"] == 32 * 40 * 4
    assert cost["traffic", "all-reduce", "data+fsdp", "count"] == 1
    assert cost["traffic", "all-reduce", "data+fsdp", "bytes"] == 4


@pytest.mark.parametrize(
    ("text", "group"),
    [
        ("replica_groups={{0,2,4},{1,3,5}}, x", (0, 2, 4)),
        ("replica_groups=[2,4]<=[8], x", (0, 1, 2, 3)),
        ("replica_groups=[2,4]<=[4,2]T(1,0), x", (0, 2, 4, 6)),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, x", (0, 1, 2, 3)),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}, x", (0, 4)),
        ("replica_groups=mesh['a'=1,'b'=4,'c'=2], device_ids=([2,4]T(1,0)) {'b'}, x", (0, 1, 2, 3)),
        ("source_target_pairs={{0,1},{1,2}}", (0, 1)),
        ("no groups", tuple(range(8))),
    ],
)
def test_groups_of_devices(text: str, group: tuple[int, ...]) -> None:
    assert program.group_of(text, 8) == group


def test_products_written_as_convolutions() -> None:
    text = """
ENTRY %main (a: bf16[1,96,768], b: bf16[12,768,64]) -> bf16[12,96,64] {
  %a = bf16[1,96,768]{2,1,0} parameter(0)
  %b = bf16[12,768,64]{2,1,0} parameter(1)
  ROOT %c = bf16[12,96,64]{2,1,0} convolution(%a, %b), window={size=12 pad=11_11 rhs_reversal=1}, dim_labels=0bf_0io->0bf
}
"""
    parsed = program.parse(text)
    assert program.product_flops(parsed, parsed.computations["main"][-1]) == 2 * 96 * 768 * 12 * 64


def test_asynchronous_transfers_hide_behind_compute() -> None:
    text = """
%wide (p: (s32[], f32[64,64])) -> (s32[], f32[64,64]) {
  %p = (s32[], f32[64,64]{1,0:T(8,128)}) parameter(0)
  %fusion.1 = f32[64,64]{1,0} fusion(%p), kind=kOutput, calls=%f, backend_config={"estimated_cycles":"3000000"}
  %all-gather-start.1 = (f32[1000,1000]{1,0}, f32[8000,1000]{1,0}) all-gather-start(%fusion.1), replica_groups=[2,4]<=[8]
  %all-gather-done.1 = f32[8000,1000]{1,0} all-gather-done(%all-gather-start.1)
  ROOT %all-reduce.1 = f32[1000,1000]{1,0} all-reduce(%fusion.1), replica_groups=[1,8]<=[8]
}

%condition (q: (s32[], f32[64,64])) -> pred[] {
  %q = (s32[], f32[64,64]) parameter(0)
  %constant.1 = s32[] constant(7)
  ROOT %compare.1 = pred[] compare(%q, %constant.1), direction=LT
}

ENTRY %main (a: f32[64,64]) -> f32[64,64] {
  %a = f32[64,64]{1,0} parameter(0)
  ROOT %while.1 = (s32[], f32[64,64]{1,0}) while(%a), condition=%condition, body=%wide
}
"""

    class Device:
        def __init__(self, x: int):
            self.coords = (x % 4, x // 4, 0)

    class Slice:
        shape, size, devices = MESH, 8, np.array([Device(x) for x in range(8)])

    parsed = program.parse(text)
    cost = estimate.Model(parsed, hardware.parse("tpu:v5e:2x4"), Slice(), None).computation(parsed.entry)
    compute = 3_000_000 / 1.5e9
    gather = 32e6 * 3 / 4 / 45e9  # hidden: shorter than the compute
    reduce = 4e6 * 2 * 7 / 8 / 90e9
    assert gather < compute
    assert cost["seconds"] == pytest.approx(7 * (compute + reduce))
    assert cost["traffic", "all-gather", "fsdp", "asynchronous"] == 7
    assert cost["traffic", "all-gather", "fsdp", "seconds"] == pytest.approx(7 * gather)
    assert cost["traffic", "all-reduce", "data+fsdp", "asynchronous"] == 0


def test_model_flops_are_six_a_weight_and_token() -> None:
    config = recipe("debug")
    mesh = sharding.make_mesh(ConfigDict({"data": -1, "fsdp": 1, "tensor": 1}))
    params = build.build(config, mesh, 320).shapes.params["encoder"]
    flops, formula = estimate.model_flops(config, params, 2)
    d, f, tokens = config.model.d_model, config.model.d_ff, 128 * 2 * 64
    weights = 4 * d * d + 2 * d * f
    assert flops == tokens * (6 * weights + 12 * d * 64) + 6 * 128**2 * d
    assert f"{weights:,}" in formula


def command(*arguments: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    run = [sys.executable, "-m", "contrastive_jax.plan", *arguments]
    return subprocess.run(run, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)


def test_the_command_on_eight_cpus(dataset: pathlib.Path, tmp_path: pathlib.Path) -> None:
    file = tmp_path / "plan.json"
    done = command(*overrides("debug", dataset), "--target=cpu:8", "--config.mesh.fsdp=4", f"--json={file}")
    assert done.returncode == 0, done.stderr[-2000:]
    for word in ("parameters", "model FLOPs", "HBM", "all-gather over fsdp", "MFU", "pairs/s", "chip-hours", "compiled in"):
        assert word in done.stdout
    found = json.loads(file.read_text())
    assert found["fits"] and found["mesh"] == {"data": 2, "fsdp": 4, "tensor": 1}
    assert found["pairs_per_second"] == pytest.approx(16 / found["step_seconds"])


@pytest.mark.slow
def test_what_does_not_fit_says_what_would(dataset: pathlib.Path) -> None:
    batch = 2**20  # 2 × 24 tokens × 32 wide and 4 heads: 100 GB of activations
    done = command(
        *overrides("debug", dataset),
        "--target=cpu:1",
        f"--config.data.batch_size={batch}",
    )
    assert done.returncode == 1, done.stderr[-2000:]
    assert "DOES NOT FIT" in done.stdout
    fits = [line for line in done.stdout.splitlines() if line.startswith("fits: ")]
    assert fits and all("--config.micro_batch=" in line for line in fits)


def test_an_unknown_target_lists_what_there_is() -> None:
    for name in ("tpu:v9:4x4", "tpu:v5e:4x4x4", "gpu:h100:8", "cpu", "cpu:0"):
        with pytest.raises(ValueError, match=r"tpu:v4, tpu:v5e, .*gpu:h100, .*such as tpu:v5e:4x4"):
            hardware.parse(name)
    done = command("--target=tpu:v9:4x4")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr and done.stderr.strip().splitlines()[-1].startswith("error: --target=tpu:v9:4x4")


SHIPPED = [
    ("cpt_text.py:s", "tpu:v5e:16x16"),
    ("cpt_text.py:s-gpu", "gpu:h100:4x8"),
    ("cpt_text.py:m", "tpu:v5p:4x4x8"),
    ("cpt_text.py:l", "tpu:v5p:8x8x8"),
    ("cpt_text.py:xl", "tpu:v5p:16x16x16"),
    ("bert_base.py", "gpu:h100:1x1"),
    ("bert_base.py", "tpu:v5e:4x4"),
    ("modern_base.py", "gpu:h100:1x1"),
    ("modern_base.py", "tpu:v5e:4x4"),
    *(
        (f"{path.name}", "cpu:1")
        for path in sorted((ROOT / "configs").glob("*.py"))
        if "_text" not in path.name and "_base" not in path.name
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "target"), SHIPPED)
def test_every_shipped_recipe_fits_its_hardware(name: str, target: str) -> None:
    """`pip install .[plan]` first; 3 minutes each for the large ones."""
    if target.startswith("tpu"):
        pytest.importorskip("libtpu")
    if target.startswith("gpu"):
        pytest.importorskip("jax_plugins.xla_cuda12")
    done = command(f"--config=configs/{name}", f"--target={target}")
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert re.search(r"not modelled +(nothing|1 × ZeroCrop)\n", done.stdout), done.stdout
