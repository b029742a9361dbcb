"""Classification with frozen embeddings: a linear probe, nearest neighbours, nearest label.

Data (`senteval`): a folder with train.jsonl and test.jsonl, or all.jsonl (folds), each line an object with text and label; or a
SentEval task's folder; or tfds:NAME. labels.json, for zero-shot, may give {"label": "its text"} and {"prompt": "a {} review"}.

References:
  SentEval (Conneau and Kiela, https://arxiv.org/abs/1803.05449): the probe and its folds
  CPT-text (https://arxiv.org/abs/2201.10005), §3.1.2: zero-shot and k-nearest-neighbour classification

Dimensions: n texts, e embedding.
"""

import functools
import itertools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from contrastive_jax import files
from contrastive_jax.config import UserError
from contrastive_jax.evals import baselines, senteval
from contrastive_jax.evals.results import Rows
from contrastive_jax.evals.task import Task
from contrastive_jax.evals.vectors import Data, Encode, Vectors, make_vector_task
from contrastive_jax.inference.tokenize import NO_SIDE
from contrastive_jax.runtime.progress import Progress

FOLDS = 10
# Inverse strengths of L2, chosen on a tenth of the training part.
STRENGTHS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
NEIGHBOURS = 256
BLOCK = 1024  # texts classified at once by their neighbours

# (z[n e], labels str[n], positions to train on, to tune on, to test on) → accuracy on the last
Classifier = Callable[[Any, np.ndarray, np.ndarray, np.ndarray, np.ndarray], float]


class LabelledTexts(NamedTuple):
    """Labelled texts, or pairs of texts, and how they are split.

    Attributes:
      texts: n texts.
      second: the other text of each pair; empty where the data are single texts.
      labels: str[n].
      splits: (train, tune, test), int64 positions, per fold. The middle one is empty where the data name no part to tune on; a
        tenth of the training part is then taken for it.
    """

    texts: list[str]
    second: list[str]
    labels: np.ndarray
    splits: list[tuple[np.ndarray, np.ndarray, np.ndarray]]


def read_labelled_texts(data: Data) -> LabelledTexts:
    """Reads a folder or "tfds:NAME", with its own split or ten stratified folds (seed 0).

    Raises:
      UserError: files are missing, or a class is too rare for the folds.
    """
    from sklearn.model_selection import StratifiedKFold  # takes seconds, and few evaluations need it

    name = str(data)
    is_tfds = name.startswith("tfds:")
    parts = senteval.read_tfds_parts(name.removeprefix("tfds:")) if is_tfds else senteval.read_parts(epath.Path(data))
    texts, labels, second = ([value for part in parts for value in part[column]] for column in range(3))
    if second and len(second) != len(texts):
        raise UserError(f"--data={data}: some texts have a text2 and others have none")
    names = np.array(labels)
    if len(parts) > 1:
        bounds = np.cumsum([0, *(len(part.texts) for part in parts)])
        train, *tune, test = [np.arange(start, end) for start, end in itertools.pairwise(bounds)]
        if not len(test):
            raise UserError(f"--data={data}: its part to test on has no texts")
        return LabelledTexts(texts, second, names, [(train, tune[0] if tune else np.arange(0), test)])
    _, counts = np.unique(names, return_counts=True)
    if len(counts) < 2 or counts.min() < FOLDS:
        raise UserError(f"--data={data}: {FOLDS} folds need two labels or more, each {FOLDS} times or more")
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=0).split(texts, names)
    return LabelledTexts(texts, second, names, [(train, np.arange(0), test) for train, test in folds])


def all_texts(data: Data) -> list[str]:
    """Returns all texts of the data."""
    labelled = read_labelled_texts(data)
    return [*labelled.texts, *labelled.second]


def probe(z: Any, labels: np.ndarray, train: np.ndarray, tune: np.ndarray, test: np.ndarray) -> float:
    """Returns the accuracy of logistic regression, its L2 chosen on the part to tune on or a tenth of the training part."""
    from sklearn import exceptions, linear_model, model_selection  # takes seconds, and few evaluations need it

    def fit(strength: float, positions: np.ndarray) -> linear_model.LogisticRegression:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", exceptions.ConvergenceWarning)  # a thousand steps are near enough
            return linear_model.LogisticRegression(C=strength, max_iter=1000).fit(z[positions], labels[positions])

    inner, held_out = (train, tune) if len(tune) else model_selection.train_test_split(train, test_size=0.1, random_state=0)
    best = max(STRENGTHS, key=lambda strength: (fit(strength, inner).score(z[held_out], labels[held_out]), -strength))
    return float(fit(best, train).score(z[test], labels[test]))


def knn(z: Any, labels: np.ndarray, train: np.ndarray, tune: np.ndarray, test: np.ndarray) -> float:
    """Returns the accuracy of the most frequent label among the 256 nearest training texts; at a tie, the nearest one's."""
    del tune  # nothing is chosen
    names, numbers = np.unique(labels, return_inverse=True)
    k = min(NEIGHBOURS, len(train))
    correct = 0
    for start in range(0, len(test), BLOCK):
        block = test[start : start + BLOCK]
        nearest = np.argsort(-baselines.dot_products(z[block], z[train]), axis=1, kind="stable")[:, :k]
        votes = numbers[train][nearest]
        counts = np.stack([(votes == number).sum(1) for number in range(len(names))], axis=1)
        leading = counts[np.arange(len(block))[:, None], votes] == counts.max(1, keepdims=True)
        chosen = votes[np.arange(len(block)), leading.argmax(1)]
        correct += int((chosen == numbers[block]).sum())
    return correct / len(test)


def score_classifier(name: str, classifier: Classifier, encode: Encode, data: Data) -> Rows:
    """Scores a classifier on the vectors of texts, or (the probe) of pairs: {name: accuracy, and its deviation over folds}.

    Raises:
      UserError: the data are not as they should be.
    """
    labelled = read_labelled_texts(data)
    z = encode(labelled.texts, NO_SIDE)
    if labelled.second:
        if name != "probe":
            raise UserError(f"--data={data}: pairs of texts; only --tasks=probe takes them")
        z = senteval.pair_features(z, encode(labelled.second, NO_SIDE))
    if any(len(np.unique(labelled.labels[train])) < 2 for train, _, _ in labelled.splits):
        raise UserError(f"--data={data}: all training texts have one label; give two labels or more")
    accuracies: list[float] = []
    with Progress(name, total=len(labelled.splits), unit="splits") as progress:
        for split in labelled.splits:
            accuracies.append(classifier(z, labelled.labels, *split))
            progress.advance(note=f"accuracy {100 * np.mean(accuracies):.2f}")
    return {name: {"accuracy": float(np.mean(accuracies)), "deviation": float(np.std(accuracies))}}


def score_zero_shot(encode: Encode, data: Data) -> Rows:
    """Scores the label whose text is nearest, bare and, where labels.json has a prompt, in it.

    Raises:
      UserError: the data are not as they should be, or are pairs.
    """
    labelled = read_labelled_texts(data)
    if labelled.second:
        raise UserError(f"--data={data}: pairs of texts; only --tasks=probe takes them")
    z: Vectors = encode(labelled.texts, NO_SIDE)
    label_texts = files.read_json(epath.Path(data) / "labels.json")
    names, numbers = np.unique(labelled.labels, return_inverse=True)
    texts = [str(label_texts.get(name, name)) for name in names]
    wordings = {"zero_shot": texts}
    if "prompt" in label_texts:
        wordings["zero_shot_prompt"] = [label_texts["prompt"].format(text) for text in texts]
    rows: Rows = {}
    for row, wording in wordings.items():
        chosen = baselines.dot_products(z, encode(wording, NO_SIDE)).argmax(1)
        rows[row] = {"accuracy": float((chosen == numbers).mean()), "deviation": 0.0}
    return rows


def make_classifier_task(name: str, score: Callable[[Encode, Any], Rows], **protocol: Any) -> Task:
    """Makes a task on labelled texts."""
    return make_vector_task(name, score, all_texts, ("*",), protocol, tfds=True)


PROBE = make_classifier_task(
    "probe",
    functools.partial(score_classifier, "probe", probe),
    folds=FOLDS,
    strengths=STRENGTHS,
    chosen_on="the part to tune on, or a tenth of the training part",
)
KNN = make_classifier_task("knn", functools.partial(score_classifier, "knn", knn), folds=FOLDS, k=NEIGHBOURS, vote="majority")
ZERO_SHOT = make_classifier_task("zero_shot", score_zero_shot, labels="labels.json or their names")
