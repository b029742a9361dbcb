"""The query-key test: its scores on hand-made cases, its pairs, and the baselines."""

import functools
import pathlib

import numpy as np
import pytest
from conftest import shrink

from configs import base
from contrastive_jax.data import pipeline
from contrastive_jax.evals import embed, query_key


def test_scores_of_a_case_done_by_hand() -> None:
    similarity = np.array([[0.9, 0.1, 0.2], [0.8, 0.3, 0.5], [0.0, 0.4, 0.4]])
    scores = query_key.score(similarity)
    # Ranks of the diagonal: rows 1, 3, 2 (a tie counts against it), columns 1, 2, 2.
    assert scores["query_to_key"]["top1"] == pytest.approx(1 / 3)
    assert scores["query_to_key"]["mrr"] == pytest.approx((1 + 1 / 3 + 1 / 2) / 3)
    assert scores["key_to_query"]["mrr"] == pytest.approx((1 + 1 / 2 + 1 / 2) / 3)
    assert scores["mean"]["top1"] == pytest.approx(1 / 3)
    assert scores["mean"]["top5"] == 1


def test_a_constant_model_is_not_rewarded() -> None:
    assert query_key.score(np.ones((20, 20)))["mean"]["top10"] == 0


def test_chance_is_what_random_similarities_give() -> None:
    rng = np.random.default_rng(0)
    drawn = [query_key.score(rng.random((200, 200)))["mean"] for _ in range(30)]
    for name, value in query_key.chance(200)["mean"].items():
        assert np.mean([scores[name] for scores in drawn]) == pytest.approx(value, abs=0.01)


def test_pairs_are_adjacent_one_a_window_and_the_same_each_time(dataset: pathlib.Path) -> None:
    config = shrink(base.get_config(), dataset)
    windows = pipeline.open_split(dataset, "validation")
    pairs, again = (query_key.make_pairs(windows, config.eval, config.data) for _ in range(2))
    np.testing.assert_array_equal(pairs.tokens, again.tokens)
    assert pairs.tokens.shape == (40, 2, 12) and pairs.mask.sum(-1).tolist() == [[12, 12]] * 40
    everything = pipeline.read_tokens(windows, np.arange(len(windows.length))).numpy().tolist()
    homes = set()
    for left, right in pairs.spans:
        both = list(left + right)
        found = [n for n, home in enumerate(everything) if any(home[i : i + 20] == both for i in range(len(home)))]
        assert len(found) == 1
        homes |= set(found)
    assert len(homes) == 40
    config.eval.seed = 1
    assert not np.array_equal(pairs.tokens, query_key.make_pairs(windows, config.eval, config.data).tokens)
    config.eval.pairs = 61
    with pytest.raises(ValueError, match="config.eval.pairs=61: only 60"):
        query_key.make_pairs(windows, config.eval, config.data)


def test_baselines_find_shared_words() -> None:
    rng = np.random.default_rng(0)
    words = [f"term{i}" for i in range(500)]
    spans = [tuple(tuple(rng.permutation(rare)) for _ in range(2)) for rare in rng.integers(0, 500, (30, 6))]
    pairs = query_key.Pairs(np.zeros(0), np.zeros(0), spans, np.zeros(0))
    scores = query_key.baselines(pairs, lambda ids: " ".join(words[i] for i in ids))
    assert set(scores) == {"TF-IDF", "BM25"}
    for row in scores.values():
        assert row["mean"]["top1"] > 0.9
    assert "TF-IDF" in query_key.table(scores)


def test_embedding_in_blocks_changes_nothing() -> None:
    shapes = set()

    def encode(params: float, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
        shapes.add(tokens.shape)
        return params * (tokens * mask).sum(1, keepdims=True).astype(np.float32)

    tokens = np.arange(7 * 3).reshape(7, 3)
    z = embed.embed(functools.partial(encode, 2.0), tokens, tokens > 4, batch_size=3)
    np.testing.assert_array_equal(z, encode(2.0, tokens, tokens > 4))
    assert shapes == {(3, 3), (7, 3)}
