"""The query-key test: its scores on hand-made cases, its pairs, tokens and text, and the baselines."""

import pathlib
import shutil
import types

import numpy as np
import pytest
from conftest import VOCAB, shrink
from etils import epath
from hf_folders import write_folder
from ml_collections import ConfigDict

from contrastive_jax.config import UserError, default_config
from contrastive_jax.data import prepared, tokenizer
from contrastive_jax.evals import query_key
from contrastive_jax.evals.task import Options
from contrastive_jax.inference import text_model


def test_scores_of_a_case_done_by_hand() -> None:
    similarity = np.array([[0.9, 0.1, 0.2], [0.8, 0.3, 0.5], [0.0, 0.4, 0.4]])
    scores = query_key.score_similarity(similarity)
    # Ranks of the diagonal: rows 1, 3, 2 (a tie counts against it), columns 1, 2, 2.
    assert scores["query_to_key"]["top1"] == pytest.approx(1 / 3)
    assert scores["query_to_key"]["mrr"] == pytest.approx((1 + 1 / 3 + 1 / 2) / 3)
    assert scores["key_to_query"]["mrr"] == pytest.approx((1 + 1 / 2 + 1 / 2) / 3)
    assert scores["mean"]["top1"] == pytest.approx(1 / 3)
    assert scores["mean"]["top5"] == 1


def test_a_constant_model_is_not_rewarded() -> None:
    assert query_key.score_similarity(np.ones((20, 20)))["mean"]["top10"] == 0


def test_chance_is_what_random_similarities_give() -> None:
    rng = np.random.default_rng(0)
    drawn = [query_key.score_similarity(rng.random((200, 200)))["mean"] for _ in range(30)]
    for name, value in query_key.chance_rows(200)["mean"].items():
        assert np.mean([scores[name] for scores in drawn]) == pytest.approx(value, abs=0.01)


def test_pairs_are_adjacent_one_per_record_and_the_same_each_time(dataset: pathlib.Path) -> None:
    config = shrink(default_config(), dataset)
    records = prepared.open_split(dataset, "validation")
    pairs, again = (query_key.make_pairs(records, config.eval, config.data) for _ in range(2))
    np.testing.assert_array_equal(pairs.tokens, again.tokens)
    assert pairs.tokens.shape == (40, 2, 12) and pairs.mask.sum(-1).tolist() == [[12, 12]] * 40
    everything = records.read_records(np.arange(len(records))).token_lists()
    homes = set()
    for left, right in pairs.spans.tolist():
        both = [*left, *right]
        matches = [n for n, home in enumerate(everything) if any(home[i : i + 20] == both for i in range(len(home)))]
        assert len(matches) == 1
        homes |= set(matches)
    assert len(homes) == 40
    config.eval.seed = 1
    assert not np.array_equal(pairs.tokens, query_key.make_pairs(records, config.eval, config.data).tokens)
    config.eval.pairs = 61
    with pytest.raises(UserError, match="config.eval.pairs=61: only 60 held-out records"):
        query_key.make_pairs(records, config.eval, config.data)


def test_baselines_find_shared_words() -> None:
    rng = np.random.default_rng(0)
    vocabulary = [f"term{i}" for i in range(500)]
    rare = rng.integers(0, 500, (30, 6))
    queries, keys = ([" ".join(vocabulary[i] for i in rng.permutation(row)) for row in rare] for _ in range(2))
    held_out = query_key.HeldOut(None, lambda: (queries, keys), as_tokens=True, batch_size=1, protocol={})
    for name in ("TF-IDF", "BM25"):
        assert query_key.TASK.baselines[name](None, held_out, Options())["mean"]["top1"] > 0.9


@pytest.fixture(scope="module")
def readable(dataset: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The dataset with a tokenizer whose ids are those of its tokens."""
    folder = tmp_path_factory.mktemp("readable") / "prepared"
    shutil.copytree(dataset, folder)
    rng, syllables = np.random.default_rng(0), [f"{a}{b}" for a in "bdfgklmnprst" for b in "aeiou"]
    vocabulary = [a + b for a in syllables for b in syllables]
    trained = tokenizer.train([" ".join(rng.choice(vocabulary, 100)) for _ in range(50)], VOCAB)
    (folder / trained.file).write_bytes(trained.model)
    return folder


def test_a_model_that_is_not_a_run_reads_the_text_of_the_same_pairs(readable: pathlib.Path, tmp_path: pathlib.Path) -> None:
    model, options = text_model.load(f"hf:{write_folder(tmp_path / 'bert', 'bert')}"), Options(pairs=30, span=10)
    data = query_key.TASK.open_data(model, str(readable), options)
    expected = query_key.make_pairs(
        prepared.open_split(readable, "validation"),
        ConfigDict({"pairs": 30, "span": 10, "seed": 0}),
        shrink(default_config(), readable).data,
    )
    np.testing.assert_array_equal(data.pairs.spans, expected.spans)
    rows = query_key.TASK.score(model, data, options)
    decode = tokenizer.load(readable).decode
    queries, keys = ([decode(ids) for ids in expected.spans[:, view].tolist()] for view in (0, 1))
    assert rows == query_key.score_similarity(model.encode_query(queries) @ model.encode_document(keys).T)
    protocol = query_key.TASK.protocol(model, data, options)
    assert protocol["input"] == "decoded text" and protocol["pairs"] == 30 and "max_tokens" not in protocol
    with pytest.raises(UserError, match=r"--data: hf:.* is no run; give a prepared dataset, --data=DIR"):
        query_key.TASK.open_data(model, "", options)


def test_a_run_reads_tokens_if_its_tokenizer_is_the_datasets(readable: pathlib.Path, tmp_path: pathlib.Path) -> None:
    def is_read_as_tokens(folder: pathlib.Path, sha256: str) -> bool:
        run = types.SimpleNamespace(config=default_config(), tokenizer=types.SimpleNamespace(sha256=sha256))
        return query_key.reads_dataset_tokens(run, epath.Path(folder))

    assert is_read_as_tokens(readable, tokenizer.load(readable).sha256)
    assert not is_read_as_tokens(readable, "another")
    assert is_read_as_tokens(tmp_path, "any")  # it has no tokenizer
