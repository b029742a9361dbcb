"""Trains all systems at one budget and compares them: the query-key test, STS, a probe, CPU minutes.

  python -m benchmarks.systems --data=DIR --output=build/systems --tasks=sts=STSB,probe=TREC --seeds=0,1,2

DIR is prepared by `prepare --python --vocab_size=8192 --validation_fraction=0.1`. A row of SYSTEMS is a recipe with overrides,
trained for the same steps on the same data, as a bag of embeddings or, where a system needs token states, with one block. A
row that is done is kept in OUTPUT/results.json, so that a run started again goes on, and a new row costs only itself. Writes
OUTPUT/systems.md and systems.png, and says which gates are met. A bag takes 1 to 3 minutes per row and seed on one core of a
busy machine; --rows=simsiam,byol runs some of them.

Rows of labelled pairs need --labelled=DIR, of scores from 0 to 5: `prepare --pairs=STSB/train.tsv --validation=STSB/dev.tsv
--text_field=2,3 --label_field=1 --tokenizer=DIR`. They start from the row infonce.
"""

import functools
import itertools
import json
import pathlib
import time
from typing import Any, NamedTuple

import jax
import matplotlib.pyplot as plt
import numpy as np
from absl import app, flags, logging
from ml_collections import ConfigDict

import contrastive_jax
from benchmarks import common
from contrastive_jax.config import load_run_config
from contrastive_jax.data import pipeline, prepared
from contrastive_jax.data.batch import Batch
from contrastive_jax.evals import query_key
from contrastive_jax.evals.task import Options
from contrastive_jax.inference import text_model
from contrastive_jax.objectives import tokens
from contrastive_jax.objectives.objective import NO_OBJECTIVE
from contrastive_jax.runtime import sharding
from contrastive_jax.runtime.model_name import parse_model_name, read_params
from contrastive_jax.training import build, noise, views
from contrastive_jax.training.guard import StoppedError

DATA = flags.DEFINE_string("data", None, "Prepared dataset.", required=True)
OUTPUT = flags.DEFINE_string("output", "build/systems", "Folder of the runs, the results, the table and the plot.")
LABELLED = flags.DEFINE_string("labelled", "", "Prepared pairs with scores, of the same tokenizer; empty: no such rows.")
TASKS = flags.DEFINE_string("tasks", "", "More tasks to score, as in config.eval.tasks: sts=DIR,probe=DIR.")
SEEDS = flags.DEFINE_list("seeds", ["0"], "Seeds of each row; the table shows their mean.")
ROWS = flags.DEFINE_list("rows", [], "The rows to run, and those that they start from; empty: all.")
STEPS = flags.DEFINE_integer("steps", 300, "Steps of each run.")
PAIRS = flags.DEFINE_integer("pairs", 1000, "Pairs of the query-key test.")

BAG = common.BAG
BLOCK = {"model.num_layers": 1, "data.batch_size": 64}
WIDENED = {"init_from": "{narrow half as long}", "init_widen": 2}
SCORES = {"init_from": "{infonce}", "steps": 450, "data.batch_size": 64, "optim.learning_rate_rules": ((r".*", 1.0),)}
UNTRAINED = {"steps": 1, "optim.warmup_steps": 0, "optim.learning_rate": 1e-12}


class System(NamedTuple):
    """A row of the table.

    Attributes:
      name: of the row.
      recipe: configs/RECIPE.py, or RECIPE:VARIANT.
      changes: {key: value}, laid over the recipe and the budget; "{NAME}" in a text is the folder of the run of that row.
      budget: BAG or BLOCK.
      after: rows that must have run before this one.
    """

    name: str
    recipe: str
    changes: dict[str, Any]
    budget: dict[str, Any] = BAG
    after: tuple[str, ...] = ()


SYSTEMS = (
    System("untrained", "debug", UNTRAINED),
    System("infonce", "debug", {}),
    System("flatnce", "flatnce", {}),
    System("siglip", "siglip", {}),
    System("moco", "moco", {}),
    System("simsiam", "simsiam", {}),
    System("byol", "byol", {}),
    System("dv", "information:dv", {}),
    System("nwj", "information:nwj", {}),
    System("jsd", "information:jsd", {}),
    System("declutr", "declutr", {}),
    System("infonce 64", "debug", {"model.d_model": 64}),
    System("distilled 64", "distil", {"memory.source": "{infonce}"}, after=("infonce",)),
    System("delete 30 %", "debug", {"noise.ops": (("delete", 0.3),)}),
    System("mask 15 %", "debug", {"noise.ops": (("mask", 0.15),)}),
    System("simcse bag", "simcse", {}),
    System("simcse bag delete 60 %", "simcse", {"noise.ops": (("delete", 0.6),)}),
    System("narrow", "debug", {"model.d_model": 128}),
    System("narrow half as long", "debug", {"model.d_model": 128, "steps": 150}),
    System("widened", "debug", WIDENED | {"steps": 150}, after=("narrow half as long",)),
    System("widened untrained", "debug", WIDENED | UNTRAINED, after=("narrow half as long",)),
    System("cosent", "labelled:cosent", SCORES, after=("infonce",)),
    System("cosine", "labelled:cosine", SCORES | {"labels.scale": 5.0}, after=("infonce",)),
    System("softmax", "labelled:softmax", SCORES | {"labels.classes": (6,)}, after=("infonce",)),
    System("untrained block", "debug", BLOCK | UNTRAINED, BLOCK),
    System("infonce block", "debug", {}, BLOCK),
    System("simcse", "simcse", {}, BLOCK),
    System("mlm", "noise:mlm", {}, BLOCK),
    System(
        "infonce + mlm",
        "debug",
        {"noise.ops": (("mask", 0.15),), "tokens.name": "mlm", "tokens.weight": 0.1, "tokens.positions": 12},
        BLOCK,
    ),
    System("replaced tokens", "noise:replaced", {}, BLOCK),
    System("fnet", "mixers:fnet", {}, BLOCK),
    System("gmlp", "mixers:gmlp", {}, BLOCK),
)


class Gate(NamedTuple):
    """What must hold of the mean over seeds: measure of `row` ≥ that of `other` ("": 0) + `margin`, in points of percent."""

    row: str
    other: str
    margin: float
    measure: str = "query_key/mean/top5"


GATES = (
    Gate("infonce", "untrained", 20),
    Gate("simsiam", "untrained", 5),
    Gate("byol", "simsiam", -5),
    Gate("dv", "infonce", -2),
    Gate("nwj", "infonce", -2),
    Gate("declutr", "TF-IDF", 0),
    Gate("distilled 64", "infonce 64", -3),
    Gate("widened untrained", "narrow half as long", -0.1),
    Gate("widened", "narrow", 0),
    Gate("infonce + mlm", "infonce block", -2),
    Gate("mlm", "", 20, "held_out_token_accuracy"),
    Gate("replaced tokens", "", 90, "held_out_token_auc"),
    *(Gate(name, "infonce", 2, "sts-stsb/dev/spearman") for name in ("cosent", "cosine", "softmax")),
)


def is_labelled(system: System) -> bool:
    """Returns whether a row trains on labelled pairs."""
    return system.recipe.startswith("labelled:")


def config_of(system: System, seed: int, folder: pathlib.Path) -> ConfigDict:
    """Returns the config of a row: its recipe at the budget, with one evaluation, at the end."""
    config = common.load_recipe(system.recipe)
    # A run that starts where another ended must see other batches than that one.
    seed += 1000 * ("init_from" in system.changes)
    config.update(seed=seed, steps=STEPS.value, log_every=max(STEPS.value // 6, 1), checkpoint_every=0)
    config.data.dir = LABELLED.value if is_labelled(system) else DATA.value
    config.eval.tasks, config.eval.pairs = TASKS.value, PAIRS.value
    config.optim.warmup_steps = min(STEPS.value // 10, config.optim.warmup_steps)
    for key, value in (system.budget | system.changes).items():
        for other in system.after if isinstance(value, str) else ():
            value = value.replace(f"{{{other}}}", str(folder / other))  # noqa: PLW2901
        config.update_from_flattened_dict({key: value})
    config.eval_every = config.steps
    return config


def run(system: System, seed: int) -> dict[str, float]:
    """Trains and scores a row; returns its scores, the last metrics of its embeddings, and its minutes of CPU time."""
    folder = pathlib.Path(OUTPUT.value) / f"seed{seed}"
    began = time.process_time()
    try:
        contrastive_jax.train(config_of(system, seed, folder), folder / system.name)
    except StoppedError as error:
        print(f"{system.name}, seed {seed}: {error}", flush=True)
    lines = [json.loads(line) for line in (folder / system.name / "metrics.jsonl").read_text().splitlines()]
    names = ("embedding_std", "effective_rank", "loss", "token_loss", "token_accuracy")
    metrics = {name: value for line in lines for name, value in line.items() if "/" in name or name in names}
    if is_labelled(system):  # its held-out texts are other ones, and so this test is another
        metrics = {name: value for name, value in metrics.items() if not name.startswith("query_key/")}
    return metrics | {"minutes": (time.process_time() - began) / 60}


def token_scores(workdir: pathlib.Path, batches: int = 10) -> dict[str, float]:
    """Scores the token head of a finished run on held-out text, with noise and without dropout.

    Returns:
      The accuracy of what it predicts or, of replaced tokens, the area under the curve of its logits; {} of other runs.
    """
    config = load_run_config(workdir)
    name = config.tokens.name if config.tokens.weight else ""
    if name not in ("mlm", "replaced"):
        return {}
    mesh, manifest = sharding.make_mesh(config.mesh), prepared.load_manifest(config.data.dir)
    vocabulary = noise.Vocabulary(manifest["vocab_size"], manifest["reserved"])
    model, make_views = build.make_model(config, mesh, vocabulary.size, NO_OBJECTIVE), views.make_views(config, vocabulary)
    assert model.token_loss is not None
    encode, loss = model.encoder.encode, model.token_loss.loss
    _, params = read_params(parse_model_name(str(workdir)), functools.partial(sharding.even_shardings, mesh=mesh))

    @jax.jit
    def score(params: Any, batch: Batch, key: jax.Array) -> tuple[Any, jax.Array | None, tokens.Targets]:
        seen = np.array(views.views_with_targets(config, views.view_count(config.data)))
        rows = jax.tree.map(lambda x: x[:, seen].reshape(-1, *x.shape[3:]), make_views(batch, key)[0])  # [g v r ...] -> [n ...]
        _, states, table = encode(params["encoder"], rows.tokens, rows.segment)
        logit = tokens.replaced_logit(params["tokens"], states) if name == "replaced" else None
        return loss(params["tokens"], table, states, rows.targets), logit, rows.targets

    stream = pipeline.batches(prepared.open_split(config.data.dir, "validation"), config.data, config.seed)
    whole, scored = np.arange(config.data.batch_size), []
    for number, batch in enumerate(itertools.islice(stream, batches)):
        scored.append(jax.device_get(score(params, sharding.to_global(batch, whole, len(whole), mesh), jax.random.key(number))))
    if name == "mlm":
        right, count = (sum(getattr(sums, field).sum() for sums, _, _ in scored) for field in ("right", "number"))
        return {"held_out_token_accuracy": float(right / count)}
    reserved = list(vocabulary.reserved.values())  # delimiters, which noise spares
    counted = [(logit, of, of.real & ~np.isin(of.token, reserved)) for _, logit, of in scored]
    logit, picked = (np.concatenate(x) for x in zip(*((s[c], of.picked[c]) for s, of, c in counted), strict=True))
    return {"held_out_token_auc": common.auc(logit, picked)}


def tfidf(workdir: pathlib.Path) -> dict[str, float]:
    """Returns the scores of TF-IDF in the query-key test of a run."""
    model, options = text_model.load(str(workdir)), Options()
    rows = query_key.score_tfidf(model, query_key.open_held_out(model, "", options), options)
    return {f"query_key/{row}/{measure}": value for row, of_row in rows.items() for measure, value in of_row.items()}


def chosen() -> list[System]:
    """Returns the rows to run, in the order of SYSTEMS."""
    wanted, by_name = set(ROWS.value), {system.name: system for system in SYSTEMS}
    for name in ROWS.value:
        if name not in by_name:
            raise app.UsageError(f"--rows: no row {name!r}; there are {', '.join(by_name)}")
        wanted |= set(by_name[name].after)
    asked = [system for system in SYSTEMS if not wanted or system.name in wanted]
    return [system for system in asked if LABELLED.value or not is_labelled(system)]


def means(results: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Returns the mean over seeds of each row's scores, from results by "NAME seed N"."""
    by_name: dict[str, list[dict[str, float]]] = {}
    for key, result in results.items():
        by_name.setdefault(key.rpartition(" seed ")[0], []).append(result)
    return {
        name: {measure: float(np.mean([one[measure] for one in all_ if measure in one])) for measure in all_[0]}
        for name, all_ in by_name.items()
    }


def table(rows: dict[str, dict[str, float]], titles: dict[str, str]) -> str:
    """Returns the Markdown table, with scores in percent."""
    lines = []
    for name in [name for name in ("TF-IDF", *(system.name for system in SYSTEMS)) if name in rows]:
        scores = [f"{100 * rows[name][measure]:.1f}" if measure in rows[name] else "–" for measure in titles]
        std, rank, minutes = (rows[name].get(key, np.nan) for key in ("embedding_std", "effective_rank", "minutes"))
        numbers = [f"{std:.2f}", f"{rank:.0f}", f"{minutes:.1f}"]
        lines.append([name, *scores, *("–" if number == "nan" else number for number in numbers)])
    return common.table(["system", *titles.values(), "std", "rank", "CPU minutes"], lines)


def plot(rows: dict[str, dict[str, float]], path: pathlib.Path) -> None:
    """Writes the plot of query-key top-5, one bar per row."""
    plt.switch_backend("Agg")  # needs no display
    names = [system.name for system in SYSTEMS if "query_key/mean/top5" in rows.get(system.name, {})]
    figure, axis = plt.subplots(figsize=(6, 1 + 0.25 * len(names)), layout="constrained")
    axis.barh(names, [100 * rows[name]["query_key/mean/top5"] for name in names])
    axis.invert_yaxis()
    axis.set_xlabel("query-key test, top-5 %")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def judge(gate: Gate, rows: dict[str, dict[str, float]]) -> str:
    """Returns the line that says whether a gate is met."""
    if any(gate.measure not in rows.get(name, {}) for name in (gate.row, gate.other) if name):
        return f"not run: {gate.row} >= " + (f"{gate.other} {gate.margin:+g}" if gate.other else f"{gate.margin:g}")
    value, other = (100 * rows[name][gate.measure] if name else 0.0 for name in (gate.row, gate.other))
    verdict = "met" if value >= other + gate.margin else "NOT MET"
    bound = f"{gate.other} {other:.1f} {gate.margin:+g}" if gate.other else f"{gate.margin:g}"
    return f"{verdict}: {gate.row} {value:.1f} >= {bound}"


def main(argv: list[str]) -> None:
    """Runs what has not run yet, then writes the table and the plot and prints the gates."""
    del argv
    logging.set_verbosity(logging.ERROR)
    folder = pathlib.Path(OUTPUT.value)
    kept = folder / "results.json"
    protocol = {"data": DATA.value, "steps": STEPS.value, "pairs": PAIRS.value, "tasks": TASKS.value}
    stored = common.open_results(kept, protocol)
    results = stored["rows"]
    for seed in map(int, SEEDS.value):
        for system in chosen():
            key = f"{system.name} seed {seed}"
            if key not in results:
                results[key] = run(system, seed)
                titles = common.columns([results[key]]).items()
                shown = (f"{title} {100 * results[key][name]:.1f}" for name, title in titles if name in results[key])
                print(f"{key}: {', '.join(shown)}", flush=True)
            workdir = folder / f"seed{seed}" / system.name
            ended = any((workdir / "checkpoints").glob("[0-9]*"))  # what the guard has stopped has no checkpoint
            if ended and "token_loss" in results[key] and not any(name.startswith("held_out_") for name in results[key]):
                results[key] |= token_scores(workdir)
            if ended and "TF-IDF seed 0" not in results and not is_labelled(system):  # its pairs are those of any seed
                results["TF-IDF seed 0"] = tfidf(workdir)
            kept.write_text(json.dumps(stored, indent=1))
    rows = means(results)
    text = table(rows, common.columns(rows.values()))
    (folder / "systems.md").write_text(text)
    plot(rows, folder / "systems.png")
    print(text, *(judge(gate, rows) for gate in GATES), sep="\n")


if __name__ == "__main__":
    app.run(main)
