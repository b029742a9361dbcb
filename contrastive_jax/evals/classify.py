"""Classification with frozen embeddings: a linear probe, nearest neighbours, nearest label.

Data (`senteval`): a folder with train.jsonl and test.jsonl, or all.jsonl (folds), an object with text and label a line; or a
SentEval task's folder; or tfds:NAME. labels.json, for zero-shot, may give {"label": "its text"} and {"prompt": "a {} review"}.

References:
  SentEval (Conneau and Kiela, https://arxiv.org/abs/1803.05449): the probe and its folds
  CPT-text (https://arxiv.org/abs/2201.10005), §3.1.2: zero-shot and k-nearest-neighbour classification
"""

import itertools
import json
import warnings
from typing import NamedTuple

import numpy as np
from absl import logging
from etils import epath
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, train_test_split

from contrastive_jax.evals import baselines, senteval

FOLDS = 10
# Inverse strengths of L2, chosen on a tenth of the training part.
STRENGTHS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
NEIGHBOURS = 256


class Texts(NamedTuple):
    """Labelled texts, or pairs of texts (`second`, else empty), and how they are cut: places to train, tune and test on.

    Where the set names no part to tune on, that one is empty and a tenth of the training part is taken for it.
    """

    texts: list[str]
    second: list[str]
    labels: np.ndarray
    splits: list[tuple[np.ndarray, np.ndarray, np.ndarray]]


def read(data: epath.Path | str) -> Texts:
    """A folder's texts, or those of "tfds:NAME", with their own split or ten folds (seed 0, the classes' shares kept).

    Raises:
      ValueError: files are missing, or a class is too rare for the folds.
    """
    name = str(data)
    found = senteval.from_tfds(name.removeprefix("tfds:")) if name.startswith("tfds:") else senteval.parts(epath.Path(data))
    texts, labels, second = ([x for part in found for x in part[column]] for column in range(3))
    if second and len(second) != len(texts):
        raise ValueError(f"--data={data}: some texts have a text2 and others have none")
    names = np.array(labels)
    if len(found) > 1:
        cuts = np.cumsum([0, *(len(part.texts) for part in found)])
        places = [np.arange(start, end) for start, end in itertools.pairwise(cuts)]
        train, *tune, test = places
        return Texts(texts, second, names, [(train, tune[0] if tune else np.arange(0), test)])
    _, counts = np.unique(names, return_counts=True)
    if len(counts) < 2 or counts.min() < FOLDS:
        raise ValueError(f"--data={data}: {FOLDS} folds need two labels or more, each {FOLDS} times or more")
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=0).split(texts, names)
    return Texts(texts, second, names, [(train, np.arange(0), test) for train, test in folds])


def probe(z: np.ndarray, labels: np.ndarray, train: np.ndarray, tune: np.ndarray, test: np.ndarray) -> float:
    """Accuracy of logistic regression on z[n e]; its L2 is chosen on the part to tune on, or a tenth of the training part."""

    def fit(strength: float, places: np.ndarray) -> LogisticRegression:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # a thousand steps are near enough
            return LogisticRegression(C=strength, max_iter=1000).fit(z[places], labels[places])

    inner, held = (train, tune) if len(tune) else train_test_split(train, test_size=0.1, random_state=0)
    best = max(STRENGTHS, key=lambda strength: (fit(strength, inner).score(z[held], labels[held]), -strength))
    return float(fit(best, train).score(z[test], labels[test]))


def knn(z: np.ndarray, labels: np.ndarray, train: np.ndarray, tune: np.ndarray, test: np.ndarray) -> float:
    """Accuracy of the most frequent label of the 256 nearest of the training part; of equally frequent ones the nearest's."""
    del tune  # nothing is chosen
    names, numbers = np.unique(labels, return_inverse=True)
    k = min(NEIGHBOURS, len(train))
    right = 0
    for start in range(0, len(test), 1024):
        block = test[start : start + 1024]
        nearest = np.argsort(-baselines.products(z[block], z[train]), axis=1, kind="stable")[:, :k]
        votes = numbers[train][nearest]
        counts = np.stack([(votes == number).sum(1) for number in range(len(names))], axis=1)
        leading = counts[np.arange(len(block))[:, None], votes] == counts.max(1, keepdims=True)
        chosen = votes[np.arange(len(block)), leading.argmax(1)]
        right += int((chosen == numbers[block]).sum())
    return right / len(test)


def zero_shot(encode: baselines.Encode, z: np.ndarray, labels: np.ndarray, data: epath.Path) -> dict[str, float]:
    """Accuracy of the label whose text is nearest, bare and, where labels.json has one, in a prompt."""
    path = data / "labels.json"
    said = json.loads(path.read_text()) if path.exists() else {}
    names, numbers = np.unique(labels, return_inverse=True)
    texts = [str(said.get(name, name)) for name in names]
    wordings = {"zero_shot": texts}
    if "prompt" in said:
        wordings["zero_shot_prompt"] = [said["prompt"].format(text) for text in texts]
    return {name: float((baselines.products(z, encode(words)).argmax(1) == numbers).mean()) for name, words in wordings.items()}


def evaluate(encode: baselines.Encode, data: epath.Path | str, tasks: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """Scores a model: task → accuracy, and over folds its standard deviation.

    Raises:
      ValueError: the data are not as they should be.
    """
    found = read(data)
    z = encode(found.texts)
    if found.second:
        if tasks != ("probe",):
            raise ValueError(f"--data={data}: pairs of texts; only --tasks=probe takes them")
        z = senteval.pair_features(z, encode(found.second))
    rows: dict[str, dict[str, float]] = {}
    for task, score in (("probe", probe), ("knn", knn)):
        if task in tasks:
            accuracies = []
            for number, split in enumerate(found.splits, 1):
                accuracies.append(score(z, found.labels, *split))
                logging.info("%s %d of %d: %.2f", task, number, len(found.splits), 100 * accuracies[-1])
            rows[task] = {"accuracy": float(np.mean(accuracies)), "deviation": float(np.std(accuracies))}
    if "zero_shot" in tasks:
        named = zero_shot(encode, z, found.labels, epath.Path(data))
        rows |= {name: {"accuracy": value, "deviation": 0.0} for name, value in named.items()}
    return rows


def texts(data: epath.Path | str) -> list[str]:
    """All texts of the data."""
    found = read(data)
    return [*found.texts, *found.second]
