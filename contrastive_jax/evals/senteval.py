"""Labelled texts: .jsonl, the files of SentEval (Conneau and Kiela, arXiv 1803.05449), or a TFDS dataset."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from scipy import sparse

from contrastive_jax import files
from contrastive_jax.config import UserError

# Train, development and test part of SentEval's SST-2 and TREC; those of MRPC. Its other tasks have one file per class.
SPLITS: tuple[tuple[str, ...], ...] = (
    ("sentiment-train", "sentiment-dev", "sentiment-test"),
    ("train_5500.label", "TREC_10.label"),
    ("msr_paraphrase_train.txt", "msr_paraphrase_test.txt"),
)
# Per suffix of these files: the encoding, and the fields of a line. TREC's files are Latin-1; those of MRPC begin with a
# byte-order mark, which "utf-8-sig" removes where there is one.
SPLIT_FORMATS = {
    "": ("utf-8-sig", "TEXT<tab>LABEL"),
    ".label": ("latin-1", "LABEL:FINE_LABEL<space>TEXT"),
    ".txt": ("utf-8-sig", "LABEL<tab>ID<tab>ID<tab>TEXT<tab>TEXT"),
}
CLASSES = (".pos", ".neg", ".objective", ".subjective")
# What the two texts of a JSON object may be called.
FIRST = ("text", "sentence1", "premise", "question")
SECOND = ("text2", "sentence2", "hypothesis", "passage", "sentence")

Row = tuple[str, str, str | None]  # text, label, the other text of a pair


class Labelled(NamedTuple):
    """One part of a dataset: texts with their labels; `second` has the other text of each where the dataset is of pairs."""

    texts: list[str]
    labels: list[str]
    second: list[str]


def to_columns(rows: Iterable[Row]) -> Labelled:
    """Turns rows into columns."""
    stored = list(rows)
    return Labelled([row[0] for row in stored], [row[1] for row in stored], [row[2] for row in stored if row[2] is not None])


def read_jsonl(path: epath.Path) -> Iterator[Row]:
    """Reads objects with text, label and perhaps text2, or what GLUE and BoolQ call these (FIRST, SECOND).

    Raises:
      UserError: a line has no text or label; the message names it.
    """
    for location, value in files.read_json_lines(path):
        first = next((name for name in FIRST if name in value), None)
        if first is None or "label" not in value:
            raise UserError(f"{location}: not an object with text and label")
        second = next((name for name in SECOND if value.get(name) is not None), None)
        other = None if second is None else files.text_of(location, value, second)
        yield files.text_of(location, value, first), str(value["label"]), other


def read_class_file(path: epath.Path) -> Iterator[Row]:
    """Reads a file whose lines all have one label, the suffix of its name."""
    text = path.read_bytes().decode("utf-8", "replace")
    yield from ((line.strip(), path.suffix[1:], None) for line in text.split("\n") if line.strip())


def parse_split_line(line: str, suffix: str) -> Row:
    """Returns the row of one line; `read_split_file` lists the formats.

    Raises:
      ValueError: the line has other fields.
    """
    if suffix == ".label":
        label, text = line.split(" ", 1)
        return text.strip(), label.split(":")[0], None
    if suffix == ".txt":
        label, _, _, text, other = line.rstrip("\r").split("\t")
        return text, label, other
    text, label = line.rstrip("\r").split("\t")
    return text, label, None


def read_split_file(path: epath.Path) -> Iterator[Row]:
    """Reads one of the files in SPLITS; the suffix of its name decides the format.

    * no suffix (SST-2): a text, a tab and its label.
    * .label (TREC): "LABEL:FINE_LABEL text"; the fine label is dropped.
    * .txt (MRPC): a header; then a label, two ids and two texts, separated by tabs.

    Yields:
      Rows: the text, its label, and the other text of a pair or None. Blank lines are skipped.

    Raises:
      UserError: a line has other fields; the message names it.
    """
    encoding, fields = SPLIT_FORMATS[path.suffix]
    for number, line in enumerate(path.read_bytes().decode(encoding, "replace").split("\n"), 1):
        if not line.strip() or (path.suffix == ".txt" and number == 1):
            continue
        try:
            row = parse_split_line(line, path.suffix)
        except ValueError as error:
            raise UserError(f"{path}:{number}: expected {fields}; mend the line") from error
        yield row


def read_parts(folder: epath.Path) -> list[Labelled]:
    """Reads the parts of a folder: one (to be split into folds), train and test, or train, development and test.

    Raises:
      UserError: the folder has no such files, or a line is not as it should be.
    """

    def read_files(reader: Callable[[epath.Path], Iterable[Row]], *names: str) -> list[Labelled]:
        return [to_columns(reader(folder / name)) for name in names]

    if (folder / "train.jsonl").exists() and (folder / "test.jsonl").exists():
        return read_files(read_jsonl, "train.jsonl", "test.jsonl")
    if (folder / "all.jsonl").exists():
        return read_files(read_jsonl, "all.jsonl")
    for names in SPLITS:
        if all((folder / name).exists() for name in names):
            return read_files(read_split_file, *names)
    classes = sorted(path for path in folder.glob("*") if path.suffix in CLASSES)
    if len(classes) == 2:
        return [to_columns(row for path in classes for row in read_class_file(path))]
    expected = "train.jsonl and test.jsonl, nor all.jsonl, nor the files of a SentEval task"
    raise UserError(f"--data={folder}: the folder has neither {expected}")


def read_tfds_splits(name: str) -> dict[str, Labelled]:
    """Reads the labelled splits of a TFDS dataset whose rows have a label and one or two texts; downloads it if necessary.

    Args:
      name: of the dataset, as TFDS writes it: "glue/mrpc".

    Returns:
      The labelled rows of each split, by its name; a split without labels is left out. The first text feature is the text, the
      second the other text of a pair.

    Raises:
      UserError: there is no such dataset, its label is not an integer class, or it has no text or more than two.
    """
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name)
    except tfds.core.DatasetNotFoundError as error:
        raise UserError(f"--data=tfds:{name}: TFDS has no such dataset") from error
    features = builder.info.features
    text_keys = [key for key, feature in features.items() if isinstance(feature, tfds.features.Text)]
    label_key = next((key for key in ("label", "label-coarse") if key in features), None)
    if label_key is None or len(text_keys) not in (1, 2):
        raise UserError(f"--data=tfds:{name}: its features are {', '.join(features)}; a label and one or two texts are needed")
    if features[label_key].shape != () or not np.issubdtype(features[label_key].np_dtype, np.integer):
        raise UserError(f"--data=tfds:{name}: the feature {label_key!r} is not an integer class; give a dataset of classes")
    builder.download_and_prepare()
    splits = {}
    for split in builder.info.splits:
        columns = to_columns(
            (row[text_keys[0]].decode(), str(int(row[label_key])), row[text_keys[1]].decode() if len(text_keys) == 2 else None)
            for row in tfds.as_numpy(builder.as_dataset(split=split))
            if row[label_key] >= 0  # -1 is a hidden label: GLUE hides those of its test splits
        )
        if columns.texts:
            splits[split] = columns
    return splits


def read_tfds_parts(name: str) -> list[Labelled]:
    """Reads the parts of a TFDS dataset: train with test, or with validation where test has no labels.

    Raises:
      UserError: from `read_tfds_splits`, or there are no labels to train on.
    """
    splits = read_tfds_splits(name)
    if "train" not in splits:
        raise UserError(f"--data=tfds:{name}: no train split with labels; there are {', '.join(splits) or 'none'}")
    held_out = next((splits[split] for split in ("test", "validation") if split in splits), None)
    return [splits["train"]] if held_out is None else [splits["train"], held_out]


def pair_features(first: Any, second: Any) -> Any:
    """Returns SentEval's features of two texts, [|u - v|, u · v] [n 2e], from their vectors [n e], dense or sparse."""
    both = [abs(first - second), first * second]
    return np.concatenate(both, axis=1) if isinstance(first, np.ndarray) else sparse.hstack(both, format="csr")
