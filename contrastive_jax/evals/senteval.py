"""Labelled texts for `classify`: .jsonl, the files of SentEval (Conneau and Kiela, arXiv 1803.05449), or a TFDS dataset."""

import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from scipy import sparse

# Train, development and test part of SentEval's SST-2 and TREC; those of MRPC. The others are .pos/.neg and the like: folds.
SPLITS: tuple[tuple[str, ...], ...] = (
    ("sentiment-train", "sentiment-dev", "sentiment-test"),
    ("train_5500.label", "TREC_10.label"),
    ("msr_paraphrase_train.txt", "msr_paraphrase_test.txt"),
)
CLASSES = (".pos", ".neg", ".objective", ".subjective")
# What the two texts of an object may be called.
FIRST = ("text", "sentence1", "premise", "question")
SECOND = ("text2", "sentence2", "hypothesis", "passage", "sentence")


class Labelled(NamedTuple):
    """One part of a set: texts with their labels; `second` has the other text of each where the set is of pairs."""

    texts: list[str]
    labels: list[str]
    second: list[str]


def gather(rows: Iterable[tuple[str, str, str | None]]) -> Labelled:
    """(text, label, other text or None) of each row as columns."""
    columns = list(rows)
    return Labelled([row[0] for row in columns], [row[1] for row in columns], [row[2] for row in columns if row[2] is not None])


def json_lines(path: epath.Path) -> Iterator[tuple[str, str, str | None]]:
    """Objects with text, label and perhaps text2, or what GLUE and BoolQ call these (FIRST, SECOND).

    Raises:
      ValueError: a line that is not so; the message names it.
    """
    with path.open() as file:
        for number, line in enumerate(file, 1):
            try:
                found = json.loads(line)
                text, label = next(found[name] for name in FIRST if name in found), found["label"]
                second = next((found[name] for name in SECOND if name in found), None)
            except (ValueError, TypeError, KeyError, StopIteration) as error:
                raise ValueError(f"{path}:{number}: not an object with text and label") from error
            if not isinstance(text, str) or not isinstance(second, str | None):
                raise ValueError(f"{path}:{number}: text is not a string")
            yield text, str(label), second


def classed_lines(path: epath.Path) -> Iterator[tuple[str, str, str | None]]:
    """The lines of a file that are all of one class, its suffix."""
    text = path.read_bytes().decode("utf-8", "replace")
    yield from ((line.strip(), path.suffix[1:], None) for line in text.split("\n") if line.strip())


def split_lines(path: epath.Path) -> Iterator[tuple[str, str, str | None]]:
    """SST-2 (text, tab, label), TREC (label:fine text) and MRPC (label, ids, two texts between tabs, a header).

    Raises:
      ValueError: a line that is not so; the message names it.
    """
    lines = path.read_bytes().decode("latin-1" if path.suffix == ".label" else "utf-8-sig", "replace").split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip() or (path.suffix == ".txt" and number == 1):
            continue
        try:
            if path.suffix == ".label":
                label, text = line.split(" ", 1)
                yield text.strip(), label.split(":")[0], None
            elif path.suffix == ".txt":
                label, _, _, text, other = line.rstrip("\r").split("\t")
                yield text, label, other
            else:
                text, label = line.rstrip("\r").split("\t")
                yield text, label, None
        except ValueError as error:
            raise ValueError(f"{path}:{number}: not a line of this file's kind") from error


def parts(data: epath.Path) -> list[Labelled]:
    """The parts of a folder: one (to be folded), train and test, or train, development and test.

    Raises:
      ValueError: the folder has no such files, or a line is not as it should be.
    """

    def read(reader: Callable[[epath.Path], Iterable], *names: str) -> list[Labelled]:
        return [gather(reader(data / name)) for name in names]

    if (data / "train.jsonl").exists() and (data / "test.jsonl").exists():
        return read(json_lines, "train.jsonl", "test.jsonl")
    if (data / "all.jsonl").exists():
        return read(json_lines, "all.jsonl")
    for names in SPLITS:
        if all((data / name).exists() for name in names):
            return read(split_lines, *names)
    classes = sorted(path for path in data.glob("*") if path.suffix in CLASSES)
    if len(classes) == 2:
        return [gather(row for path in classes for row in classed_lines(path))]
    raise ValueError(
        f"--data={data}: neither train.jsonl and test.jsonl, nor all.jsonl, nor the files of a SentEval task there"
    )


def tables_of_tfds(name: str) -> dict[str, Labelled]:
    """Each labelled split of a TFDS dataset with a label and one text or two.

    Raises:
      ValueError: there is no such dataset, or it has no labels.
    """
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name)
    except tfds.core.DatasetNotFoundError as error:
        raise ValueError(f"--data=tfds:{name}: TFDS has no such dataset") from error
    features = builder.info.features
    texts = [key for key, feature in features.items() if isinstance(feature, tfds.features.Text)]
    label = next((key for key in ("label", "label-coarse") if key in features), None)
    if label is None or len(texts) not in (1, 2):
        raise ValueError(f"--data=tfds:{name}: it has {', '.join(features)}; one text or two and a label are needed")
    builder.download_and_prepare()
    tables = {}
    for split in builder.info.splits:
        rows = list(tfds.as_numpy(builder.as_dataset(split=split)))
        # GLUE hides the labels of its tests: -1.
        if rows and min(int(row[label]) for row in rows) >= 0:
            tables[split] = gather(
                (row[texts[0]].decode(), str(int(row[label])), row[texts[1]].decode() if len(texts) == 2 else None)
                for row in rows
            )
    return tables


def from_tfds(name: str) -> list[Labelled]:
    """The parts of a TFDS dataset: train with test, or with validation where test has no labels.

    Raises:
      ValueError: from `tables_of_tfds`, or there are no labels to train on.
    """
    tables = tables_of_tfds(name)
    if "train" not in tables:
        raise ValueError(f"--data=tfds:{name}: no train split with labels; there are {', '.join(tables) or 'none'}")
    held_out = next((tables[split] for split in ("test", "validation") if split in tables), None)
    return [tables["train"]] if held_out is None else [tables["train"], held_out]


def pair_features(first: Any, second: Any) -> Any:
    """SentEval's features of two texts from their vectors [n e], dense or sparse: [|u - v|, u · v], [n 2e]."""
    both = [abs(first - second), first * second]
    return np.concatenate(both, axis=1) if isinstance(first, np.ndarray) else sparse.hstack(both, format="csr")
