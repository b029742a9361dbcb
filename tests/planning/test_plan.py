"""The plan: the figures that it reads out of compiled programs are right, and every shipped recipe fits its hardware."""

import json
import os
import pathlib
import re
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import RECIPES, ROOT, overrides, recipe
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from contrastive_jax.config import UserError
from contrastive_jax.planning import estimate, hardware, plan, program, search
from contrastive_jax.runtime import sharding
from contrastive_jax.training import build

MESH = {"data": 2, "fsdp": 4, "tensor": 1}


def costs(function: object, *shapes: jax.ShapeDtypeStruct) -> estimate.Cost:
    mesh = sharding.make_mesh(ConfigDict(MESH))
    parsed = program.parse_program(jax.jit(function).lower(*shapes).compile().as_text())
    return estimate.CostModel(parsed, hardware.parse_target("cpu:8"), mesh, None).of_computation(parsed.entry)


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


def test_transfers_are_counted_by_kind_and_axis() -> None:
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
    assert program.device_group(text, 8) == group


def test_transfers_that_are_combined_count_together() -> None:
    line = "  %s = ((f32[2,8], f32[4]), (f32[8,8], f32[16])) all-gather-start(%a, %b), replica_groups=[1,4]<=[4]"
    instruction = program.parse_instruction(line)
    assert instruction
    collective = program.parse_collective(instruction, False, 4)
    assert collective and collective.bytes == 4 * (64 + 16) and collective.asynchronous


def test_products_written_as_convolutions() -> None:
    text = """
ENTRY %main (a: bf16[1,96,768], b: bf16[12,768,64]) -> bf16[12,96,64] {
  %a = bf16[1,96,768]{2,1,0} parameter(0)
  %b = bf16[12,768,64]{2,1,0} parameter(1)
  ROOT %c = bf16[12,96,64]{2,1,0} convolution(%a, %b), window={size=12 pad=11_11 rhs_reversal=1}, dim_labels=0bf_0io->0bf
}
"""
    parsed = program.parse_program(text)
    assert program.product_flops(parsed, parsed.computations["main"][-1]) == 2 * 96 * 768 * 12 * 64
    # Attention's scores of 8 rows and 16 heads, as XLA writes them for a TPU: each output sees one element of the input.
    for window in (
        "size=8x16 stride=7x15 lhs_dilate=8x16",
        "size=8x16 stride=8x16 pad=7_7x15_15 lhs_dilate=7x15 rhs_reversal=1x1",
    ):
        text = f"""
ENTRY %main (a: f32[8,16,128,96], b: f32[8,16,128,96]) -> f32[8,16,128,128] {{
  %a = f32[8,16,128,96]{{3,2,1,0}} parameter(0)
  %b = f32[8,16,128,96]{{3,2,1,0}} parameter(1)
  ROOT %c = f32[8,16,128,128]{{3,2,1,0}} convolution(%a, %b), window={{{window}}}, dim_labels=01bf_01oi->01bf
}}
"""
        parsed = program.parse_program(text)
        assert program.product_flops(parsed, parsed.computations["main"][-1]) == 2 * 8 * 16 * 128 * 128 * 96


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

    parsed = program.parse_program(text)
    cost = estimate.CostModel(parsed, hardware.parse_target("tpu:v5e:2x4"), Slice(), None).of_computation(parsed.entry)
    compute = 3_000_000 / 1.5e9
    gather = 32e6 * 3 / 4 / 45e9  # hidden: shorter than the compute
    reduce = 4e6 * 2 * 7 / 8 / 90e9
    assert gather < compute
    assert cost["seconds"] == pytest.approx(7 * (compute + reduce))
    assert cost["traffic", "all-gather", "fsdp", "asynchronous"] == 7
    assert cost["traffic", "all-gather", "fsdp", "seconds"] == pytest.approx(7 * gather)
    assert cost["traffic", "all-reduce", "data+fsdp", "asynchronous"] == 0


def test_transfers_between_slices_go_over_the_network_of_the_hosts() -> None:
    """As XLA writes them: a program of one slice that sends and receives, here in a loop of three turns."""
    text = """
%body (p: (s32[], f32[64,64])) -> (s32[], f32[64,64]) {
  %p = (s32[], f32[64,64]{1,0}) parameter(0)
  %all-gather.1 = f32[8000,1000]{1,0} all-gather(%p), replica_groups=[1,8]<=[8]
  %send.1 = (f32[1000,1000]{1,0}, u32[], token[]) send(%p), is_host_transfer=true, frontend_attributes={KIND}
  %recv.1 = (f32[1000,1000]{1,0}, u32[], token[]) recv(%p), is_host_transfer=true, frontend_attributes={KIND}
  ROOT %recv-done.1 = (f32[1000,1000]{1,0}, token[]) recv-done(%recv.1), is_host_transfer=true
}

%condition (q: (s32[], f32[64,64])) -> pred[] {
  %q = (s32[], f32[64,64]) parameter(0)
  %constant.1 = s32[] constant(3)
  ROOT %compare.1 = pred[] compare(%q, %constant.1), direction=LT
}

ENTRY %main (a: f32[64,64]) -> f32[64,64] {
  %a = f32[64,64]{1,0} parameter(0)
  ROOT %while.1 = (s32[], f32[64,64]{1,0}) while(%a), condition=%condition, body=%body
}
"""
    target = hardware.parse_target("tpu:v5p:2x2x2x4slices")
    assert (target.size, target.slices) == (32, 4)
    devices = np.array([types.SimpleNamespace(coords=(x % 2, x // 2 % 2, x // 4 % 2)) for x in range(32)])
    mesh = types.SimpleNamespace(shape={"data": 4, "fsdp": 8, "tensor": 1}, size=32, devices=devices)
    for kind, name, into_one in (
        ("ALL_REDUCE", "all-reduce", 4e6 * 2 * 3 / 4),
        ("ONE_TO_ONE", "collective-permute", 4e6),
        ("ALL_GATHER", "all-gather", 4e6 * 3 / 4),  # the shape received has the own part too
    ):
        parsed = program.parse_program(text.replace("KIND", f'_xla_megascale_transfer_type="{kind}"'))
        cost = estimate.CostModel(parsed, target, mesh, None).of_computation(parsed.entry)
        assert cost["network"] == pytest.approx(3 * into_one)
        assert cost["traffic", name, "slices", "count"] == cost["traffic", name, "slices", "asynchronous"] == 3
        assert cost["traffic", name, "slices", "seconds"] == pytest.approx(3 * into_one / 6.25e9)
        assert cost["traffic", "all-gather", "fsdp", "count"] == 3


def test_the_devices_of_an_ironwood_chip_share_its_links() -> None:
    target = hardware.parse_target("tpu7x:2x2x1")
    assert target.size == 8
    devices = np.array([types.SimpleNamespace(coords=(x // 2 % 2, x // 4, 0), core_on_chip=x % 2) for x in range(8)])
    mesh = types.SimpleNamespace(devices=devices)

    def bandwidth(*group: int) -> float:
        return estimate.bandwidth(program.Collective("all-gather", 1.0, group, False), target, mesh)

    assert bandwidth(0, 1) == target.chip.inside
    assert bandwidth(0, 2) == target.chip.link / 2  # the other device of each chip uses the same link
    assert bandwidth(0, 1, 2, 3) == target.chip.link


def test_model_flops_are_six_per_weight_and_token() -> None:
    config = recipe("debug")
    mesh = sharding.all_devices_mesh()
    params = build.build(config, mesh, 320).shapes.params["encoder"]
    flops, formula = estimate.model_flops(config, params, 2)
    d, f, tokens = config.model.d_model, config.model.d_ff, 128 * 2 * 64
    weights = 4 * d * d + 2 * d * f
    assert flops == tokens * (6 * weights + 12 * d * 64) + 6 * 128**2 * d
    assert f"{weights:,}" in formula
    scores = [
        (4, 2, dict(pairing="both")),
        (4, 3, dict(pairing="both", positives="mean")),
        (6, 4, dict(pairing="all")),
        (3, 4, {}),
        (2, 4, {"positives": "mean", "data.hard_negatives": 1}),
        (3 + 1 + 2 * 3, 4, {"joint": ("document_query", "query_query", "document_document"), "data.hard_negatives": 1}),
        (8, 1, dict(locals=8)),
        (0, 2, dict(name="cosent")),
    ]
    for matrices, views, values in scores:
        config.objective = recipe("debug").objective
        config.data.hard_negatives = values.pop("data.hard_negatives", 0)
        config.objective.update(values)
        of_scores = estimate.model_flops(config, params, views)[0] - tokens // 2 * views * (6 * weights + 12 * d * 64)
        assert of_scores == 6 * matrices * 128**2 * d
    config.objective = recipe("debug").objective
    config.memory.update(kind="queue", queue=5)
    assert estimate.model_flops(config, params, 2)[0] == flops + 4 * 6 * 128**2 * d
    config.objective.weight, config.tokens.name, config.tokens.positions = 0.0, "mlm", 10
    table = 6 * tokens // 64 * 10 * params["transformer"]["embedding"].size
    assert estimate.model_flops(config, params, 2)[0] == tokens * (6 * weights + 12 * d * 64) + table
    config.noise.ops, config.noise.views = (("mask", 0.15),), (0,)  # of two views
    assert estimate.model_flops(config, params, 2)[0] == tokens * (6 * weights + 12 * d * 64) + table // 2


def test_model_flops_of_a_last_block_for_one_token() -> None:
    config = recipe("debug")
    config.model.update(pooling="eos", num_layers=3)
    params = build.build(config, sharding.all_devices_mesh(), 320).shapes.params["encoder"]
    d, f, tokens, scores = config.model.d_model, config.model.d_ff, 128 * 2 * 64, 6 * 128**2 * config.model.d_model
    weights, attention = 4 * d * d + 2 * d * f, 12 * d * 64
    heads = config.model.num_heads
    of_last = tokens * 12 * heads * d + tokens // 64 * 6 * weights
    assert estimate.model_flops(config, params, 2)[0] == 2 * tokens * (6 * weights + attention) + of_last + scores
    config.data.update(pack_pairs=2, pack_rows=2)  # all tokens, in twice as many rows per group
    assert estimate.model_flops(config, params, 2)[0] == 3 * tokens * (6 * weights + attention) + scores


def test_longer_texts_cost_parameters_but_no_flops() -> None:
    config = recipe("debug")
    config.model.position = "learned"
    mesh = sharding.make_mesh(ConfigDict({"data": -1, "fsdp": 1, "tensor": 1}))

    def flops_and_positions(max_length: int) -> tuple[float, int]:
        config.model.max_length = max_length
        params = build.build(config, mesh, 320).shapes.params["encoder"]
        return estimate.model_flops(config, params, 2)[0], len(params["transformer"]["position_embedding"])

    assert flops_and_positions(64) == (flops_and_positions(512)[0], 64)
    assert flops_and_positions(512)[1] == 512


@pytest.mark.parametrize(
    ("size", "excess", "multiple", "smaller"),
    [(4096, 1.1, 8, 2048), (4096, 3.2, 8, 1024), (24, 2.0, 16, 16), (16, 2.0, 16, None), (100, 2.0, 30, 30)],
)
def test_the_next_micro_batch_is_at_most_half_and_a_multiple(
    size: int, excess: float, multiple: int, smaller: int | None
) -> None:
    assert search.smaller_micro_batch(size, excess, multiple) == smaller


def fake_plan(trial: ConfigDict, seconds: float, peak: float) -> plan.Plan:
    """Returns the plan of a step on a machine of 64 bytes per device."""
    found = {"remat": trial.model.remat, "micro_batch": trial.micro_batch, "batch_shards": 1, "compile_seconds": 1.0}
    found |= {"mesh": dict(MESH), "memory": {"peak": peak, "capacity": 64.0}, "fits": peak <= 64}
    return found | ({"step_seconds": seconds, "mfu": 0.5 / seconds} if peak <= 64 else {})


def test_the_search_for_what_fits_compiles_the_known_plan_no_second_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    config = recipe("debug")
    config.micro_batch_tokens = 64 * 2 * 64  # 64 of the 128 pairs
    compiled = []

    def plan_step(trial: ConfigDict, *_: object) -> plan.Plan:
        assert trial.micro_batch_tokens == 0
        compiled.append((trial.model.remat, trial.micro_batch))
        seconds = 1.0 + search.REMAT_POLICIES.index(trial.model.remat) + (trial.micro_batch > 0)
        return fake_plan(trial, seconds, trial.micro_batch or 128.0)

    monkeypatch.setattr(plan, "plan_step", plan_step)
    known = config.copy_and_resolve_references()
    known.model.remat, known.micro_batch = "dots", 64
    known_plan = fake_plan(known, 3.0, 128.0)
    found = search.Search(config, hardware.parse_target("cpu:1"), 320, pathlib.Path(), known_plan).run(["remat"])
    assert [(one["remat"], one["micro_batch"]) for one in found] == [
        ("none", 64),
        ("dots", 32),
        ("attention", 64),
        ("full", 64),
    ]
    expected = [("none", 0), ("none", 64), ("dots", 0), ("dots", 32), ("attention", 0), ("attention", 64)]
    assert compiled == [*expected, ("full", 0), ("full", 64)]
    assert config.micro_batch_tokens == 64 * 2 * 64
    lines = capsys.readouterr().out.splitlines()
    flags = "--config.model.remat=none --config.micro_batch=0 --config.micro_batch_tokens=0"
    assert lines[2].split() == f"does not fit 0.00 of 0.00 1 s {flags}".split()
    assert lines[3].split() == "2.0000 s 25.0% 0.00 of 0.00 1 s --config.model.remat=none".split()
    assert lines[-5] == "what fits, the fastest first" and lines[-4] == lines[3]


def test_the_search_keeps_what_is_faster_along_each_axis(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """On a machine where each thing saved takes 10 of 64 bytes and spares 0.1 s; a loop and sharing layers cost time."""
    config = recipe("debug")
    config.model.update(remat="full", num_kv_heads=4)
    config.mesh.update(fsdp=4)

    def plan_step(trial: ConfigDict, *_: object) -> plan.Plan:
        if trial.mesh.tensor == 4:
            raise UserError("config.mesh.tensor=4: refused by the test")
        names = dict(trial.model.saved)
        per_block = sum(10 * blocks / config.model.num_layers for blocks in names.values())
        seconds = 5.0 - 0.01 * per_block + 0.5 * trial.model.scan + 0.2 * trial.mesh.tensor
        return fake_plan(trial, seconds, 20.0 + per_block - trial.micro_batch / 128)

    monkeypatch.setattr(plan, "plan_step", plan_step)
    known = plan_step(config)
    axes = ["scan", "saved", "micro_batch", "tensor"]
    found = search.Search(config, hardware.parse_target("cpu:8"), 320, pathlib.Path(), known).run(axes)
    saved = "(('query', 1), ('key', 1), ('value', 1), ('middle', 1))"
    assert found[0]["settings"] == f'--config.model.scan=False "--config.model.saved={saved}"'
    assert found[0]["step_seconds"] < known["step_seconds"] == found[-1]["step_seconds"]
    printed = capsys.readouterr().out
    assert "--config.mesh.fsdp=1 --config.mesh.tensor=4: config.mesh.tensor=4: refused by the test" in printed
    assert len(found) == len(printed.partition("what fits, the fastest first\n")[2].splitlines())


def command(*arguments: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    run = [sys.executable, "-m", "contrastive_jax", "plan", *arguments]
    return subprocess.run(run, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)


def test_the_command_on_eight_cpus(dataset: pathlib.Path, tmp_path: pathlib.Path) -> None:
    file = tmp_path / "plan.json"
    done = command(
        "--config=configs/debug.py",
        *overrides("debug", dataset),
        *("--target=cpu:8", "--config.mesh.fsdp=4", "--evaluation", f"--output={file}"),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for name in ("parameters", "model FLOPs", "HBM", "all-gather over fsdp", "MFU", "pairs/s", "chip-hours", "compiled in"):
        assert name in done.stdout
    written = json.loads(file.read_text())
    assert written["fits"] and written["mesh"] == {"data": 2, "fsdp": 4, "tensor": 1}
    assert written["evaluation"]["fits"] and f"{written['evaluation']['rows']:,} texts of 512 tokens at once" in done.stdout
    assert written["pairs_per_second"] == pytest.approx(16 / written["step_seconds"])


@pytest.mark.slow
def test_a_step_that_does_not_fit_leads_to_settings_that_do(dataset: pathlib.Path) -> None:
    batch = 2**20  # 2 × 24 tokens × 32 wide and 4 heads: 100 GB of activations
    done = command(
        "--config=configs/debug.py",
        *overrides("debug", dataset),
        "--target=cpu:1",
        f"--config.data.batch_size={batch}",
    )
    assert done.returncode == 1, done.stderr[-2000:]
    assert "DOES NOT FIT" in done.stdout
    fits = done.stdout.partition("what fits, the fastest first\n")[2].splitlines()
    assert fits and all("--config.micro_batch=" in line for line in fits)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--config.mesh.fsdp=3", "config.mesh.fsdp=3, config.mesh.tensor=1: must multiply to the 8 devices"),
        ("--output=/absent/plan.json", "--output=/absent/plan.json: give a file in a folder that exists"),
        ("--target=tpu:v9:4x4", "--target=tpu:v9:4x4: no such machine; give a chip (tpu:v4, "),
        ("--search=remat,heads", "--search=heads: choose from remat, scan, saved, micro_batch, tensor"),
        ("--vocab_size=0", "flag --vocab_size=0: 0 is not a positive integer"),
    ],
)
def test_bad_input_is_one_line_and_status_2(dataset: pathlib.Path, flag: str, message: str) -> None:
    done = command("--config=configs/debug.py", *overrides("debug", dataset), "--target=cpu:8", flag)
    assert done.returncode == 2, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and message in last


def test_an_unknown_target_lists_the_known_ones() -> None:
    names = ("tpu:v9:4x4", "tpu:v5e:4x4x4", "gpu:h100:8", "cpu", "cpu:0", "gpu:h100:4x8x2slices", "tpu:v5e:4x4x0slices")
    for name in names:
        with pytest.raises(UserError, match=r"tpu:v4, tpu:v5e, .*gpu:h100, .*such as tpu:v5e:4x4"):
            hardware.parse_target(name)


SHIPPED = [
    ("cpt_text.py:s", "tpu:v5e:16x16"),
    ("cpt_text.py:s-gpu", "gpu:h100:4x8"),
    ("cpt_text.py:m", "tpu:v5p:4x4x8"),
    ("cpt_text.py:l", "tpu:v5p:8x8x8"),
    ("cpt_text.py:xl", "tpu:v5p:8x8x16x4slices"),
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
    """`pip install .[plan]` first; 3 minutes each for the large ones, 20 seconds for the others.

    It may lie in a folder of its own, in PYTHONPATH: JAX looks for a TPU where it finds libtpu.
    """
    if target.startswith("tpu"):
        pytest.importorskip("libtpu")
    if target.startswith("gpu"):
        pytest.importorskip("jax_plugins.xla_cuda12")
    done = command(f"--config=configs/{name}", f"--target={target}", "--config.memory.source=")
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert re.search(r"not modelled +(nothing|\d+ × ZeroCrop)\n", done.stdout), done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("target", ["tpu:v5e:4x4", "gpu:h100:1x1"])
def test_the_step_of_every_recipe_compiles_and_fits(target: str) -> None:
    """All in one process, since imports take longer than a step of one block; `pip install .[plan]` first."""
    pytest.importorskip("libtpu" if target.startswith("tpu") else "jax_plugins.xla_cuda12")
    names = [f"{name}:{argument}" for name, argument in RECIPES if "_text" not in name and "_base" not in name]
    environment = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    script = [sys.executable, str(ROOT / "tests" / "planning" / "every_recipe.py"), target, *names]
    with subprocess.Popen(script, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        results = dict(line.rstrip().split(" ", 1) for line in process.stdout)
    assert results == dict.fromkeys(names, "fits; not modelled: nothing")
