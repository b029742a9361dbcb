"""Evaluates an encoder: `python -m contrastive_jax.evaluate --model=runs/debug --tasks=query_key`.

The model is the workdir of a run (its newest checkpoint; DIR@STEP, DIR@best: that one), an exported folder, or a Hugging Face
or sentence-transformers folder (hf:FOLDER). Each task has its --data, in the order of --tasks (or one for all):

query_key             held-out spans of a prepared dataset, by default the run's own
sts                   a folder of .tsv: score, text, text
wordsim               a folder of .tsv or .csv: word, word, score
retrieval             a BEIR folder: corpus.jsonl, queries.jsonl, qrels/test.tsv
codesearch            a folder of .jsonl or .jsonl.gz with docstring(_tokens) and code(_tokens)
probe knn zero_shot   a folder of .jsonl with text and label, a SentEval task's folder, or tfds:NAME
glue                  fine-tuning: a folder with train.jsonl and dev.jsonl of labelled pairs, or tfds:glue/rte
mteb                  tasks of the mteb package, --mteb=NAMES; their --data is optional

Results are printed and written, with the protocol that decided them, to WORKDIR/TASK-DATA.json or to --json. Two of them side
by side: `--compare A.json B.json`. Vectors of texts are kept in --cache, by model and text.
"""

import functools
import importlib.metadata
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

from absl import flags, logging
from etils import epath

from contrastive_jax import cli, finetune, mteb_model, processes, results, tasks, text_model
from contrastive_jax.data import pipeline
from contrastive_jax.evals import baselines, cache, query_key
from contrastive_jax.results import Rows
from contrastive_jax.tasks import TASK_OF, Encode

CACHE_HOME = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")

MODEL = flags.DEFINE_string("model", None, "A workdir, DIR@STEP, an exported folder, or hf:FOLDER.")
TASKS = flags.DEFINE_list("tasks", ["query_key"], "What to run, of those above.")
DATA = flags.DEFINE_list("data", [], "Data of each task, or of all.")
JSON = flags.DEFINE_string("json", None, "Where the results go; by default WORKDIR/TASK-DATA.json.")
PAIRS = flags.DEFINE_integer("pairs", None, "Pairs of the query-key test; as in training by default.", lower_bound=1)
SPAN = flags.DEFINE_integer("span", None, "Tokens of a span of the query-key test; as in training by default.", lower_bound=1)
BASELINES = flags.DEFINE_bool("baselines", False, "Score chance, TF-IDF, BM25 and the untrained encoder on the same data too.")
CACHE = flags.DEFINE_string("cache", f"{CACHE_HOME}/contrastive_jax/vectors.sqlite", "Vectors of texts; empty: none are kept.")
COMPARE = flags.DEFINE_string("compare", None, "A.json B.json: prints results side by side, and evaluates nothing.")
EPOCHS = flags.DEFINE_integer("epochs", finetune.RECIPE.epochs, "Epochs of a fine-tuning (glue).", lower_bound=1)
SEEDS = flags.DEFINE_integer("seeds", finetune.RECIPE.seeds, "Fine-tunings (glue), each of its own seed.", lower_bound=1)
MTEB = flags.DEFINE_list("mteb", ["STSBenchmark"], "MTEB's names of its tasks (mteb).")
ANY_PROTOCOL = flags.DEFINE_bool("any_protocol", False, "--compare results although they were measured differently.")


def run_query_key(model: text_model.TextModel, data: str) -> tuple[Rows, dict[str, Any]]:
    """Chance, the untrained encoder, the trained one, and the baselines asked for."""
    if model.config is None or model.untrained is None:
        raise ValueError(f"--tasks=query_key: {MODEL.value} is no run of ours; its spans are tokens of the run's own tokenizer")
    config = model.config
    config.data.dir = data or config.data.dir
    config.eval.pairs = PAIRS.value or config.eval.pairs
    config.eval.span = SPAN.value or config.eval.span
    windows = pipeline.open_split(config.data.dir, "validation")
    pairs = query_key.make_pairs(windows, config.eval, config.data)
    rows: Rows = {"chance": query_key.chance(len(pairs.spans))}
    if BASELINES.value:
        rows |= query_key.baselines(pairs, text_model.words_of(epath.Path(model.protocol["model"]), config).decode)
    for name, forward in (("untrained", model.untrained()), (f"step {model.protocol['step']}", model.forward)):
        rows[name] = query_key.evaluate(forward, pairs, config.eval.batch_size)
    print(query_key.table(rows))
    how = {key: config.eval[key] for key in ("pairs", "span", "seed")}
    return rows, {"data": windows.manifest["content_hash"], "split": "validation"} | how


def run_glue(model: text_model.TextModel, data: str) -> tuple[Rows, dict[str, Any]]:
    """Fine-tunes the encoder on pairs."""
    place: epath.Path | str = data if data.startswith("tfds:") else epath.Path(data).expanduser()
    if not data or (isinstance(place, epath.Path) and not place.is_dir()):
        raise ValueError(f"--data={data}: --tasks=glue needs the folder of its data, or tfds:NAME")
    recipe = finetune.RECIPE._replace(epochs=EPOCHS.value, seeds=SEEDS.value)
    rows = finetune.evaluate(model, place, recipe)
    print(results.table(f"glue {data}, × 100", rows))
    how = {"features": "u, v, |u - v|, u · v", "chosen": "best epoch on the held-out part", "views": "0, 0"}
    return rows, {"data": tasks.hash_of_data(place, ("*.jsonl",))} | recipe._asdict() | how


def run_mteb(model: text_model.TextModel, data: str) -> tuple[Rows, dict[str, Any]]:
    """MTEB's own tasks."""
    place = epath.Path(data).expanduser() if data else None
    rows = mteb_model.run(model, MTEB.value, place)
    print(results.table("mteb, × 100", rows))
    told = tasks.hash_of_data(place, ("*",)) if place else "as downloaded"
    return rows, {"mteb": importlib.metadata.version("mteb"), "names": MTEB.value, "data": told}


# Tasks that take the model, and not its vectors.
OF_MODEL: dict[str, Callable[[text_model.TextModel, str], tuple[Rows, dict[str, Any]]]] = {
    "query_key": run_query_key,
    "glue": run_glue,
    "mteb": run_mteb,
}


def run(name: str, model: text_model.TextModel, data: str) -> tuple[Rows, dict[str, Any]]:
    """Scores the model, and the baselines asked for, by a task; their rows are called "BASELINE: ROW".

    Raises:
      ValueError: the data are not as they should be.
    """
    task, place = TASK_OF[name], tasks.place_of(name, data)
    rows = dict(task.score(model.encode if not CACHE.value else from_cache(model), place))
    others: dict[str, Callable[[], Rows]] = {}
    if BASELINES.value:
        others["chance"] = lambda: task.score(lambda texts, view: baselines.chance(texts), place)
        if "TF-IDF" not in task.baselines:
            fitted = baselines.tfidf(task.texts(place))
            others["TF-IDF"] = lambda: task.score(lambda texts, view: fitted(texts), place)
        others |= {name: functools.partial(score, place) for name, score in task.baselines.items()}
        if model.untrained is not None:
            fresh = model._replace(forward=model.untrained())
            others["untrained"] = lambda: task.score(fresh.encode, place)
    for other, score in others.items():
        logging.info("%s: %s", name, other)
        rows |= {f"{other}: {row}": figures for row, figures in score().items()}
    print(results.table(f"{name} {data}, × 100", rows))
    return rows, {"data": tasks.hash_of_data(place, task.files)} | task.protocol


def from_cache(model: text_model.TextModel) -> Encode:
    """The model's `encode`, whose vectors are kept by all that decides them."""
    path = pathlib.Path(CACHE.value).expanduser()
    # The folder's name decides nothing; the tokenizer is not part of the protocol.
    known = {key: value for key, value in model.protocol.items() if key not in ("model", "step")}
    known["tokens"] = model.tokenize(["A tokenizer's fingerprint: Zwölf Boxkämpfer, 0123456789\n\t(x)"], 0)
    return lambda texts, view: cache.cached(path, json.dumps(known | {"view": view}), lambda new: model.encode(new, view))(
        texts
    )


def result_path(model: str, task: str, data: str) -> epath.Path | None:
    """Where a result goes: to --json, or into the workdir; of other folders nowhere."""
    if JSON.value:
        return epath.Path(JSON.value)
    folder = epath.Path(model.rpartition("@")[0] or model).expanduser()
    name = f"{task}-{epath.Path(data).name.replace(':', '-')}" if data and task != "query_key" else task
    return folder / f"{name}.json" if (folder / "checkpoints").is_dir() else None


def main(argv: list[str]) -> None:
    """The command."""
    with cli.user_errors():
        if COMPARE.value:
            found = [results.read(epath.Path(path), path) for path in (*COMPARE.value.split(","), *argv[1:])]
            print(results.compare(found, ANY_PROTOCOL.value))
            return
        if argv[1:]:
            raise ValueError(f"unexpected argument {argv[1]!r}; flags are given as --name=value")
        if not MODEL.value:
            raise ValueError("--model: give a workdir, DIR@STEP, an exported folder, or hf:FOLDER")
        for task in TASKS.value:
            if task not in TASK_OF and task not in OF_MODEL:
                raise ValueError(f"--tasks={task}: choose one of {', '.join((*OF_MODEL, *TASK_OF))}")
        if JSON.value and len(TASKS.value) > 1:
            raise ValueError(f"--json={JSON.value}: one file holds one task; give one of --tasks={','.join(TASKS.value)}")
        if len(DATA.value) not in (0, 1, len(TASKS.value)):
            raise ValueError(
                f"--data names {len(DATA.value)} folders, --tasks {len(TASKS.value)} tasks; give one for each or for all"
            )
        processes.enable_compilation_cache()
        model = text_model.open_model(MODEL.value)
        places = DATA.value if len(DATA.value) == len(TASKS.value) else (DATA.value or [""]) * len(TASKS.value)
        for task, data in zip(TASKS.value, places, strict=True):
            rows, protocol = OF_MODEL[task](model, data) if task in OF_MODEL else run(task, model, data)
            if path := result_path(MODEL.value, task, data):
                results.write(path, task, rows, model.protocol | protocol)
                logging.info("written to %s", path)


if __name__ == "__main__":
    cli.run(main, positional=True)
