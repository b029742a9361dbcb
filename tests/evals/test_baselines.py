"""Baselines."""

import json
import pathlib

import numpy as np
from etils import epath
from scipy import sparse

from contrastive_jax.evals import baselines, classify, sts
from contrastive_jax.evals.task import Options


def test_baselines_know_words_and_chance_knows_nothing(tmp_path: pathlib.Path) -> None:
    lines = ["5\tthe red cat sat\tthe red cat sat down", "0\tthe red cat sat\tblue sky today", "3\tblue sky\tblue sea today"]
    (tmp_path / "dev.tsv").write_text("\n".join(lines) + "\n")
    folder = epath.Path(tmp_path)
    assert sparse.issparse(baselines.fit_tfidf(lines)(["red cat"]))
    first, second = ["the red cat", "blue sky", "a boat"], ["my red cat sat", "the sky today", "nothing shared"]
    tfidf = baselines.fit_tfidf(first + second)
    for similarity in (sts.cosines(lambda texts, view: tfidf(texts)), sts.bm25_similarity):
        similarities = similarity(first, second)
        assert similarities[0] > similarities[1] > similarities[2] == 0
        assert sts.score_folder(similarity, folder, sts.read_sts_file, "*.tsv")["dev"].keys() == {"spearman", "pearson"}
    z = baselines.chance_vectors([str(i) for i in range(500)])
    np.testing.assert_allclose(np.linalg.norm(z, axis=1), 1, rtol=1e-5)
    np.testing.assert_array_equal(baselines.chance_vectors(["7", "8"]), z[7:9])
    assert np.abs((z @ z.T)[~np.eye(500, dtype=bool)]).max() < 0.5
    (tmp_path / "all.jsonl").write_text(
        "".join(json.dumps({"text": f"{label} {i}", "label": label}) + "\n" for label in ("good", "bad") for i in range(20))
    )
    assert classify.PROBE.baselines["TF-IDF"](None, folder, Options())["probe"]["accuracy"] == 1.0
