"""Scores a model on tasks.

    contrastive-jax evaluate --model=runs/debug --tasks=query_key

The model is the workdir of a run (its newest checkpoint; WORKDIR@STEP or WORKDIR@best: that one), an exported folder, or a
Hugging Face or sentence-transformers folder (hf:FOLDER). Each task has its --data, in the order of --tasks (or one for all):

query_key information held-out spans of a prepared dataset, by default the run's own
sts                   a folder of .tsv: score, text, text
wordsim               a folder of .tsv or .csv: word, word, score
retrieval             a BEIR folder: corpus.jsonl, queries.jsonl, qrels/test.tsv; or one of NanoBEIR: .parquet in these three
nanobeir              a folder of such folders, each of which is scored, and their mean
codesearch            a folder of .jsonl or .jsonl.gz with docstring(_tokens) and code(_tokens)
probe knn zero_shot   a folder of .jsonl with text and label, a SentEval task's folder, or tfds:NAME
glue                  fine-tuning: a folder with train.jsonl and dev.jsonl of labelled pairs, or tfds:glue/rte
mteb                  tasks and benchmarks of the mteb package, --mteb="MTEB(eng, v2)"; their --data is optional

Results are printed, and written with the protocol that decided them to WORKDIR/TASK-DATA.json or to --output. --compare shows
two of them side by side: `--compare A.json B.json`. Models, data and --output may be on gs:// and s3://. Vectors of texts are
kept in --cache, by model and text, except by several processes: these share the texts with --cluster, or with --coordinator,
--num_processes and --process_id, and process 0 prints and writes.
"""

import pathlib

from absl import flags

from contrastive_jax import files
from contrastive_jax.commands import cli
from contrastive_jax.config import UserError
from contrastive_jax.evals import mteb, run
from contrastive_jax.evals.task import Options
from contrastive_jax.inference import text_model
from contrastive_jax.runtime import processes

POSITIONAL = True


def define_flags() -> None:
    """Defines the flags of the command."""
    default = Options()
    flags.DEFINE_string("model", None, "The model: a workdir, WORKDIR@STEP, an exported folder, or hf:FOLDER.")
    flags.DEFINE_list("tasks", ["query_key"], "The tasks, of those above.")
    flags.DEFINE_list("data", [], "The data of each task, or of all.")
    flags.DEFINE_string("output", None, "The file of the result; by default WORKDIR/TASK-DATA.json.")
    flags.DEFINE_integer("pairs", None, "Pairs of the query-key test; by default as in training.", lower_bound=1)
    flags.DEFINE_integer("span", None, "Tokens per span of the query-key test; by default as in training.", lower_bound=1)
    flags.DEFINE_integer("max_tokens", None, "Truncate texts to this many tokens; by default as the model says.", lower_bound=1)
    flags.DEFINE_enum("precision", None, list(text_model.PRECISIONS), text_model.PRECISION_HELP)
    flags.DEFINE_bool("baselines", False, "Also score chance, TF-IDF, BM25 and the untrained encoder on the same data.")
    flags.DEFINE_string("cache", f"{files.cache_folder()}/vectors.sqlite", "Keeps vectors of texts, locally; empty: keep none.")
    flags.DEFINE_string("compare", None, "A.json B.json: show results side by side; nothing is evaluated.")
    flags.DEFINE_integer("epochs", default.epochs, "Epochs of a fine-tuning (glue).", lower_bound=1)
    flags.DEFINE_integer("seeds", default.seeds, "Fine-tunings (glue), each with its own seed.", lower_bound=1)
    flags.DEFINE_bool("joined", default.joined, "Fine-tune on rows of both texts, the second one first (glue).")
    flags.DEFINE_string("mteb", ",".join(default.mteb), "MTEB's names of its tasks or benchmarks (mteb).")
    flags.DEFINE_string("mteb_results", "", "A folder for results as MTEB writes them (mteb); default: WORKDIR/mteb of a run.")
    cli.define_processes()
    flags.DEFINE_bool("any_protocol", False, "Let --compare show results that were measured differently.")


def main(arguments: list[str]) -> None:
    """Evaluates, or compares results."""
    values = flags.FLAGS
    if values.compare:
        print(run.compare_files([*values.compare.split(","), *arguments], values.any_protocol))
        return
    if arguments:
        raise UserError(f"unexpected argument {arguments[0]!r}; flags are given as --name=value")
    if not values.model:
        raise UserError("--model: give a workdir, WORKDIR@STEP, an exported folder, or hf:FOLDER")
    if files.on_bucket(values.cache):
        raise UserError(f"--cache={values.cache}: SQLite needs a local file; give one, or --cache= to keep no vectors")
    cache = pathlib.Path(values.cache).expanduser() if values.cache else None
    of_tasks = values.pairs, values.span, values.epochs, values.seeds, values.joined
    options = Options(*of_tasks, mteb.split_names(values.mteb), values.mteb_results, cache)
    with cli.joined_processes():
        processes.enable_compilation_cache()
        of_model = values.max_tokens, values.precision
        run.evaluate_model(values.model, values.tasks, values.data, options, values.baselines, values.output, *of_model)
