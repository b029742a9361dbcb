"""What only an accelerator can show. Each check returns figures, and raises AssertionError where something is wrong.

`small` makes a check small enough for a CPU, which runs the code of the check and nothing of the accelerator.
"""

import functools
import importlib
import io
import itertools
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict
from objectives import composition

from contrastive_jax.data.batch import Batch
from contrastive_jax.models import attention
from contrastive_jax.models.layer_context import LayerContext
from contrastive_jax.planning import estimate, hardware, program
from contrastive_jax.runtime import digest, sharding
from contrastive_jax.runtime.layout import on_mesh
from contrastive_jax.training import build

ROOT = pathlib.Path(__file__).parents[2]
Figures = dict[str, Any]
VOCAB_SIZE = 8192
# The largest relative error of fused attention and its gradients, in the Euclidean norm, against the plain one in float32. The
# matrix units of an accelerator multiply float32 in parts of lower precision unless asked otherwise.
BOUNDS = {"float32": 5e-3, "bfloat16": 2e-2}
RECIPES = ("bert_base", "cpt_text:s", "cpt_text:m", "cpt_text:l", "cpt_text:xl", "cpt_text:s-gpu", "debug", "modern_base")


def load_recipe(name: str, small: bool = False) -> ConfigDict:
    """Returns a recipe for all devices here; `small`: its choices with toy sizes."""
    file, _, argument = name.partition(":")
    config = importlib.import_module(f"configs.{file}").get_config(*[argument] * bool(argument))
    config.mesh.update(data=-1, fsdp=1, tensor=1)
    if small:
        config.model.update(num_layers=min(config.model.num_layers, 1), d_model=16, d_ff=32)
        config.model.update(num_heads=2, num_kv_heads=2, head_dim=8)
        config.data.update(batch_size=16, length=24, min_span=6, max_span=20)
        config.micro_batch = 8 if config.micro_batch else 0
        config.memory.queue = min(config.memory.queue, 2)
    return config


def random_batch(config: ConfigDict, mesh: Mesh, step: int) -> Batch:
    """Returns the batch of a step: random tokens, of spans that are as long as the recipe says."""
    rng, data = np.random.default_rng(step), config.data
    b, length = data.batch_size, data.length
    size = rng.integers(data.min_span, min(data.max_span, length) + 1, (b, 2, 1, 1))
    local = Batch(
        tokens=rng.integers(8, VOCAB_SIZE, (b, 2, 1, length)).astype(np.int32),
        segment=(np.arange(length) < size).astype(np.int32),
        document=np.arange(b, dtype=np.int32),
        span_hash=np.arange(2 * b, dtype=np.int32).reshape(b, 2),
    )
    rows = sharding.rows_of_process(b, mesh)
    return sharding.to_global(local, rows, b, mesh)


def check_resume(small: bool) -> Figures:
    """Steps under the transfer guard; a run that is saved, read and continued ends with the parameters of an unbroken one."""
    figures: Figures = {}
    for name in ("debug",) if small else ("debug", "moco", "large_batch"):
        config = load_recipe(name, small)
        mesh = sharding.make_mesh(config.mesh)
        run = build.build(config, mesh, VOCAB_SIZE)

        def train(state: Any, first: int, end: int, run: Any = run, config: ConfigDict = config, mesh: Mesh = mesh) -> Any:
            with jax.transfer_guard("disallow"):
                for step in range(first, end):
                    state, _, _ = run.train_step(state, random_batch(config, mesh, step))
            return state

        unbroken, again = (digest.hash_tree(train(run.init(), 0, 6)) for _ in range(2))
        resumed = digest.hash_tree(train(saved_and_read(train(run.init(), 0, 3), run.shapes), 3, 6))
        figures[name] = digest.combine_hashes(resumed)
        assert unbroken == again, (
            f"{name}: two equal runs differ in {differing(unbroken, again)}: the device is not deterministic"
        )
        assert unbroken == resumed, f"{name}: a resumed run differs in {differing(unbroken, resumed)}"
    return figures


def saved_and_read(state: Any, shapes: Any) -> Any:
    """Returns a state that went through a file in memory."""
    file = io.BytesIO()
    leaves, tree = jax.tree.flatten(jax.device_get(state))
    np.savez(file, *leaves)
    file.seek(0)
    with np.load(file) as arrays:
        read = [arrays[f"arr_{number}"] for number in range(len(leaves))]
    return jax.tree.map(lambda x, shape: jax.device_put(x, shape.sharding), jax.tree.unflatten(tree, read), shapes)


def differing(left: dict[str, str], right: dict[str, str]) -> str:
    return ", ".join(path for path in left if left[path] != right[path])


def attention_shapes(small: bool) -> Iterator[tuple[ConfigDict, int]]:
    """Yields config.model and the tokens of a row of every shape of attention that a recipe has, once each."""
    seen = set()
    for name in RECIPES:
        config = load_recipe(name, small)
        model = config.model
        key = (model.num_heads, model.num_kv_heads, model.head_dim, config.data.length, model.causal, model.local_window > 0)
        if key not in seen:
            seen.add(key)
            yield model, config.data.length


def check_attention(small: bool) -> Figures:
    """Fused attention, of packed rows and of others, equals the plain one in value and gradients."""
    figures: Figures = {}
    layout = on_mesh(sharding.make_mesh(ConfigDict({"data": 1, "fsdp": 1, "tensor": 1}), jax.devices()[:1]))
    variants = [("bfloat16", False), ("float32", True), ("bfloat16", True), ("float32", False)]
    for model, length in itertools.islice(attention_shapes(small), 1 if small else None):
        for dtype, packed in variants[: 2 if small else None]:
            config = model.copy_and_resolve_references()
            config.update(dtype=dtype, attention="fused", attention_dropout=0.0)
            kind = f"{'causal ' * config.causal}{'windows ' * bool(config.local_window)}{'packed ' * packed}{dtype}"
            name = f"{config.num_heads}x{config.head_dim}, {length} tokens, {kind}"
            windowed = config.local_window > 0
            reason = ""
            if layout.platform in ("gpu", "cuda"):
                reason = attention.why_not_cudnn(config, length, packed or windowed, False, layout.compute_capability)
            if reason:
                figures[name] = reason
                continue
            error = attention_error(config, attention.make_attend(config, layout), length, packed, rows=2 if small else 8)
            figures[name] = error
            assert error <= BOUNDS[dtype], f"{name}: relative error {error:.2g}, bound {BOUNDS[dtype]:.2g}"
    return figures


def attention_error(config: ConfigDict, attend: attention.Attend, length: int, packed: bool, rows: int) -> float:
    """Returns the largest relative error of output and gradients against plain attention in float32."""
    rng, heads, groups = np.random.default_rng(1), config.num_heads, config.num_kv_heads
    inputs = [jnp.asarray(rng.normal(size=(rows, length, h, config.head_dim)), config.dtype) for h in (heads, groups, groups)]
    size = rng.integers(length // 2, length + 1, rows).astype(np.int32)
    segment = np.arange(length) < size[:, None]
    segment = segment * (1 + (np.arange(length) >= length // 3)) if packed else segment
    window = jnp.int32(config.local_window) if config.local_window else None
    position = jnp.arange(length)[None]
    context = LayerContext(jnp.asarray(segment, jnp.int32), position, None if packed else jnp.asarray(size), window)
    weight = jnp.asarray(rng.normal(size=(rows, length, heads, config.head_dim)) * (segment > 0)[:, :, None, None], jnp.float32)

    def results(attend: Callable, dtype: str) -> list[np.ndarray]:
        def loss(inputs: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
            out = attend(*inputs, context).astype(jnp.float32)
            return (out * weight).sum(), out * (weight != 0)

        (_, out), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))([x.astype(dtype) for x in inputs])
        return [np.asarray(x, np.float32) for x in (out, *gradients)]

    with jax.default_matmul_precision("highest"):
        expected = results(functools.partial(attention.plain, config), "float32")
    actual = results(attend, config.dtype)
    return max(float(np.linalg.norm(a - e) / np.linalg.norm(e)) for a, e in zip(actual, expected, strict=True))


def check_losses(small: bool) -> Figures:
    """Each loss in each place equals the dense one: loss within 1e-6, gradients within 1e-5."""
    cases = [("dcl", "local", "direct", 1, 0, "whole", "plain")] if small else composition.COVER
    checked = []
    for loss, where, how, devices, *rest in cases:
        count = min(devices, 2 ** (jax.device_count().bit_length() - 1))
        if where == "ring" and count == 1:
            continue
        with jax.default_matmul_precision("highest"):
            composition.check_composition(loss, where, how, count, *rest)
        checked.append(f"{loss} {where} {how} on {count}")
    return {"equal": checked}


def target_here() -> hardware.Target | None:
    """Returns the machine that this is, as `plan` names it; None: one that `plan` does not know."""
    device, count = jax.devices()[0], jax.device_count()
    kinds = {"v5 lite": "tpu:v5e", "v5e": "tpu:v5e", "v6": "tpu:v6e", "v5": "tpu:v5p", "v4": "tpu:v4", "tpu7x": "tpu:7x"}
    kinds |= {"h100": "gpu:h100", "h200": "gpu:h200", "b200": "gpu:b200", "a100": "gpu:a100-80", "cpu": "cpu"}
    kind = next((kind for word, kind in kinds.items() if word in device.device_kind.lower()), None)
    if kind not in hardware.CHIPS:
        return None
    if device.platform == "tpu":
        extents = [1 + max(one.coords[axis] for one in jax.devices()) for axis in range(hardware.CHIPS[kind].axes)]
        return hardware.parse_target(f"{kind}:{'x'.join(map(str, extents))}")
    return hardware.parse_target(f"{kind}:{count}" if kind == "cpu" else f"{kind}:{jax.process_count()}x{count}")


def check_plan(small: bool) -> Figures:
    """The plan's memory is the allocator's peak, and its time a lower bound of the clock's."""
    target = target_here()
    if target is None:
        return {"skipped": f"plan does not know {jax.devices()[0].device_kind}"}
    figures: Figures = {}
    for name in ("bag",) if small else ("debug", "bert_base", "modern_base"):  # by memory, the smallest first
        config = load_recipe(name, small)
        mesh = sharding.make_mesh(config.mesh)
        while True:
            run = build.build(config, mesh, VOCAB_SIZE)
            compiled = run.train_step.lower(run.shapes, build.batch_shapes(config, mesh)).compile()
            memory = program.device_memory(compiled.memory_analysis())
            if memory["peak"] <= target.chip.hbm:
                break
            config.data.batch_size //= 2
        parsed = program.parse_program(compiled.as_text() or "")
        planned = estimate.CostModel(parsed, target, mesh, None).of_computation(parsed.entry)["seconds"]
        state, batch = run.init(), random_batch(config, mesh, 0)
        seconds = []
        for _ in range(3 if small else 12):
            begin = time.perf_counter()
            state, metrics, _ = compiled(state, batch)
            jax.block_until_ready((state, metrics))
            seconds.append(time.perf_counter() - begin)
        measured = statistics.median(seconds[2:])
        figures[name] = {"batch": config.data.batch_size, "planned_seconds": planned, "seconds": measured}
        figures[name] |= {"pairs_per_second": config.data.batch_size / measured, "planned_bytes": memory["peak"]}
        statistics_of_device = jax.local_devices()[0].memory_stats() or {}
        if peak := statistics_of_device.get("peak_bytes_in_use"):
            figures[name]["peak_bytes"] = peak
            assert 0.7 <= memory["peak"] / peak <= 1.3 or peak < 2**30, (
                f"{name}: planned {memory['peak']:.3g} bytes, peak {peak:.3g}"
            )
        assert target.kind == "cpu" or measured > 0.9 * planned, (
            f"{name}: {measured:.3g} s per step, planned at least {planned:.3g}"
        )
        del state, batch
    return figures


def check_train_step(small: bool) -> Figures:
    """The train step beside the same one in PyTorch, on the same device."""
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing or small:
        return {"skipped": f"{', '.join(missing)} not installed" if missing else "small"}
    command = [
        sys.executable,
        "-m",
        "benchmarks.train_step",
        "--shapes=pile_small,minilm,bert_base",
        "--dtypes=float32,bfloat16",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stderr[-2000:]
    return {"table": done.stdout.splitlines()}


CHECKS: dict[str, Callable[[bool], Figures]] = {
    "resume": check_resume,
    "attention": check_attention,
    "losses": check_losses,
    "plan": check_plan,
    "train_step": check_train_step,
}
