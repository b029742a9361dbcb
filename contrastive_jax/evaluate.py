"""Evaluates an encoder: `python -m contrastive_jax.evaluate --model=runs/debug --tasks=query_key`.

The model is the workdir of a run (its newest checkpoint; DIR@STEP: that one) or a Hugging Face or sentence-transformers
folder (hf:FOLDER). Tasks: query_key (held-out spans of a prepared dataset, the run's own where --data names none), sts (a
folder of .tsv: score, text, text), retrieval (a BEIR folder), probe, knn and zero_shot (a folder of .jsonl with text and
label). Results are printed and written, with the protocol that decided them, to WORKDIR/TASK.json or to --json.
"""

import functools
import hashlib
import json
from collections.abc import Callable
from typing import Any

from absl import flags, logging
from etils import epath

from contrastive_jax import cli, nearest, processes, text_model
from contrastive_jax.data import pipeline, tokenizer
from contrastive_jax.evals import classify, query_key, retrieval, sts

MODEL = flags.DEFINE_string("model", None, "A workdir, DIR@STEP, or hf:FOLDER.", required=True)
TASKS = flags.DEFINE_list("tasks", ["query_key"], "What to run: query_key, sts, retrieval, probe, knn, zero_shot.")
DATA = flags.DEFINE_string("data", None, "Folder of the task's data.")
JSON = flags.DEFINE_string("json", None, "Where the results go; by default WORKDIR/TASK.json.")
PAIRS = flags.DEFINE_integer("pairs", None, "Pairs of the query-key test; as in training by default.", lower_bound=1)
SPAN = flags.DEFINE_integer("span", None, "Tokens of a span of the query-key test; as in training by default.", lower_bound=1)
BASELINES = flags.DEFINE_bool("baselines", False, "Score TF-IDF and BM25 on the query-key pairs too.")

Results = dict[str, Any]  # row → figures, as fractions


def run_query_key(model: text_model.TextModel) -> tuple[Results, dict[str, Any]]:
    """Chance, the untrained encoder, the trained one, and the baselines asked for."""
    if model.config is None or model.untrained is None:
        raise ValueError(f"--tasks=query_key: {MODEL.value} is no run of ours; its spans are tokens of the run's own tokenizer")
    config = model.config
    config.data.dir = DATA.value or config.data.dir
    config.eval.pairs = PAIRS.value or config.eval.pairs
    config.eval.span = SPAN.value or config.eval.span
    windows = pipeline.open_split(config.data.dir, "validation")
    pairs = query_key.make_pairs(windows, config.eval, config.data)
    rows = {"chance": query_key.chance(len(pairs.spans))}
    if BASELINES.value:
        rows |= query_key.baselines(pairs, tokenizer.load(config.data.dir).decode)
    for name, forward in (("untrained", model.untrained()), (f"step {model.protocol['step']}", model.forward)):
        rows[name] = query_key.evaluate(forward, pairs, config.eval.batch_size)
    print(query_key.table(rows))
    return rows, {"data": windows.manifest["content_hash"], "split": "validation", **config.eval.to_dict()}


def run_sts(model: text_model.TextModel) -> tuple[Results, dict[str, Any]]:
    """Correlation with people's scores."""
    data = data_folder("sts")
    rows = sts.evaluate(model.encode, data)
    print_table("sts, × 100", rows)
    return rows, {"data": hash_of_files(data, "*.tsv"), "similarity": "cosine", "ties": "mean rank"}


def run_retrieval(model: text_model.TextModel) -> tuple[Results, dict[str, Any]]:
    """Exact search over a BEIR folder."""
    data = data_folder("retrieval")
    rows = retrieval.evaluate(model.encode, data, nearest.merge)
    print_table("retrieval, × 100", rows)
    files = {"data": hash_of_files(data, "*.jsonl") + hash_of_files(data, "qrels/test.tsv")}
    return rows, files | {"similarity": "cosine", "document": "title and text", "gain": "linear"}


def run_classify(task: str, model: text_model.TextModel) -> tuple[Results, dict[str, Any]]:
    """A probe, nearest neighbours or the nearest label, on frozen embeddings."""
    data = data_folder(task)
    rows = classify.evaluate(model.encode, data, (task,))
    print_table(f"{task}, × 100", rows)
    how: dict[str, dict[str, Any]] = {
        "probe": {"folds": classify.FOLDS, "strengths": classify.STRENGTHS, "chosen_on": "a tenth of the training part"},
        "knn": {"folds": classify.FOLDS, "k": classify.NEIGHBOURS, "vote": "majority"},
        "zero_shot": {"labels": "labels.json or their names"},
    }
    return rows, {"data": hash_of_files(data, "*.json*")} | how[task]


TASK_OF: dict[str, Callable[[text_model.TextModel], tuple[Results, dict[str, Any]]]] = {
    "query_key": run_query_key,
    "sts": run_sts,
    "retrieval": run_retrieval,
    **{task: functools.partial(run_classify, task) for task in ("probe", "knn", "zero_shot")},
}


def data_folder(task: str) -> epath.Path:
    """The folder of a task that needs one.

    Raises:
      ValueError: none is given, or it is not there.
    """
    if not DATA.value or not epath.Path(DATA.value).is_dir():
        raise ValueError(f"--data={DATA.value or ''}: --tasks={task} needs the folder of its data")
    return epath.Path(DATA.value)


def hash_of_files(folder: epath.Path, pattern: str) -> str:
    """sha256 of the files of a folder and their names, its first half."""
    found = hashlib.sha256()
    for path in sorted(folder.glob(pattern)):
        found.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()[:32]


def print_table(title: str, rows: dict[str, dict[str, float]]) -> None:
    """Rows of fractions as percentages."""
    columns = list(next(iter(rows.values())))
    print(f"{title:<24}" + "".join(f"{name:>12}" for name in columns))
    for name, found in rows.items():
        print(f"{name:<24}" + "".join(f"{100 * found[column]:>12.2f}" for column in columns))


def write(task: str, rows: Results, protocol: dict[str, Any]) -> None:
    """The results with their protocol and its hash: figures of two protocols are not the same measure."""
    folder = epath.Path(MODEL.value.rpartition("@")[0] or MODEL.value).expanduser()
    if not JSON.value and not (folder / "config.json").exists():
        return
    path = epath.Path(JSON.value) if JSON.value else folder / f"{task}.json"
    # What identifies the model is no part of how it was measured.
    how = {key: value for key, value in protocol.items() if key not in ("model", "step", "parameters", "code")}
    stamp = hashlib.sha256(json.dumps(how, sort_keys=True).encode()).hexdigest()[:16]
    result = {"task": task, "protocol": protocol, "protocol_hash": stamp, "results": rows}
    path.write_text(json.dumps(result, indent=2) + "\n")
    logging.info("written to %s", path)


def main(argv: list[str]) -> None:
    """The command."""
    del argv
    for task in TASKS.value:
        if task not in TASK_OF:
            cli.fail(f"--tasks={task}: choose one of {', '.join(TASK_OF)}")
    if JSON.value and len(TASKS.value) > 1:
        cli.fail(f"--json={JSON.value}: one file holds one task; give one of --tasks={','.join(TASKS.value)}")
    processes.enable_compilation_cache()
    with cli.user_errors():
        model = text_model.open_model(MODEL.value)
        for task in TASKS.value:
            rows, protocol = TASK_OF[task](model)
            write(task, rows, model.protocol | protocol)


if __name__ == "__main__":
    cli.run(main)
