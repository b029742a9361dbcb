"""Evaluates a trained encoder: `python -m contrastive_jax.evaluate --workdir=runs/debug --tasks=query_key`.

Results are printed as a table and written to WORKDIR/TASK.json.
"""

import json
import os
from typing import Any

from absl import flags, logging
from etils import epath
from ml_collections import ConfigDict

from contrastive_jax import build as build_lib
from contrastive_jax import checkpoint, cli, processes, sharding
from contrastive_jax.data import pipeline, tokenizer
from contrastive_jax.evals import query_key

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a training run.", required=True)
TASKS = flags.DEFINE_list("tasks", ["query_key"], "What to run: query_key.")
STEP = flags.DEFINE_integer("step", None, "Checkpoint to evaluate; the newest by default.", lower_bound=0)
DATA = flags.DEFINE_string("data", None, "Prepared dataset to take held-out text from; the run's own by default.")
PAIRS = flags.DEFINE_integer("pairs", None, "Pairs of the query-key test; as in training by default.", lower_bound=1)
SPAN = flags.DEFINE_integer("span", None, "Tokens of a span of the query-key test; as in training by default.", lower_bound=1)
BASELINES = flags.DEFINE_bool("baselines", False, "Score TF-IDF and BM25 on the same pairs too.")


def load_config(workdir: epath.Path) -> ConfigDict:
    """The config of a run, from its workdir.

    Raises:
      ValueError: the folder is not a workdir.
    """
    path = workdir / "config.json"
    if not path.exists():
        raise ValueError(f"--workdir={workdir}: no config.json there; give the workdir of a training run")
    return ConfigDict(json.loads(path.read_text()))


def restore(workdir: epath.Path, run: build_lib.Run, step: int | None) -> tuple[int, Any]:
    """The step and parameters of a checkpoint, the newest where `step` is None.

    Raises:
      ValueError: there is none, or not that one.
    """
    checkpoints = checkpoint.Checkpoints(workdir, read_only=True)
    there = checkpoints.steps()
    step = step if step is not None else max(there, default=None)
    if step not in there:
        raise ValueError(f"--workdir={workdir}: no checkpoint {step if step is not None else ''}; there are {there}")
    return step, checkpoints.restore(step, params=run.shapes.params)["params"]


def evaluate_query_key(workdir: epath.Path) -> None:
    """The query-key test: chance, the untrained encoder, the trained one, and the baselines asked for."""
    with cli.user_errors():
        config = load_config(workdir)
        if DATA.value:
            config.data.dir = DATA.value
        config.eval.pairs = PAIRS.value or config.eval.pairs
        config.eval.span = SPAN.value or config.eval.span
        manifest = pipeline.load_manifest(config.data.dir)
        # The mesh of the training may not fit the devices that are here.
        mesh = sharding.make_mesh(ConfigDict({"data": -1, "fsdp": 1, "tensor": 1}))
        run = build_lib.build(config, mesh, manifest["vocab_size"])
        pairs = query_key.make_pairs(pipeline.open_split(config.data.dir, "validation"), config.eval, config.data)
        step, params = restore(workdir, run, STEP.value)
    rows = {"chance": query_key.chance(len(pairs.spans))}
    if BASELINES.value:
        rows |= query_key.baselines(pairs, tokenizer.load(config.data.dir).decode)
    for name, weights in (("untrained", run.init().params), (f"step {step}", params)):
        rows[name] = query_key.evaluate(run.encode, weights, pairs, config.eval.batch_size)
    print(query_key.table(rows))
    protocol = {"data": manifest["content_hash"], "split": "validation", **config.eval.to_dict()}
    path = workdir / "query_key.json"
    path.write_text(json.dumps({"step": step, "protocol": protocol, "results": rows}, indent=2))
    logging.info("written to %s", path)


def main(argv: list[str]) -> None:
    """The command."""
    del argv
    tasks = {"query_key": evaluate_query_key}
    for task in TASKS.value:
        if task not in tasks:
            cli.fail(f"--tasks={task}: choose one of {', '.join(tasks)}")
    processes.enable_compilation_cache()
    for task in TASKS.value:
        tasks[task](epath.Path(os.path.expanduser(WORKDIR.value)))


if __name__ == "__main__":
    cli.run(main)
