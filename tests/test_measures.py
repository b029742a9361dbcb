"""Measures against scikit-learn, scipy and trec_eval on random cases; what evaluate keeps, reads and refuses."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, XLA_FLAGS
from etils import epath
from scipy import sparse, stats
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import ndcg_score
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.neighbors import KNeighborsClassifier

from contrastive_jax import results
from contrastive_jax.evals import baselines, cache, classify, retrieval, senteval, sts


def rankings(seed: int) -> tuple[list[str], np.ndarray, dict[str, float]]:
    """Names, their scores without ties, and the grades of some."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 200))
    names = [f"d{i}" for i in range(count)]
    grades = {name: float(rng.integers(1, 4)) for name in rng.choice(names, rng.integers(1, min(count, 30) + 1), replace=False)}
    return names, rng.permutation(count).astype(np.float64), grades


def test_rankings_measure_as_sklearn_and_trec_eval() -> None:
    pytrec_eval = pytest.importorskip("pytrec_eval")
    for seed in range(200):
        names, scores, grades = rankings(seed)
        found = retrieval.measures([names[i] for i in np.argsort(-scores)[: retrieval.DEPTH]], grades)
        relevance = {"q": {name: int(grades.get(name, 0)) for name in names}}
        run = {"q": dict(zip(names, scores.tolist(), strict=True))}
        theirs = pytrec_eval.RelevanceEvaluator(relevance, {"ndcg_cut.10", "recall.20,100", "recip_rank"}).evaluate(run)["q"]
        assert found["ndcg@10"] == pytest.approx(theirs["ndcg_cut_10"])
        assert found["recall@20"] == pytest.approx(theirs["recall_20"])
        assert found["recall@100"] == pytest.approx(theirs["recall_100"])
        first = theirs["recip_rank"]
        assert found["mrr@10"] == pytest.approx(first if first >= 0.1 else 0.0)
        if len(names) > 1:
            truth = np.array([[grades.get(name, 0) for name in names]])
            assert found["ndcg@10"] == pytest.approx(ndcg_score(truth, scores[None], k=10))


def test_spearman_is_pearson_of_mean_ranks() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        a, b = rng.integers(0, 6, 40).astype(float), rng.normal(size=40)
        ranks = [np.array([(x < y).sum() + ((x == y).sum() + 1) / 2 for y in x]) for x in (a, b)]
        found = sts.correlations(a, b)
        assert found["spearman"] == pytest.approx(np.corrcoef(*ranks)[0, 1])
        assert found["spearman"] == pytest.approx(stats.spearmanr(a, b).statistic)
        assert found["pearson"] == pytest.approx(stats.pearsonr(a, b).statistic)


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
    rows = classify.evaluate(lambda texts: z[[int(text) for text in texts]], epath.Path(tmp_path), ("probe", "knn"))
    folds = StratifiedKFold(10, shuffle=True, random_state=0)
    theirs = cross_val_score(LogisticRegression(C=2.0, max_iter=1000), z, labels, cv=folds)
    assert rows["probe"] == {"accuracy": pytest.approx(theirs.mean()), "deviation": pytest.approx(theirs.std())}
    theirs = cross_val_score(KNeighborsClassifier(5, metric="cosine", algorithm="brute"), z, labels, cv=folds)
    assert rows["knn"]["accuracy"] == pytest.approx(theirs.mean())


def test_baselines_know_words_and_chance_knows_nothing(tmp_path: pathlib.Path) -> None:
    lines = ["5\tthe red cat sat\tthe red cat sat down", "0\tthe red cat sat\tblue sky today", "3\tblue sky\tblue sea today"]
    (tmp_path / "dev.tsv").write_text("\n".join(lines) + "\n")
    folder = epath.Path(tmp_path)
    encode = baselines.tfidf(sts.texts(folder))
    assert sparse.issparse(encode(["red cat"]))
    first, second = ["the red cat", "blue sky", "a boat"], ["my red cat sat", "the sky today", "nothing shared"]
    for similarity in (sts.cosines(baselines.tfidf(first + second)), sts.bm25):
        found = similarity(first, second)
        assert found[0] > found[1] > found[2] == 0
        assert sts.evaluate(similarity, folder)["dev"].keys() == {"spearman", "pearson"}
    z = baselines.chance([str(i) for i in range(500)])
    np.testing.assert_allclose(np.linalg.norm(z, axis=1), 1, rtol=1e-5)
    np.testing.assert_array_equal(baselines.chance(["7", "8"]), z[7:9])
    assert np.abs((z @ z.T)[~np.eye(500, dtype=bool)]).max() < 0.5
    (tmp_path / "all.jsonl").write_text(
        "".join(json.dumps({"text": f"{label} {i}", "label": label}) + "\n" for label in ("good", "bad") for i in range(20))
    )
    rows = classify.evaluate(baselines.tfidf(classify.texts(folder)), folder, ("probe",))
    assert rows["probe"]["accuracy"] == 1.0


def test_vectors_are_made_once(tmp_path: pathlib.Path) -> None:
    asked: list[str] = []

    def encode(texts: list[str]) -> np.ndarray:
        asked.extend(texts)
        return np.array([[len(text), ord(text[0])] for text in texts], np.float32)

    path = tmp_path / "new" / "vectors.sqlite"
    texts = [f"{i % 7} {'x' * (i % 5)}" for i in range(2000)]
    z = cache.cached(path, "model", encode)(texts)
    assert sorted(asked) == sorted(set(texts))
    asked.clear()
    np.testing.assert_array_equal(cache.cached(path, "model", encode)(texts), z)
    assert not asked
    cache.cached(path, "another", encode)(["0 x", "\ud800"])
    assert asked == ["0 x", "\ud800"]


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
    found = classify.read(epath.Path(tmp_path))
    train, tune, test = found.splits[0]
    expected = {
        "MR": (24, {"pos", "neg"}, "bad film", 0),
        "SST": (6, {"0", "1"}, "a film", 2),
        "TREC": (4, {"NUM", "HUM"}, "How many ?", 0),
        "MRPC": (2, {"1"}, "a cat", 0),
    }[name]
    assert (len(found.texts), set(found.labels), found.texts[0], len(tune)) == expected
    assert len(found.splits) == (10 if name == "MR" else 1) and len(train) + len(tune) + len(test) == expected[0]
    assert found.second == (["one cat"] * 2 if name == "MRPC" else [])


def test_pairs_have_the_features_of_senteval(tmp_path: pathlib.Path) -> None:
    rng = np.random.default_rng(0)
    words = [f"w{i}" for i in range(20)]
    rows = []
    for i in range(80):
        a, b = rng.choice(words, 2, replace=False)
        rows.append({"text": a, "text2": a if i % 2 else b, "label": i % 2})
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    z = rng.normal(size=(20, 8)).astype(np.float32)
    folder = epath.Path(tmp_path)
    for encode in (lambda texts: z[[int(text[1:]) for text in texts]], baselines.tfidf(words)):
        assert classify.evaluate(encode, folder, ("probe",))["probe"]["accuracy"] > 0.9
    with pytest.raises(ValueError, match="pairs of texts; only --tasks=probe"):
        classify.evaluate(baselines.chance, folder, ("knn",))
    np.testing.assert_allclose(senteval.pair_features(z[:1], z[1:2])[0, :8], np.abs(z[0] - z[1]))


def test_results_of_two_protocols_are_not_put_side_by_side(tmp_path: pathlib.Path) -> None:
    def result(name: str, pooling: str, score: float, task: str = "sts") -> results.Result:
        path = epath.Path(tmp_path / name)
        results.write(path, task, {"test": {"spearman": score}}, {"model": name, "pooling": pooling})
        return results.read(path, name)

    a, b, c = result("a", "mean", 0.81), result("b", "mean", 0.82), result("c", "cls", 0.83)
    assert a.stamp == b.stamp != c.stamp
    shown = results.compare([a, b], any_protocol=False)
    assert "81.00" in shown and "82.00" in shown and "note" not in shown
    with pytest.raises(ValueError, match=r"a and c were measured differently: pooling \('mean', 'cls'\); --any_protocol"):
        results.compare([a, b, c], any_protocol=False)
    shown = results.compare([a, c], any_protocol=True)
    assert "83.00" in shown and "note: a and c were measured differently" in shown
    with pytest.raises(ValueError, match="give two files or more"):
        results.compare([a], any_protocol=False)
    with pytest.raises(ValueError, match="a is of sts, d of knn"):
        results.compare([a, result("d", "mean", 0.5, "knn")], any_protocol=False)
    (tmp_path / "e").write_text("{}")
    with pytest.raises(ValueError, match="e: not what evaluate writes"):
        results.read(epath.Path(tmp_path / "e"), "e")


MILLION = """
import resource, sys
import jax, numpy as np
from contrastive_jax import nearest
from contrastive_jax.evals import retrieval
keys, width, count, depth, block = 1_000_000, 384, 64, 100, 65_536
def vectors(seed, n):  # small whole numbers: products are exact in float32, and ties are many
    return np.random.default_rng(seed).integers(-3, 4, (n, width)).astype(np.float32)
blocks = lambda: (vectors(start + 1, min(block, keys - start)) for start in range(0, keys, block))
queries = vectors(0, count)
assert jax.device_count() == 8
scores, places = retrieval.search(queries, blocks(), depth, nearest.merge)
print("peak GB", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
exact = np.concatenate([queries @ keys.T for keys in blocks()], axis=1)
order = np.argsort(-exact, axis=1, kind="stable")[:, :depth]
np.testing.assert_array_equal(places, order)
np.testing.assert_array_equal(scores, np.take_along_axis(exact, order, 1))
"""


@pytest.mark.slow
def test_a_million_keys_on_eight_devices_equal_brute_force() -> None:
    environment = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": XLA_FLAGS.format(8), "PYTHONPATH": str(ROOT), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", MILLION], env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout)
    assert float(done.stdout.split()[-1]) < 4
