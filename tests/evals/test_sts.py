"""Sentence similarity."""

import pathlib

import numpy as np
import pytest
from etils import epath
from scipy import stats

from contrastive_jax.config import UserError
from contrastive_jax.evals import sts


def test_correlations_by_hand(tmp_path: pathlib.Path) -> None:
    measured = sts.correlations(np.array([1.0, 2, 3, 4]), np.array([0.1, 0.3, 0.2, 0.9]))
    assert measured["spearman"] == pytest.approx(0.8)  # 1 - 6 · 2 / (4 · 15)
    assert measured["pearson"] == pytest.approx(0.8262, abs=1e-4)  # 1.15 / √(5 · 0.3875)
    ties = sts.correlations(np.array([1.0, 1, 2, 3]), np.array([1.0, 2, 3, 4]))
    assert ties["spearman"] == pytest.approx(0.9487, abs=1e-4)  # ranks 1.5, 1.5, 3, 4
    for name, score in (("a", 1.0), ("b", 2.0)):
        (tmp_path / f"{name}.tsv").write_text("".join(f"{score * i}\t{i}\t{i * i}\n" for i in range(1, 5)))
    vectors = {str(i): [np.cos(i / 9), np.sin(i / 9)] for i in range(20)}
    encode = sts.cosines(lambda texts, view: np.array([vectors[text] for text in texts]))
    results = sts.score_folder(encode, epath.Path(tmp_path), sts.read_sts_file, "*.tsv")
    assert results.keys() == {"a", "b", "all", "mean"}
    assert results["mean"]["pearson"] == pytest.approx((results["a"]["pearson"] + results["b"]["pearson"]) / 2)
    (tmp_path / "0.tsv").write_text("1\tone\ttwo\n2 three four\n")
    with pytest.raises(UserError, match=r"0.tsv:2: not score, text, text"):
        sts.read_sts_file(epath.Path(tmp_path / "0.tsv"))
    for text, count in (("", 0), ("1\tone\ttwo\n", 1)):
        (tmp_path / "0.tsv").write_text(text)
        with pytest.raises(UserError, match=rf"0.tsv: {count} pairs, and a correlation needs two or more"):
            sts.score_folder(encode, epath.Path(tmp_path), sts.read_sts_file, "*.tsv")


def test_spearman_is_pearson_of_mean_ranks() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        a, b = rng.integers(0, 6, 40).astype(float), rng.normal(size=40)
        ranks = [np.array([(x < y).sum() + ((x == y).sum() + 1) / 2 for y in x]) for x in (a, b)]
        measured = sts.correlations(a, b)
        assert measured["spearman"] == pytest.approx(np.corrcoef(*ranks)[0, 1])
        assert measured["spearman"] == pytest.approx(stats.spearmanr(a, b).statistic)
        assert measured["pearson"] == pytest.approx(stats.pearsonr(a, b).statistic)
