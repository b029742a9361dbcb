"""Compiles the train step of a recipe for hardware that you do not have: does it fit, and how fast can it be at most?

The step is the one that `train` runs: it comes from the same `training.build`. Nothing is executed; the figures come from the
compiler (memory) and from `planning.estimate` (time).
"""

import math
import os
import pathlib
import re
import sys
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from contrastive_jax.config import UserError
from contrastive_jax.data import prepared
from contrastive_jax.inference import batching, forward
from contrastive_jax.planning import estimate, hardware, program
from contrastive_jax.runtime import layout, sharding
from contrastive_jax.training import build as build_lib
from contrastive_jax.training import views

DEFAULT_VOCAB_SIZE = 65_536

# What a plan is: the figures of one recipe on one machine, by name, as they are written to JSON.
Plan = dict[str, Any]


class Compiled(NamedTuple):
    """The result of one compilation.

    Attributes:
      memory: bytes per device: "argument", "output", "alias" (outputs that reuse arguments), "temp", "generated_code", and
        "peak", all of them together. Only "peak" if the step did not fit.
      text: the compiled program as HLO text; empty if the step did not fit.
      seconds: the time that the compilation took.
    """

    memory: dict[str, float]
    text: str
    seconds: float


def configure_compilers(target: hardware.Target, schedules: pathlib.Path | None = None) -> None:
    """Makes JAX compile for a machine that is not present. Call it before JAX first looks for devices.

    Args:
      target: the machine.
      schedules: the folder to which the TPU compiler writes the schedules of Pallas kernels; None: it writes none.
    """
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # safe: this process holds no TPU
    if schedules:
        os.environ["LIBTPU_INIT_ARGS"] = (
            f"--xla_jf_dump_to={schedules} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=.*final_bundles.*"
        )
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", target.size if target.kind == "cpu" else 1)


def compile_program(function: jax.stages.Wrapped, *shapes: Any) -> Compiled:
    """Compiles a jitted function for arguments of these shapes. Too little memory for it is a result, not an error."""
    start = time.monotonic()
    lowered = function.lower(*shapes)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        needed = re.search(r"\(([\d.]+)([KMG])\) exceeds available", str(error))
        if not needed:
            raise
        peak = float(needed[1]) * 1024 ** ("KMG".index(needed[2]) + 1)
        return Compiled({"peak": peak}, "", time.monotonic() - start)
    memory = program.device_memory(compiled.memory_analysis())
    return Compiled(memory, compiled.as_text() or "", time.monotonic() - start)


def plan_evaluation(config: ConfigDict, target: hardware.Target, vocab_size: int) -> Plan:
    """Compiles the forward pass of an evaluation, for its largest batch of texts; returns its memory.

    The program is that of `evaluate` and of the evaluations in training, on the mesh of the recipe.

    Args:
      config: the recipe, with `init_from` resolved.
      target: the machine.
      vocab_size: the number of token ids.
    """
    mesh = sharding.make_mesh(config.mesh, hardware.describe_devices(target))
    run, length = build_lib.build(config, mesh, vocab_size), config.model.max_length
    limits = batching.device_limits(layout.on_mesh(mesh).platform).times(mesh.size)
    shards = sharding.batch_shards(mesh)
    rows = -(-limits.batch_size(length, limits.rows) // shards) * shards
    spread = jax.NamedSharding(mesh, sharding.BATCH)
    texts = {
        "tokens": jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=spread),
        "mask": jax.ShapeDtypeStruct((rows, length), jnp.bool, sharding=spread),
    }
    compiled = compile_program(forward.compile_forward(run.encoder.apply, mesh), run.shapes.params["encoder"], texts)
    fits = bool(compiled.memory["peak"] <= target.chip.hbm)
    return {"rows": rows, "length": length, "memory": compiled.memory, "fits": fits, "compile_seconds": compiled.seconds}


def plan_step(config: ConfigDict, target: hardware.Target, vocab_size: int, schedules: pathlib.Path) -> Plan:
    """Compiles the step of a config for a machine and returns its plan.

    Args:
      config: the recipe, with `init_from` resolved.
      target: the machine.
      vocab_size: the number of token ids.
      schedules: the folder for the TPU compiler's schedules, as in `configure_compilers`; it is emptied first.

    Returns:
      The plan. Without the figures of `time_of_step` if the step did not fit.

    Raises:
      UserError: the config is impossible on this machine; the message names the key.
    """
    for path in schedules.iterdir():  # the kernels of the next compilation have the same names
        path.unlink()
    mesh = sharding.make_mesh(config.mesh, hardware.describe_devices(target))
    run = build_lib.build(config, mesh, vocab_size)
    compiled = compile_program(run.train_step, run.shapes, build_lib.batch_shapes(config, mesh))
    params = run.shapes.params
    flops, formula = estimate.model_flops(config, params["encoder"], views.view_count(config.data))
    plan: Plan = {
        "target": target.name,
        "mesh": dict(mesh.shape),
        "batch_shards": sharding.batch_shards(mesh),
        "batch_size": config.data.batch_size,
        "micro_batch": build_lib.micro_batch_pairs(config, mesh),
        "remat": config.model.remat,
        "parameters": sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)),
        "model_flops": flops,
        "formula": formula,
        "memory": compiled.memory | {"capacity": target.chip.hbm},
        "fits": bool(compiled.memory["peak"] <= target.chip.hbm),
        "compile_seconds": compiled.seconds,
    }
    if not compiled.text:
        return plan
    parsed = program.parse_program(compiled.text)
    cost = estimate.CostModel(parsed, target, mesh, schedules).of_computation(parsed.entry)
    return plan | time_of_step(config, target, flops, cost)


def time_of_step(config: ConfigDict, target: hardware.Target, flops: float, cost: estimate.Cost) -> Plan:
    """Returns the part of a plan that follows from the cost of the compiled step: time, utilisation and transfers.

    Args:
      config: the recipe.
      target: the machine.
      flops: the FLOPs that the step needs, from `estimate.model_flops`.
      cost: the cost of one step, from `estimate.CostModel`.
    """
    seconds = cost["seconds"]
    peak_flops = target.size * target.chip.flops * seconds
    traffic: dict[str, dict[str, float]] = {}
    for key in sorted(key for key in cost if key[0] == "traffic"):
        _, kind, axes, quantity = key
        traffic.setdefault(f"{kind} over {axes}", {})[quantity] = cost[key]
    return {
        "step_seconds": seconds,
        "compute_seconds": cost["compute"],
        "kernel_seconds": cost["kernels"],
        "exposed_seconds": cost["exposed"],
        "mfu": flops / peak_flops,
        "hfu": cost["flops"] * target.size / peak_flops,
        "pairs_per_second": config.data.batch_size / seconds,
        "days": config.steps * seconds / 86400,
        "chip_hours": config.steps * seconds / 3600 * target.size,
        "pairs": config.data.batch_size * config.steps,
        "traffic": traffic,
        "network_bytes": cost["network"],
        "network_seconds": sum(figures["seconds"] for name, figures in traffic.items() if name.endswith(" over slices")),
        "unmodelled": {key[1]: count for key, count in cost.items() if key[0] == "unmodelled"},
    }


def format_micro_batch(size: int) -> str:
    """Returns a micro-batch in words, from its pairs over all devices; 0 is the whole batch."""
    return f"micro-batch of {size:,} pairs" if size else "whole batch at once"


def format_memory_rows(plan: Plan) -> list[tuple[str, str]]:
    """Returns the lines of a printed plan about sizes and memory, as (name, text)."""
    memory, gib = plan["memory"], hardware.GIB
    mesh = " × ".join(f"{axis} {size}" for axis, size in plan["mesh"].items())
    names = [name for name in ("argument", "temp", "output", "alias", "generated_code") if name in memory]
    parts = ", ".join(f"{name.replace('_', ' ')} {memory[name] / gib:.2f}" for name in names) or "it did not compile"
    free = (memory["capacity"] - memory["peak"]) / gib
    return [
        ("target", f"{plan['target']}, mesh {mesh}"),
        ("batch", f"{plan['batch_size']:,} pairs, {format_micro_batch(plan['micro_batch'])}, remat {plan['remat']}"),
        ("parameters", f"{plan['parameters']:,}"),
        ("model FLOPs", f"{plan['model_flops']:.4g} per step = {plan['formula']}"),
        ("HBM, GiB per device", f"peak {memory['peak'] / gib:.2f} of {memory['capacity'] / gib:.2f} ({parts})"),
        ("free, GiB per device", f"{free:.2f}" if plan["fits"] else f"{free:.2f}: DOES NOT FIT"),
    ]


def format_time_rows(plan: Plan) -> list[tuple[str, str]]:
    """Returns the lines of a printed plan about transfers and time, as (name, text).

    Exposed transfers are those that no compute hides. MFU (model FLOPs utilisation) is the share of the machine's peak FLOPs
    that the model itself needs; HFU (hardware FLOPs utilisation) counts recomputed FLOPs too. The estimated time is a lower
    bound, so speed and utilisation are upper bounds.
    """
    step, exposed = plan["step_seconds"], plan["exposed_seconds"]
    transfers = [
        (
            name,
            f"{figures['count']:.0f} per step, {figures['asynchronous']:.0f} of them asynchronous: "
            f"{figures['bytes'] / 1e9:.3f} GB, {figures['seconds'] * 1e3:.2f} ms",
        )
        for name, figures in plan["traffic"].items()
    ]
    compute = f"compute {plan['compute_seconds']:.4f} s, of which attention kernels {plan['kernel_seconds']:.4f} s"
    return [
        *transfers,
        *format_network_row(plan),
        ("step, at least", f"{step:.4f} s: {compute}; the rest is exposed transfers"),
        ("exposed transfers", f"{exposed:.4f} s ({exposed / step:.1%} of the step)"),
        ("utilisation, at most", f"MFU {plan['mfu']:.1%}, HFU {plan['hfu']:.1%}"),
        ("not modelled", ", ".join(f"{n:.0f} × {name}" for name, n in plan["unmodelled"].items()) or "nothing"),
        ("speed, at most", f"{plan['pairs_per_second']:,.0f} pairs/s"),
        ("whole run, at least", f"{plan['days']:.2f} days, {plan['chip_hours']:,.0f} chip-hours for {plan['pairs']:,} pairs"),
    ]


def format_network_row(plan: Plan) -> list[tuple[str, str]]:
    """Returns the line of a printed plan about the transfers between slices; nothing where there is one slice."""
    target = hardware.parse_target(plan["target"])
    if target.slices == 1:
        return []
    chip, moved = target.chip, plan["network_bytes"] / 1e9
    amount = (
        f"{moved:.3f} GB into each device per step, {moved * chip.per_host:.2f} GB into each host of {chip.per_host} devices"
    )
    rate = f"{plan['network_seconds']:.4f} s at {chip.network * chip.per_host / 1e9:g} GB/s per host"
    return [("between slices", f"{amount}: {rate}")]


def format_plan(plan: Plan) -> str:
    """Returns the plan as a table of text."""
    rows = format_memory_rows(plan)
    if "step_seconds" in plan:
        rows += format_time_rows(plan)
    if evaluation := plan.get("evaluation"):
        peak, capacity = evaluation["memory"]["peak"] / hardware.GIB, plan["memory"]["capacity"] / hardware.GIB
        texts = f"{evaluation['rows']:,} texts of {evaluation['length']} tokens at once"
        verdict = "" if evaluation["fits"] else ": DOES NOT FIT"
        rows.append(("evaluation, GiB per device", f"peak {peak:.2f} of {capacity:.2f} for {texts}{verdict}"))
    rows.append(("compiled in", f"{plan['compile_seconds']:.0f} s"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


def plan_recipe(
    config: ConfigDict, target: hardware.Target, vocab_size: int, schedules: pathlib.Path, evaluation: bool = False
) -> Plan:
    """Plans a recipe for a machine, and prints the plan.

    Args:
      config: the recipe, with `init_from` resolved.
      target: the machine.
      vocab_size: the number of token ids.
      schedules: an empty folder for the compiler's output.
      evaluation: whether to plan the memory of evaluations too.
    """
    plan = plan_step(config, target, vocab_size, schedules)
    if evaluation:
        plan["evaluation"] = plan_evaluation(config, target, vocab_size)
    print(format_plan(plan), flush=True)
    return plan


def vocab_size_of_data(folder: str) -> int:
    """Returns the vocabulary of the prepared data, or 65,536 (with a note on stderr) if they cannot be read here."""
    try:
        return prepared.load_manifest(folder)["vocab_size"]
    except (OSError, UserError) as error:
        note = f"planning for a vocabulary of {DEFAULT_VOCAB_SIZE:,} (set --vocab_size for another)"
        print(f"{error}; {note}", file=sys.stderr)
        return DEFAULT_VOCAB_SIZE
