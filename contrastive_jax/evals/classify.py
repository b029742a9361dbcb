"""Classification with frozen embeddings: a linear probe, nearest neighbours, nearest label.

Data: a folder with train.jsonl and test.jsonl, or all.jsonl (folds), an object with text and label a line; labels.json, for
zero-shot, may give {"label": "its text"} and {"prompt": "a {} review"}.

References:
  SentEval (Conneau and Kiela, https://arxiv.org/abs/1803.05449): the probe and its folds
  CPT-text (https://arxiv.org/abs/2201.10005), §3.1.2: zero-shot and k-nearest-neighbour classification
"""

import json
import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from absl import logging
from etils import epath
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, train_test_split

FOLDS = 10
# Inverse strengths of L2, chosen on a tenth of the training part.
STRENGTHS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
NEIGHBOURS = 256


class Texts(NamedTuple):
    """Labelled texts and how they are cut: pairs of places to train and to test on."""

    texts: list[str]
    labels: np.ndarray
    splits: list[tuple[np.ndarray, np.ndarray]]


def lines(path: epath.Path) -> tuple[list[str], list[str]]:
    """Texts and labels of a .jsonl.

    Raises:
      ValueError: a line that has none; the message names it.
    """
    texts, labels = [], []
    with path.open() as file:
        for number, line in enumerate(file, 1):
            try:
                found = json.loads(line)
                text, label = found["text"], found["label"]
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(f"{path}:{number}: not an object with text and label") from error
            if not isinstance(text, str):
                raise ValueError(f"{path}:{number}: text is not a string")
            texts.append(text)
            labels.append(str(label))
    return texts, labels


def read(data: epath.Path) -> Texts:
    """The folder's texts, with its own split or ten folds (seed 0, the classes' shares kept).

    Raises:
      ValueError: files are missing, or a class is too rare for the folds.
    """
    parts = [data / f"{name}.jsonl" for name in ("train", "test")]
    if all(part.exists() for part in parts):
        (train, train_labels), (test, test_labels) = map(lines, parts)
        places = np.arange(len(train) + len(test))
        splits = [(places[: len(train)], places[len(train) :])]
        return Texts(train + test, np.array(train_labels + test_labels), splits)
    if not (data / "all.jsonl").exists():
        raise ValueError(f"--data={data}: neither train.jsonl and test.jsonl nor all.jsonl there")
    texts, found = lines(data / "all.jsonl")
    labels = np.array(found)
    _, counts = np.unique(labels, return_counts=True)
    if len(counts) < 2 or counts.min() < FOLDS:
        raise ValueError(f"{data}/all.jsonl: {FOLDS} folds need two labels or more, each {FOLDS} times or more")
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=0)
    return Texts(texts, labels, list(folds.split(texts, labels)))


def probe(z: np.ndarray, labels: np.ndarray, train: np.ndarray, test: np.ndarray) -> float:
    """Accuracy of logistic regression on z[n e]; its L2 is chosen on a tenth of the training part."""

    def fit(strength: float, places: np.ndarray) -> LogisticRegression:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # a thousand steps are near enough
            return LogisticRegression(C=strength, max_iter=1000).fit(z[places], labels[places])

    inner, held = train_test_split(train, test_size=0.1, random_state=0)
    best = max(STRENGTHS, key=lambda strength: (fit(strength, inner).score(z[held], labels[held]), -strength))
    return float(fit(best, train).score(z[test], labels[test]))


def knn(z: np.ndarray, labels: np.ndarray, train: np.ndarray, test: np.ndarray) -> float:
    """Accuracy of the most frequent label of the 256 nearest of the training part; of equally frequent ones the nearest's."""
    names, numbers = np.unique(labels, return_inverse=True)
    k = min(NEIGHBOURS, len(train))
    right = 0
    for start in range(0, len(test), 1024):
        block = test[start : start + 1024]
        nearest = np.argsort(-(z[block] @ z[train].T), axis=1, kind="stable")[:, :k]
        votes = numbers[train][nearest]
        counts = np.stack([(votes == number).sum(1) for number in range(len(names))], axis=1)
        leading = counts[np.arange(len(block))[:, None], votes] == counts.max(1, keepdims=True)
        chosen = votes[np.arange(len(block)), leading.argmax(1)]
        right += int((chosen == numbers[block]).sum())
    return right / len(test)


def zero_shot(
    encode: Callable[[list[str]], np.ndarray], z: np.ndarray, labels: np.ndarray, data: epath.Path
) -> dict[str, float]:
    """Accuracy of the label whose text is nearest, bare and, where labels.json has one, in a prompt."""
    path = data / "labels.json"
    said = json.loads(path.read_text()) if path.exists() else {}
    names, numbers = np.unique(labels, return_inverse=True)
    texts = [str(said.get(name, name)) for name in names]
    wordings = {"zero_shot": texts}
    if "prompt" in said:
        wordings["zero_shot_prompt"] = [said["prompt"].format(text) for text in texts]
    return {name: float(((z @ encode(words).T).argmax(1) == numbers).mean()) for name, words in wordings.items()}


def evaluate(
    encode: Callable[[list[str]], np.ndarray], data: epath.Path, tasks: tuple[str, ...]
) -> dict[str, dict[str, float]]:
    """Scores a model: task → accuracy, and over folds its standard deviation.

    Raises:
      ValueError: the data are not as they should be.
    """
    found = read(data)
    z = encode(found.texts)
    rows: dict[str, dict[str, float]] = {}
    for task, score in (("probe", probe), ("knn", knn)):
        if task in tasks:
            accuracies = []
            for number, (train, test) in enumerate(found.splits, 1):
                accuracies.append(score(z, found.labels, train, test))
                logging.info("%s %d of %d: %.2f", task, number, len(found.splits), 100 * accuracies[-1])
            rows[task] = {"accuracy": float(np.mean(accuracies)), "deviation": float(np.std(accuracies))}
    if "zero_shot" in tasks:
        named = zero_shot(encode, z, found.labels, data)
        rows |= {name: {"accuracy": value, "deviation": 0.0} for name, value in named.items()}
    return rows
