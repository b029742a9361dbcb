"""Measures cleaning: near-duplicates found and lost, evaluation texts found, leaks between the splits, and MB/s.

  python -m benchmarks.near_duplicates --input='corpus/train-00000-*.jsonl.zst'
  python -m benchmarks.near_duplicates --input=... --decontaminate=eval        plants every text of the evaluation sets
  python -m benchmarks.near_duplicates --input=... --prepared=DIR,DIR          share of leaks in prepared datasets

Near-duplicates are planted: copies of documents in which 5, 10 or 20 % of the words are replaced by others of the input. Recall
is the share of them that is dropped. Precision is the share of all dropped documents, planted or not, whose similarity to an
earlier document reaches the threshold, or comes within 0.1 of it, counted exactly. A leak is a validation record that has a run
of 32 tokens in common with a training record.
"""

import glob
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from absl import app, flags

from contrastive_jax import files
from contrastive_jax.data import store
from contrastive_jax.data.clean import cleaning, decontamination, hash_set, near_duplicates, ngrams
from contrastive_jax.data.clean.near_duplicates import NGRAM, Signatures
from contrastive_jax.data.preparation.manifest import MANIFEST, TRAIN, VALIDATION
from contrastive_jax.data.preparation.work import Work
from contrastive_jax.data.raw import inputs, parts, sources
from contrastive_jax.data.raw.sources import Document

INPUT = flags.DEFINE_string("input", None, "Glob of files of documents.", required=True)
MB = flags.DEFINE_float("mb", 40.0, "MB of text to take of it.")
PLANTED = flags.DEFINE_integer("planted", 600, "Near-duplicates to plant, a third of each kind.")
THRESHOLDS = flags.DEFINE_list("thresholds", ["0.5", "0.6", "0.7", "0.8"], "Values of --near_duplicates.")
DECONTAMINATE = flags.DEFINE_list("decontaminate", [], "Folders of evaluation sets.")
PREPARED = flags.DEFINE_list("prepared", [], "Prepared datasets whose leaks are counted.")
SHARES = (0.05, 0.1, 0.2)  # of words that are changed
LEAK_TOKENS = 32


class Planted(NamedTuple):
    """A near-duplicate: the number of the original, the share of its words that is changed, and the text."""

    original: int
    share: float
    text: str


def read_texts() -> list[str]:
    """Returns documents of the input, up to so many MB."""
    texts, size = [], 0.0
    for shard in inputs.file_shards([INPUT.value], "", "input"):
        for part in parts.cut(shard, sys.maxsize):
            for item in sources.read(part):
                if isinstance(item, Document):
                    texts.append(item.text)
                    size += len(item.text) / 1e6
                if size > MB.value:
                    return texts
    return texts


def plant(texts: list[str], rng: np.random.Generator) -> list[Planted]:
    """Returns near-duplicates of texts of at least 50 words."""
    long = [number for number, text in enumerate(texts) if len(text.split()) >= 50]
    vocabulary = np.array(" ".join(texts[:200]).split(), object)
    planted = []
    for k, number in enumerate(rng.choice(long, min(PLANTED.value, len(long)), replace=False).tolist()):
        words, share = np.array(texts[number].split(), object), SHARES[k % len(SHARES)]
        words = np.where(rng.random(len(words)) < share, rng.choice(vocabulary, len(words)), words)
        planted.append(Planted(number, share, " ".join(words)))
    return planted


def dropped_by(threshold: float, words: list[np.ndarray]) -> set[int]:
    """Returns the numbers of the documents that are dropped; a document is the hashes of its words."""
    with tempfile.TemporaryDirectory() as root:
        signatures = Signatures(Work(root), 0, threshold)
        for number, of_text in enumerate(words):
            signatures.add(number, True, of_text)
        (task,) = near_duplicates.partitions(signatures.close(), 1, 1 << 40)
        name = near_duplicates.drop_near_duplicates(root, threshold, task)["dropped"]
        return set(Work(root).read_groups(name, 0, 1, np.dtype("<u4")).tolist())


class Similarities:
    """Exact similarities between documents."""

    def __init__(self, words: list[np.ndarray]):
        self._sets = [np.unique(ngrams.ngram_hashes(w, min(NGRAM, max(len(w), 1)))) for w in words]
        self._all = np.concatenate(self._sets)
        self._owners = np.repeat(np.arange(len(words)), [len(pairs) for pairs in self._sets])

    def largest(self, number: int) -> float:
        """Returns the largest similarity of a document to an earlier one."""
        end = int(np.searchsorted(self._owners, number))
        shared = self._owners[:end][hash_set.contains(self._sets[number], self._all[:end])]
        common = np.bincount(shared, minlength=number)
        sizes = np.array([len(pairs) for pairs in self._sets[:number]])
        return float((common / (sizes + len(self._sets[number]) - common)).max(initial=0))


def measure_near_duplicates(texts: list[str], rng: np.random.Generator) -> None:
    """Prints the table of recall and precision."""
    planted = plant(texts, rng)
    words = [ngrams.words_of(text).hashes for text in [*texts, *(copy.text for copy in planted)]]
    exact = Similarities(words)
    similarities = {number: exact.largest(number) for number in range(len(texts), len(words))}
    print(f"{len(texts):,} documents, {len(planted)} near-duplicates planted; their mean similarity: ", end="")
    means = [np.mean([similarities[len(texts) + k] for k, p in enumerate(planted) if p.share == share]) for share in SHARES]
    print(", ".join(f"{mean:.2f} ({share:.0%})" for mean, share in zip(means, SHARES, strict=True)))
    print("threshold  bands x rows  recall 5 %  10 %  20 %  others dropped  precision  within 0.1")
    for threshold in map(float, THRESHOLDS.value):
        dropped = dropped_by(threshold, words)
        recall = [
            np.mean([len(texts) + k in dropped for k, copy in enumerate(planted) if copy.share == share]) for share in SHARES
        ]
        similarities |= {number: exact.largest(number) for number in dropped - similarities.keys()}
        found = np.array([similarities[number] for number in dropped])
        bands = near_duplicates.band_shape(threshold)
        print(
            f"{threshold:9.2f}  {bands.number:5} x {bands.rows:<4}  "
            + "  ".join(f"{share:8.1%}" for share in recall)
            + f"  {sum(number < len(texts) for number in dropped):8}"
            f"  {np.mean(found >= threshold):8.1%}  {np.mean(found >= threshold - 0.1):8.1%}"
        )


def measure_speed(texts: list[str]) -> None:
    """Prints the MB/s of each step, on one core."""
    size = sum(len(text.encode()) for text in texts) / 1e6
    words = [ngrams.words_of(text) for text in texts]
    bands = near_duplicates.band_shape(0.6)
    table = decontamination.collect(decontamination.evaluation_texts(DECONTAMINATE.value)).ngrams
    steps: dict[str, Callable[[], object]] = {
        "words": lambda: [ngrams.words_of(text) for text in texts],
        "signatures (0.6), of words": lambda: [near_duplicates.signature(w.hashes, bands) for w in words if len(w.hashes)],
        "evaluation texts, of words": lambda: [decontamination.texts_in(table, w.hashes) for w in words],
        "repetition, of words": lambda: [cleaning.repetition(text, w) for text, w in zip(texts, words, strict=True)],
    }
    for name, step in steps.items():
        began = time.perf_counter()
        step()
        print(f"{name}: {size / (time.perf_counter() - began):.0f} MB/s")


def measure_decontamination(texts: list[str], rng: np.random.Generator) -> None:
    """Plants each evaluation text in a document of its own and prints, by set, how many are found."""
    evaluation = list(decontamination.evaluation_texts(DECONTAMINATE.value))
    collected = decontamination.collect(evaluation)
    cleaner = cleaning.Cleaner(cleaning.Limits(), collected.ngrams)
    by_chance = sum(bool(cleaner(text)) for text in texts)
    print(f"decontamination: {by_chance} of {len(texts):,} documents have an evaluation text in them already:")
    assert cleaner.findings is not None
    for name, counts in decontamination.report_of(collected, [cleaner.findings.as_json()]).items():
        print(f"  {name}: {counts}")
    planted, found = dict[str, int](), dict[str, int]()
    clean = [text for text in texts[:500] if not cleaner(text)]
    for set_name, text in set(evaluation):
        if len(ngrams.words_of(text).hashes) >= decontamination.SHORTEST:
            host = clean[int(rng.integers(len(clean)))]
            at = host.find("\n", int(rng.integers(len(host)))) + 1
            leaked = f"{host[:at]}\n{' '.join(text.split()).upper()}\n{host[at:]}"
            planted[set_name] = planted.get(set_name, 0) + 1
            found[set_name] = found.get(set_name, 0) + (cleaner(leaked) == cleaning.EVALUATION_TEXT)
    for name, count in sorted(planted.items()):
        print(f"  {name}: {found[name]:,} of {count:,} planted texts found")


def records_of(root: str, split: str) -> Iterator[np.ndarray]:
    """Yields the tokens of each record of a split of a prepared dataset."""
    manifest = files.read_json(pathlib.Path(root, MANIFEST))
    for path in sorted(glob.glob(os.path.join(root, f"pile/1.0.0/*-{split}.array_record*"))):
        for record in store.read_file_shard(pathlib.Path(path), manifest["domains"], manifest["vocab_size"]):
            yield record.tokens


def measure_leaks(root: str) -> None:
    """Prints the share of the validation records of a prepared dataset that are leaks, and what is in its splits."""

    def runs(tokens: np.ndarray) -> np.ndarray:
        return ngrams.ngram_hashes(ngrams.hash_numbers(tokens.astype(np.uint64)[:, None]), LEAK_TOKENS)

    train = np.unique(np.concatenate([runs(tokens) for tokens in records_of(root, TRAIN)]))
    leaks = [bool(hash_set.contains(train, runs(tokens)).any()) for tokens in records_of(root, VALIDATION)]
    splits = files.read_json(pathlib.Path(root, MANIFEST))["splits"]
    sizes = ", ".join(
        f"{split} {counts['documents']:,} documents, {counts['records']:,} records" for split, counts in splits.items()
    )
    print(f"{root}: {np.mean(leaks):.1%} of {len(leaks)} validation records share {LEAK_TOKENS} tokens with train; {sizes}")


def main(arguments: list[str]) -> None:
    """Prints all figures."""
    del arguments
    rng = np.random.default_rng(0)
    texts = read_texts()
    measure_near_duplicates(texts, rng)
    measure_speed(texts)
    if DECONTAMINATE.value:
        measure_decontamination(texts, rng)
    for root in PREPARED.value:
        measure_leaks(root)


if __name__ == "__main__":
    app.run(main)
