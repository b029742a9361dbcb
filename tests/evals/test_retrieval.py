"""Retrieval: measures by hand, and against scikit-learn and trec_eval on random cases."""

import json
import pathlib

import numpy as np
import pytest
from etils import epath
from sklearn.metrics import ndcg_score

from contrastive_jax.config import UserError
from contrastive_jax.evals import retrieval

NAMES = ("ndcg@10", "mrr@10", "recall@10", "recall@20", "recall@100")


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
        measured = retrieval.measure_ranking([names[i] for i in np.argsort(-scores)[: retrieval.DEPTH]], grades)
        relevance = {"q": {name: int(grades.get(name, 0)) for name in names}}
        run = {"q": dict(zip(names, scores.tolist(), strict=True))}
        expected = pytrec_eval.RelevanceEvaluator(relevance, {"ndcg_cut.10", "recall.20,100", "recip_rank"}).evaluate(run)["q"]
        assert measured["ndcg@10"] == pytest.approx(expected["ndcg_cut_10"])
        assert measured["recall@20"] == pytest.approx(expected["recall_20"])
        assert measured["recall@100"] == pytest.approx(expected["recall_100"])
        first = expected["recip_rank"]
        assert measured["mrr@10"] == pytest.approx(first if first >= 0.1 else 0.0)
        if len(names) > 1:
            truth = np.array([[grades.get(name, 0) for name in names]])
            assert measured["ndcg@10"] == pytest.approx(ndcg_score(truth, scores[None], k=10))


def test_measures_by_hand() -> None:
    measured = retrieval.measure_ranking(["x", "b", "a", "y"], {"a": 2.0, "b": 1.0, "c": 1.0})
    gain, ideal = 1 / np.log2(3) + 2 / np.log2(4), 2 + 1 / np.log2(3) + 1 / np.log2(4)
    assert measured["ndcg@10"] == pytest.approx(gain / ideal)
    assert measured["mrr@10"] == 0.5
    assert measured["recall@10"] == measured["recall@20"] == measured["recall@100"] == pytest.approx(2 / 3)
    late = ["z"] * 10 + ["a"]
    assert retrieval.measure_ranking(late, {"a": 1.0}) == dict(zip(NAMES, (0.0, 0.0, 0.0, 1.0, 1.0), strict=True))


def test_a_folder_is_scored_and_a_bad_one_named(tmp_path: pathlib.Path) -> None:
    texts = [f"word{i}" for i in range(30)]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"_id": f"d{t}", "title": "", "text": t}) + "\n" for t in texts))
    (tmp_path / "queries.jsonl").write_text("".join(json.dumps({"_id": f"q{t}", "text": t}) + "\n" for t in texts))
    (tmp_path / "qrels").mkdir()
    lines = [f"q{t}\td{t}\t1" for t in texts[:20]] + [f"q{texts[20]}\td{texts[20]}\t0"]
    (tmp_path / "qrels" / "test.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *lines]) + "\n")

    def encode(texts: list[str], view: str) -> np.ndarray:
        return np.eye(30, dtype=np.float32)[[int(text.removeprefix("word")) for text in texts]]

    measured = retrieval.score_encoder(encode, epath.Path(tmp_path))["test"]
    assert measured == dict.fromkeys(NAMES, 1.0)
    # Where a query is a document itself, with its id, it is left out of its own ranking, as BEIR does it.
    corpus = (tmp_path / "corpus.jsonl").read_text()
    (tmp_path / "corpus.jsonl").write_text((tmp_path / "queries.jsonl").read_text() + corpus)
    assert retrieval.score_encoder(encode, epath.Path(tmp_path))["test"] == measured
    assert retrieval.score_bm25(epath.Path(tmp_path))["test"] == measured
    # Where queries and documents are numbered alike, the relevant one stays.
    judged = retrieval.judge(epath.Path(tmp_path), [("1", "a"), ("2", "b")], {"1": {"1": 1.0}, "2": {"3": 1.0}})
    assert judged.left_out == ["", "2"]
    (tmp_path / "corpus.jsonl").write_text('{"_id": "a", "text": "b"}\n[]\n')
    with pytest.raises(UserError, match=r"corpus.jsonl:2: not a JSON object"):
        retrieval.score_encoder(encode, epath.Path(tmp_path))
    (tmp_path / "corpus.jsonl").write_text('{"_id": "a", "text": "b"}\n{"_id": "c"}\n')
    with pytest.raises(UserError, match=r"corpus.jsonl:2: no text under 'text'"):
        retrieval.score_encoder(encode, epath.Path(tmp_path))
    (tmp_path / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n")
    with pytest.raises(UserError, match=r"test.tsv: no query has a document with a score above 0"):
        retrieval.score_encoder(encode, epath.Path(tmp_path))
