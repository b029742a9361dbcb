"""Probes, nearest neighbours and nearest labels, against scikit-learn; the files of SentEval."""

import json
import pathlib
from collections.abc import Callable

import numpy as np
import pytest
from etils import epath
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.neighbors import KNeighborsClassifier

from contrastive_jax.config import UserError
from contrastive_jax.evals import baselines, classify, results, senteval, vectors


def labelled(folder: pathlib.Path, name: str, labels: list[str]) -> None:
    rows = ({"text": f"{label} {number}", "label": label} for number, label in enumerate(labels))
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def score(encode: vectors.Encode, folder: pathlib.Path, *tasks: str) -> results.Rows:
    """The rows of some tasks."""
    rows: results.Rows = {}
    for name in tasks:
        if name == "zero_shot":
            rows |= classify.score_zero_shot(encode, epath.Path(folder))
        else:
            rows |= classify.score_classifier(name, getattr(classify, name), encode, epath.Path(folder))
    return rows


def by_label(noise: float) -> Callable[[list[str], str], np.ndarray]:
    """Vectors near those of the label that a text begins with."""

    def encode(texts: list[str], view: str) -> np.ndarray:
        rng = np.random.default_rng(len(texts))
        centres = np.eye(8)[["abc".index(text[0]) for text in texts]]
        z = centres + noise * rng.normal(size=centres.shape)
        return (z / np.linalg.norm(z, axis=1, keepdims=True)).astype(np.float32)

    return encode


def test_separable_classes_are_found_and_chance_is_chance(tmp_path: pathlib.Path) -> None:
    labelled(tmp_path, "all", ["a", "b", "c"] * 40)
    tasks = ("probe", "knn", "zero_shot")
    for name, row in score(by_label(0.05), tmp_path, *tasks).items():
        assert row["accuracy"] == 1.0, name
    chance = score(by_label(1e6), tmp_path, *tasks)
    assert all(0.15 < row["accuracy"] < 0.55 for row in chance.values())
    assert len(classify.read_labelled_texts(epath.Path(tmp_path)).splits) == 10


def test_the_given_split_is_taken_and_labels_have_texts(tmp_path: pathlib.Path) -> None:
    labelled(tmp_path, "train", ["a"] * 30 + ["b"] * 20)
    labelled(tmp_path, "test", ["a"] * 5 + ["b"] * 10)
    (tmp_path / "labels.json").write_text(json.dumps({"a": "b", "b": "a", "prompt": "{} text"}))
    labelled_texts = classify.read_labelled_texts(epath.Path(tmp_path))
    assert [len(part) for part in labelled_texts.splits[0]] == [50, 0, 15]
    rows = score(by_label(0.01), tmp_path, "probe", "knn", "zero_shot")
    assert rows["probe"]["accuracy"] == 1.0
    assert rows["knn"]["accuracy"] == pytest.approx(5 / 15)  # all 50 vote: "a" has 30
    assert rows["zero_shot"]["accuracy"] == rows["zero_shot_prompt"]["accuracy"] == 0.0  # the texts are swapped
    (tmp_path / "test.jsonl").write_text('{"text": "a", "label": "a"}\n{"text": 3, "label": "a"}\n')
    with pytest.raises(UserError, match=r"test.jsonl:2: no text under 'text'"):
        classify.read_labelled_texts(epath.Path(tmp_path))
    (tmp_path / "test.jsonl").write_text("")
    with pytest.raises(UserError, match="its part to test on has no texts"):
        classify.read_labelled_texts(epath.Path(tmp_path))
    (tmp_path / "test.jsonl").unlink()
    with pytest.raises(UserError, match=r"neither train.jsonl and test.jsonl, nor all.jsonl, nor"):
        classify.read_labelled_texts(epath.Path(tmp_path))
    labelled(tmp_path, "all", ["a"] * 30 + ["b"] * 3)
    with pytest.raises(UserError, match="10 folds need two labels or more, each 10 times"):
        classify.read_labelled_texts(epath.Path(tmp_path))


def write_labelled(folder: pathlib.Path, count: int = 150) -> tuple[np.ndarray, np.ndarray]:
    """Noisy vectors of two classes, whose texts are their numbers."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, count)
    z = rng.normal(size=(count, 12)).astype(np.float32) + 0.4 * labels[:, None]
    rows = ({"text": str(i), "label": int(label)} for i, label in enumerate(labels))
    (folder / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return z / np.linalg.norm(z, axis=1, keepdims=True), labels.astype(str)


def test_folds_score_as_sklearn(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    z, labels = write_labelled(tmp_path)
    monkeypatch.setattr(classify, "STRENGTHS", (2.0,))
    monkeypatch.setattr(classify, "NEIGHBOURS", 5)
    rows = score(lambda texts, view: z[[int(text) for text in texts]], tmp_path, "probe", "knn")
    folds = StratifiedKFold(10, shuffle=True, random_state=0)
    expected = cross_val_score(LogisticRegression(C=2.0, max_iter=1000), z, labels, cv=folds)
    assert rows["probe"] == {"accuracy": pytest.approx(expected.mean()), "deviation": pytest.approx(expected.std())}
    expected = cross_val_score(KNeighborsClassifier(5, metric="cosine", algorithm="brute"), z, labels, cv=folds)
    assert rows["knn"]["accuracy"] == pytest.approx(expected.mean())


SENTEVAL = {
    "MR": {"rt-polarity.pos": "good film\n" * 12, "rt-polarity.neg": "bad film\n" * 12},
    "SST": {f"sentiment-{part}": "a film\t1\nno film\t0\n" for part in ("train", "dev", "test")},
    "TREC": {name: "NUM:count How many ?\nHUM:ind Who ?\n" for name in ("train_5500.label", "TREC_10.label")},
    "MRPC": {
        f"msr_paraphrase_{part}.txt": "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t7\t8\ta cat\tone cat\n"
        for part in ("train", "test")
    },
}


@pytest.mark.parametrize("name", SENTEVAL)
def test_files_of_senteval_are_read(name: str, tmp_path: pathlib.Path) -> None:
    for file, text in SENTEVAL[name].items():
        (tmp_path / file).write_text(text)
    labelled_texts = classify.read_labelled_texts(epath.Path(tmp_path))
    train, tune, test = labelled_texts.splits[0]
    expected = {
        "MR": (24, {"pos", "neg"}, "bad film", 0),
        "SST": (6, {"0", "1"}, "a film", 2),
        "TREC": (4, {"NUM", "HUM"}, "How many ?", 0),
        "MRPC": (2, {"1"}, "a cat", 0),
    }[name]
    assert (len(labelled_texts.texts), set(labelled_texts.labels), labelled_texts.texts[0], len(tune)) == expected
    assert len(labelled_texts.splits) == (10 if name == "MR" else 1) and len(train) + len(tune) + len(test) == expected[0]
    assert labelled_texts.second == (["one cat"] * 2 if name == "MRPC" else [])
    if name != "MR":
        (tmp_path / file).write_text(f"{text}\nno-label\n")
        with pytest.raises(UserError, match=rf"{file}:\d: expected .*LABEL"):
            classify.read_labelled_texts(epath.Path(tmp_path))


def test_pairs_have_the_features_of_senteval(tmp_path: pathlib.Path) -> None:
    rng = np.random.default_rng(0)
    vocabulary = [f"w{i}" for i in range(20)]
    rows = []
    for i in range(80):
        a, b = rng.choice(vocabulary, 2, replace=False)
        rows.append({"text": a, "text2": a if i % 2 else b, "label": i % 2})
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    z = rng.normal(size=(20, 8)).astype(np.float32)
    tfidf = baselines.fit_tfidf(vocabulary)
    for encode in (lambda texts, view: z[[int(text[1:]) for text in texts]], lambda texts, view: tfidf(texts)):
        assert score(encode, tmp_path, "probe")["probe"]["accuracy"] > 0.9
    with pytest.raises(UserError, match="pairs of texts; only --tasks=probe"):
        score(encode, tmp_path, "knn")
    with pytest.raises(UserError, match="pairs of texts; only --tasks=probe"):
        score(encode, tmp_path, "zero_shot")
    np.testing.assert_allclose(senteval.pair_features(z[:1], z[1:2])[0, :8], np.abs(z[0] - z[1]))
