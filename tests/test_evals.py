"""Measures by hand-made cases; search against brute force."""

import json
import pathlib
from collections.abc import Callable

import numpy as np
import pytest
from etils import epath

from contrastive_jax import nearest
from contrastive_jax.evals import classify, embed, retrieval, sts


def test_rows_of_any_length_keep_their_order() -> None:
    shapes = set()

    def forward(tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
        shapes.add(tokens.shape)
        return np.stack([(tokens * mask).sum(1), mask.sum(1)], axis=1).astype(np.float32)

    rng = np.random.default_rng(0)
    rows = [rng.integers(1, 9, size).tolist() for size in rng.integers(1, 200, 3000)]
    z = embed.embed_ragged(forward, rows, 199)
    np.testing.assert_array_equal(z, [[sum(row), len(row)] for row in rows])
    assert len(shapes) <= len({int(np.searchsorted(embed.LENGTHS, len(row))) for row in rows})
    assert len({length for _, length in shapes}) == len(shapes)  # one shape a length
    assert max(length for _, length in shapes) == 199
    assert embed.embed_ragged(forward, [], 199).shape[0] == 0


def test_correlations_by_hand(tmp_path: pathlib.Path) -> None:
    found = sts.correlations(np.array([1.0, 2, 3, 4]), np.array([0.1, 0.3, 0.2, 0.9]))
    assert found["spearman"] == pytest.approx(0.8)  # 1 - 6 · 2 / (4 · 15)
    assert found["pearson"] == pytest.approx(0.8262, abs=1e-4)  # 1.15 / √(5 · 0.3875)
    ties = sts.correlations(np.array([1.0, 1, 2, 3]), np.array([1.0, 2, 3, 4]))
    assert ties["spearman"] == pytest.approx(0.9487, abs=1e-4)  # ranks 1.5, 1.5, 3, 4
    for name, score in (("a", 1.0), ("b", 2.0)):
        (tmp_path / f"{name}.tsv").write_text("".join(f"{score * i}\t{i}\t{i * i}\n" for i in range(1, 5)))
    vectors = {str(i): [np.cos(i / 9), np.sin(i / 9)] for i in range(20)}
    results = sts.evaluate(sts.cosines(lambda texts: np.array([vectors[text] for text in texts])), epath.Path(tmp_path))
    assert results.keys() == {"a", "b", "all", "mean"}
    assert results["mean"]["pearson"] == pytest.approx((results["a"]["pearson"] + results["b"]["pearson"]) / 2)
    (tmp_path / "0.tsv").write_text("1\tone\ttwo\n2 three four\n")
    with pytest.raises(ValueError, match=r"0.tsv:2: not score, text, text"):
        sts.evaluate(sts.cosines(lambda texts: np.zeros((len(texts), 2))), epath.Path(tmp_path))


def test_measures_by_hand() -> None:
    found = retrieval.measures(["x", "b", "a", "y"], {"a": 2.0, "b": 1.0, "c": 1.0})
    gain, ideal = 1 / np.log2(3) + 2 / np.log2(4), 2 + 1 / np.log2(3) + 1 / np.log2(4)
    assert found["ndcg@10"] == pytest.approx(gain / ideal)
    assert found["mrr@10"] == 0.5
    assert found["recall@20"] == found["recall@100"] == pytest.approx(2 / 3)
    late = ["z"] * 10 + ["a"]
    assert retrieval.measures(late, {"a": 1.0}) == {"ndcg@10": 0.0, "mrr@10": 0.0, "recall@20": 1.0, "recall@100": 1.0}


@pytest.mark.parametrize(("keys", "depth", "block"), [(1000, 10, 137), (5, 10, 2), (64, 64, 64), (3000, 100, 1024)])
def test_search_equals_brute_force(keys: int, depth: int, block: int) -> None:
    rng = np.random.default_rng(0)
    queries, keys_ = (rng.normal(size=(n, 16)).astype(np.float32) for n in (7, keys))
    keys_[keys // 2] = keys_[0]  # a tie
    blocks = (keys_[start : start + block] for start in range(0, keys, block))
    scores, places = retrieval.search(queries, blocks, depth, nearest.merge)
    exact = queries @ keys_.T
    order = np.argsort(-exact, axis=1, kind="stable")[:, :depth]
    count = order.shape[1]
    np.testing.assert_allclose(scores[:, :count], np.take_along_axis(exact, order, 1), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(places[:, :count], order)
    assert (places[:, count:] == -1).all()


def test_a_folder_is_scored_and_a_bad_one_named(tmp_path: pathlib.Path) -> None:
    texts = [f"word{i}" for i in range(30)]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"_id": f"d{t}", "title": "", "text": t}) + "\n" for t in texts))
    (tmp_path / "queries.jsonl").write_text("".join(json.dumps({"_id": f"q{t}", "text": t}) + "\n" for t in texts))
    (tmp_path / "qrels").mkdir()
    lines = [f"q{t}\td{t}\t1" for t in texts[:20]] + [f"q{texts[20]}\td{texts[20]}\t0"]
    (tmp_path / "qrels" / "test.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *lines]) + "\n")

    def encode(texts: list[str], view: int) -> np.ndarray:
        return np.eye(30, dtype=np.float32)[[int(text.removeprefix("word")) for text in texts]]

    found = retrieval.evaluate(encode, epath.Path(tmp_path), nearest.merge)["test"]
    assert found == {"ndcg@10": 1.0, "mrr@10": 1.0, "recall@20": 1.0, "recall@100": 1.0}
    (tmp_path / "corpus.jsonl").write_text('{"_id": "a", "text": "b"}\n[]\n')
    with pytest.raises(ValueError, match=r"corpus.jsonl:2: not an object with _id and text"):
        retrieval.evaluate(encode, epath.Path(tmp_path), nearest.merge)


def labelled(folder: pathlib.Path, name: str, labels: list[str]) -> None:
    rows = ({"text": f"{label} {number}", "label": label} for number, label in enumerate(labels))
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def by_label(noise: float) -> Callable[[list[str]], np.ndarray]:
    """Vectors near those of the label that a text begins with."""

    def encode(texts: list[str]) -> np.ndarray:
        rng = np.random.default_rng(len(texts))
        centres = np.eye(8)[["abc".index(text[0]) for text in texts]]
        z = centres + noise * rng.normal(size=centres.shape)
        return (z / np.linalg.norm(z, axis=1, keepdims=True)).astype(np.float32)

    return encode


def test_separable_classes_are_found_and_chance_is_chance(tmp_path: pathlib.Path) -> None:
    labelled(tmp_path, "all", ["a", "b", "c"] * 40)
    tasks = ("probe", "knn", "zero_shot")
    for name, row in classify.evaluate(by_label(0.05), epath.Path(tmp_path), tasks).items():
        assert row["accuracy"] == 1.0, name
    chance = classify.evaluate(by_label(1e6), epath.Path(tmp_path), tasks)
    assert all(0.15 < row["accuracy"] < 0.55 for row in chance.values())
    assert len(classify.read(epath.Path(tmp_path)).splits) == 10


def test_the_given_split_is_taken_and_labels_have_texts(tmp_path: pathlib.Path) -> None:
    labelled(tmp_path, "train", ["a"] * 30 + ["b"] * 20)
    labelled(tmp_path, "test", ["a"] * 5 + ["b"] * 10)
    (tmp_path / "labels.json").write_text(json.dumps({"a": "b", "b": "a", "prompt": "{} text"}))
    found = classify.read(epath.Path(tmp_path))
    assert [len(part) for part in found.splits[0]] == [50, 0, 15]
    rows = classify.evaluate(by_label(0.01), epath.Path(tmp_path), ("probe", "knn", "zero_shot"))
    assert rows["probe"]["accuracy"] == 1.0
    assert rows["knn"]["accuracy"] == pytest.approx(5 / 15)  # all 50 vote: "a" has 30
    assert rows["zero_shot"]["accuracy"] == rows["zero_shot_prompt"]["accuracy"] == 0.0  # the texts are swapped
    (tmp_path / "test.jsonl").write_text('{"text": "a", "label": "a"}\n{"text": 3, "label": "a"}\n')
    with pytest.raises(ValueError, match=r"test.jsonl:2: text is not a string"):
        classify.read(epath.Path(tmp_path))
    (tmp_path / "test.jsonl").unlink()
    with pytest.raises(ValueError, match=r"neither train.jsonl and test.jsonl, nor all.jsonl, nor"):
        classify.read(epath.Path(tmp_path))
    labelled(tmp_path, "all", ["a"] * 30 + ["b"] * 3)
    with pytest.raises(ValueError, match="10 folds need two labels or more, each 10 times"):
        classify.read(epath.Path(tmp_path))
