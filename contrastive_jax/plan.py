"""Compiles a recipe's very train step for hardware one doesn't own, and says whether it fits and how fast it may be.

  python -m contrastive_jax.plan --config=configs/cpt_text.py:s --target=tpu:v5e:16x16 [--json=FILE] [--config.key=value ...]

Needs `pip install 'contrastive_jax[plan]'`: the compilers of TPU and GPU, which run on any machine. Exit status: 0, 1 where
the step does not fit (what would is then searched for and printed), 2 for bad input. --search: the largest micro-batch for each
remat policy, the fastest first.
"""

import json
import math
import os
import pathlib
import re
import sys
import tempfile
import time
from typing import Any, NamedTuple

import jax
from absl import flags, logging
from ml_collections import ConfigDict

from contrastive_jax import build as build_lib
from contrastive_jax import cli, sharding, warm_start
from contrastive_jax.data import pipeline
from contrastive_jax.planning import estimate, hardware, program

CONFIG = cli.define_config()
TARGET = flags.DEFINE_string("target", None, f"The machine: {hardware.EXAMPLES}.", required=True)
JSON = flags.DEFINE_string("json", None, "Write the plan to this file too.")
SEARCH = flags.DEFINE_bool("search", False, "Find the largest micro-batch that fits, for each remat policy.")
VOCAB = flags.DEFINE_integer("vocab_size", None, "Ids of the tokenizer; by default those of config.data.dir, or 65,536.")

POLICIES = ("none", "dots", "attention", "full")  # from the least recomputation to the most


class Compiled(NamedTuple):
    """What a compilation gave.

    Attributes:
      memory: bytes a device: arguments, outputs, aliased, temporaries, peak (of all together); only "peak" if it did not fit.
      text: the program; empty where it did not fit.
      seconds: of compiling.
    """

    memory: dict[str, float]
    text: str
    seconds: float


def prepare(target: hardware.Target, dump: pathlib.Path) -> None:
    """Lets the compilers start where their devices are not. Before JAX first looks for devices."""
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # nothing here holds a TPU
    os.environ["LIBTPU_INIT_ARGS"] = (
        f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=.*final_bundles.*"
    )
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", target.size if target.kind == "cpu" else 1)


def compile_step(config: ConfigDict, mesh: Any, vocab_size: int) -> tuple[build_lib.Run, Compiled]:
    """Builds the run and compiles its step; a step that does not fit is no error."""
    run = build_lib.build(config, mesh, vocab_size)
    start = time.monotonic()
    lowered = run.train_step.lower(run.shapes, build_lib.batch_shapes(config, mesh))
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        needed = re.search(r"\(([\d.]+)([KMG])\) exceeds available", str(error))
        if not needed:
            raise
        peak = float(needed[1]) * 1024 ** ("KMG".index(needed[2]) + 1)
        return run, Compiled({"peak": peak}, "", time.monotonic() - start)
    found = compiled.memory_analysis()
    parts = {
        name: getattr(found, f"{name}_size_in_bytes") for name in ("argument", "output", "alias", "temp", "generated_code")
    }
    total = sum(parts.values()) - 2 * parts["alias"]
    peak = max(total, getattr(found, "peak_memory_in_bytes", 0))
    return run, Compiled(parts | {"peak": peak}, compiled.as_text() or "", time.monotonic() - start)


def plan(config: ConfigDict, target: hardware.Target, vocab_size: int, dump: pathlib.Path) -> dict[str, Any]:
    """Everything that is printed, as numbers."""
    for path in dump.iterdir():  # kernels have the same names in each compilation of a search
        path.unlink()
    mesh = sharding.make_mesh(config.mesh, hardware.devices(target))
    run, compiled = compile_step(config, mesh, vocab_size)
    params = run.shapes.params
    views = build_lib.batch_shapes(config, mesh)["tokens"].shape[1]
    flops, formula = estimate.model_flops(config, params["encoder"], views)
    result: dict[str, Any] = {
        "target": target.name,
        "mesh": dict(mesh.shape),
        "batch_size": config.data.batch_size,
        "micro_batch": build_lib.micro_batch(config, mesh),
        "remat": config.model.remat,
        "parameters": sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)),
        "model_flops": flops,
        "formula": formula,
        "memory": compiled.memory | {"capacity": target.chip.hbm},
        "fits": bool(compiled.memory["peak"] <= target.chip.hbm),
        "compile_seconds": compiled.seconds,
    }
    if not compiled.text:
        return result
    model = estimate.Model(parsed := program.parse(compiled.text), target, mesh, dump)
    step = model.computation(parsed.entry)
    peak = target.size * target.chip.flops * step["seconds"]
    traffic: dict[str, dict[str, float]] = {}
    for key in sorted(key for key in step if key[0] == "traffic"):
        traffic.setdefault(f"{key[1]} over {key[2]}", {})[key[3]] = step[key]
    return result | {
        "step_seconds": step["seconds"],
        "compute_seconds": step["compute"],
        "kernel_seconds": step["kernels"],
        "exposed_seconds": step["exposed"],
        "mfu": flops / peak,
        "hfu": step["flops"] * target.size / peak,
        "pairs_per_second": config.data.batch_size / step["seconds"],
        "days": config.steps * step["seconds"] / 86400,
        "chip_hours": config.steps * step["seconds"] / 3600 * target.size,
        "pairs": config.data.batch_size * config.steps,
        "traffic": traffic,
        "unmodelled": {key[1]: count for key, count in step.items() if key[0] == "unmodelled"},
    }


def rows_of_time(result: dict[str, Any]) -> list[tuple[str, str]]:
    """The lines of a plan that tell transfers and time."""
    step, exposed = result["step_seconds"], result["exposed_seconds"]
    rows = [
        (
            name,
            f"{one['count']:.0f} of which {one['asynchronous']:.0f} asynchronous, {one['bytes'] / 1e9:.3f} GB, "
            f"{one['seconds'] * 1e3:.2f} ms",
        )
        for name, one in result["traffic"].items()
    ]
    compute = f"compute {result['compute_seconds']:.4f} of which attention kernels {result['kernel_seconds']:.4f}"
    return [
        *rows,
        ("step, estimated", f"{step:.4f} s: {compute}, transfers that nothing hides {exposed:.4f} ({exposed / step:.1%})"),
        ("utilisation, at most", f"MFU {result['mfu']:.1%}; with recomputed FLOPs {result['hfu']:.1%}"),
        ("not modelled", ", ".join(f"{n:.0f} × {name}" for name, n in result["unmodelled"].items()) or "nothing"),
        ("speed, at most", f"{result['pairs_per_second']:,.0f} pairs/s"),
        ("the whole run", f"{result['pairs']:,} pairs: {result['days']:.2f} days, {result['chip_hours']:,.0f} chip-hours"),
    ]


def show(result: dict[str, Any]) -> str:
    """The plan as a table."""
    gib = hardware.GIB
    memory = result["memory"]
    mesh = " × ".join(f"{axis} {size}" for axis, size in result["mesh"].items())
    parts = [(name, memory[name]) for name in ("argument", "temp", "output", "alias", "generated_code") if name in memory]
    shown = ", ".join(f"{name.replace('_', ' ')} {value / gib:.2f}" for name, value in parts) or "it did not compile"
    free = (memory["capacity"] - memory["peak"]) / gib
    rows = [
        ("target", f"{result['target']}, mesh {mesh}"),
        ("batch", f"{result['batch_size']:,} pairs, micro-batch {result['micro_batch'] or 'none'}, remat {result['remat']}"),
        ("parameters", f"{result['parameters']:,}"),
        ("model FLOPs", f"{result['model_flops']:.4g} a step = {result['formula']}"),
        ("HBM, GiB a device", f"peak {memory['peak'] / gib:.2f} of {memory['capacity'] / gib:.2f} ({shown})"),
        ("free", f"{free:.2f}" if result["fits"] else f"{free:.2f}: DOES NOT FIT"),
    ]
    rows += rows_of_time(result) if "step_seconds" in result else []
    rows.append(("compiled in", f"{result['compile_seconds']:.0f} s"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


def search(
    config: ConfigDict, target: hardware.Target, vocab_size: int, dump: pathlib.Path, done: dict[str, Any]
) -> list[dict[str, Any]]:
    """For each remat policy the largest micro-batch that fits, as plans; `done` is the config's own, found already."""
    found = []
    for policy in POLICIES:
        size: int | None = 0
        while size is not None:
            trial = config.copy_and_resolve_references()
            trial.model.remat, trial.micro_batch, trial.micro_batch_tokens = policy, size, 0
            same = (policy, size) == (done["remat"], done["micro_batch"])
            result = done if same else plan(trial, target, vocab_size, dump)
            used, room = result["memory"]["peak"], result["memory"]["capacity"]
            shown = f"{used / hardware.GIB:.2f} of {room / hardware.GIB:.2f} GiB"
            print(f"  remat {policy}, micro-batch {size or 'none'}: {shown}", flush=True)
            if result["fits"]:
                found.append(result)
                break
            share = math.prod(result["mesh"][axis] for axis in sharding.BATCH[0]) * config.data.pack_pairs
            size = smaller(size or config.data.batch_size, used / room, share)
    return found


def smaller(size: int, excess: float, share: int) -> int | None:
    """The next micro-batch to try: what the excess asks for, at least halved, a multiple of `share`; None: there is none."""
    each = size // share // max(2, math.ceil(excess))
    return each * share if each else (share if size > share else None)


def main(argv: list[str]) -> None:
    """The command."""
    del argv
    config = CONFIG.value
    logging.set_verbosity(logging.WARNING)  # `build` tells each parameter's rules, once a compilation
    with tempfile.TemporaryDirectory() as folder, cli.user_errors():
        dump = pathlib.Path(folder)
        target = hardware.parse(TARGET.value)
        prepare(target, dump)
        vocab_size = VOCAB.value or known_vocab(config.data.dir)
        config = warm_start.resolve(config)
        result = plan(config, target, vocab_size, dump)
        print(show(result), flush=True)
        others = []
        if SEARCH.value or not result["fits"]:
            print("looking for what fits, and how large", flush=True)
            others = search(config, target, vocab_size, dump, result)
            for other in sorted(others, key=lambda one: one["step_seconds"]):
                gib, flags_ = other["memory"]["peak"] / hardware.GIB, f"--config.model.remat={other['remat']}"
                flags_ += f" --config.micro_batch={other['micro_batch']}"
                print(f"fits: {flags_}  peak {gib:.2f} GiB, step {other['step_seconds']:.4f} s, MFU {other['mfu']:.1%}")
            if not others:
                print(f"nothing fits on {target.name}: raise config.mesh.fsdp or config.mesh.tensor, or take a larger one")
        if JSON.value:
            pathlib.Path(JSON.value).write_text(json.dumps(result | {"search": others}, indent=2))
    sys.exit(0 if result["fits"] else 1)


def known_vocab(folder: str) -> int:
    """The vocabulary of the prepared data, where it is here."""
    try:
        return pipeline.load_manifest(folder)["vocab_size"]
    except (OSError, ValueError):
        print(f"config.data.dir={folder} is not here: planning for a vocabulary of 65,536 (--vocab_size)", file=sys.stderr)
        return 65_536


if __name__ == "__main__":
    cli.run(main, config="configs/debug.py")
