"""Cleaning as a part of prepare: what leaves the dataset, what the manifest says, and that the order of work is all one."""

import hashlib
import json
import random
import tracemalloc
from typing import Any

import numpy as np
import pytest

from contrastive_jax.config import UserError
from contrastive_jax.data import store
from contrastive_jax.data.clean import hash_set, ngrams
from contrastive_jax.data.preparation import arguments, driver, leaks, prepare
from contrastive_jax.data.preparation.leaks import STRIDE
from contrastive_jax.data.preparation.work import Work

RNG = random.Random(0)
VOCABULARY = [a + b + c for a in "bdfgklmnprst" for b in "aeiou" for c in ("", "n", "s", "r")]
LEAK = 20


def words(count: int) -> list[str]:
    return RNG.choices(VOCABULARY, k=count)


def changed(text: str, share: float) -> str:
    return " ".join(word if RNG.random() > share else RNG.choice(VOCABULARY) for word in text.split(" "))


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Documents with something wrong with some of them; the lines of each kind, by split."""
    root = tmp_path_factory.mktemp("raw")
    train = [" ".join(words(150)) for _ in range(30)]
    held_out = [" ".join(words(150)) for _ in range(12)]
    question = words(15)
    train += [changed(text, 0.05) for text in train[:5]]  # near-duplicates in train
    train += [changed(text, 0.05) for text in held_out[:4]]  # and of documents that are held out
    train.append(" ".join([*words(60), *question, *words(60)]))
    train += ["too short", "Again and again. " * 30]
    passage = words(40)
    train.append(" ".join([*words(100), *passage, *words(10)]))
    held_out += [" ".join([*words(30), *passage, *words(80)]), " ".join([*question, *words(100)]), changed(held_out[5], 0.03)]
    for name, texts in (("train", train), ("val", held_out)):
        lines = (json.dumps({"text": text, "meta": {"pile_set_name": "AB"[i % 2]}}) for i, text in enumerate(texts))
        (root / f"{name}.jsonl").write_text("\n".join(lines))
    (root / "sets/quiz").mkdir(parents=True)
    (root / "sets/quiz/test.jsonl").write_text(json.dumps({"text": " ".join(question).title() + "?", "label": 1}))
    return {"root": root, "passage": passage}


def clean(raw: dict[str, Any], output: Any, **changes: Any) -> dict[str, Any]:
    root = raw["root"]
    values: dict[str, Any] = {
        "vocab_size": 360,
        "record_tokens": 64,
        "workers": 1,
        "min_characters": 50,
        "max_repetition": 1.0,
        "near_duplicates": 0.6,
        "decontaminate": f"{root}/sets",
        "leak_tokens": LEAK,
    }
    return prepare.prepare(output, f"{root}/train.jsonl", f"{root}/val.jsonl", **values | changes)


def records_of(output: Any, manifest: dict[str, Any], split: str) -> list[store.Record]:
    paths = sorted((output / "pile/1.0.0").glob(f"*-{split}.array_record*"))
    return [record for path in paths for record in store.read_file_shard(path, manifest["domains"], manifest["vocab_size"])]


@pytest.fixture(scope="module")
def prepared(raw: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, Any]]:
    output = tmp_path_factory.mktemp("out") / "data"
    return output, clean(raw, output)


def test_the_manifest_counts_what_was_removed_by_reason_split_and_domain(prepared):
    _, manifest = prepared
    totals = {reason: sum(files.values()) for reason, files in manifest["rejects"].items()}
    assert totals == {"evaluation text": 2, "near duplicate": 10, "repetition": 1, "too short": 1}
    by_split = {
        split: sum(domain.get("near duplicate", 0) for domain in domains.values())
        for split, domains in manifest["rejects_by_domain"].items()
    }
    assert by_split == {"train": 9, "validation": 1}
    assert manifest["decontamination"] == {
        "quiz": {"texts": 1, "too_short": 0, "ngrams": 3, "texts_found": 1, "documents_removed": 2}
    }
    assert manifest["splits"]["train"]["documents"] == 31
    assert manifest["splits"]["validation"]["documents"] == 13


def test_no_validation_record_shares_a_run_of_tokens_with_training(prepared):
    output, manifest = prepared
    train, validation = (records_of(output, manifest, split) for split in ("train", "validation"))
    hashed = [{*runs(record)} for record in train]
    assert not any(set(runs(record)) & of_train for record in validation for of_train in hashed)
    assert 1 <= manifest["leaks"]["removed"] <= 3  # of the one document, the records with the passage
    assert manifest["leaks"]["records"] == len(validation) + manifest["leaks"]["removed"]
    for split, records in (("train", train), ("validation", validation)):
        counts = manifest["splits"][split]
        assert (counts["records"], counts["tokens"]) == (len(records), sum(len(record.tokens) for record in records))
        index = np.load(store.index_path(output, split, "length"))
        assert index.tolist() == [len(record.tokens) for record in records]


def runs(record: store.Record) -> list[tuple[int, ...]]:
    tokens = record.tokens.tolist()
    return [tuple(tokens[i : i + LEAK]) for i in range(len(tokens) - LEAK + 1)]


def test_parts_and_partitions_do_not_change_what_is_removed(raw, prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(driver, "PART_BYTES", (3000, 3000))
    monkeypatch.setattr(driver.near_duplicates, "ROW_MEMORY", 1 << 24)
    output, manifest = prepared
    again = clean(raw, tmp_path / "data", tokenizer=str(output / "tokenizer.model"))
    for name in ("rejects", "rejects_by_domain", "decontamination", "leaks", "splits"):
        assert again[name] == manifest[name], name
    for split in ("train", "validation"):
        identities = [
            {(record.document, record.position) for record in records_of(folder, manifest, split)}
            for folder in (output, tmp_path / "data")
        ]
        assert identities[0] == identities[1]


def test_workers_do_not_change_the_content(raw, prepared, tmp_path):
    again = clean(raw, tmp_path / "data", workers=2)
    assert again["content_hash"] == prepared[1]["content_hash"]


def test_a_run_that_is_interrupted_again_and_again_makes_the_same_dataset(raw, prepared, tmp_path, monkeypatch):
    output, manifest = prepared
    write, left = Work.write_outcome, [0]

    def write_some(*values: Any) -> dict[str, Any]:
        left[0] -= 1
        if not left[0]:
            raise InterruptedError
        return write(*values)

    monkeypatch.setattr(Work, "write_outcome", write_some)
    again, interruptions = None, 0
    while again is None:
        left[0] = 3  # two tasks are done, the third is interrupted when all but its outcome is written
        try:
            again = clean(raw, tmp_path / "data", tokenizer=str(output / "tokenizer.model"))
        except InterruptedError:
            interruptions += 1
    assert interruptions > 4
    for name in ("content_hash", "rejects_by_domain", "decontamination", "leaks", "splits"):
        assert again[name] == manifest[name], name


def test_hashes_of_many_pieces_are_united_in_bounded_memory(tmp_path):
    work, rng = Work(tmp_path), np.random.default_rng(0)
    hashes = [np.append(rng.integers(0, 1 << 64, 10_000, np.uint64), np.uint64(7)) for _ in range(40)]
    rows = sum(leaks.write_hashes(work, f"{number}", [of_piece]) for number, of_piece in enumerate(hashes))
    expected = np.unique(np.concatenate(hashes))
    names = [f"{number}" for number in range(40)]
    tracemalloc.start()
    digest = leaks.write_union(work, names, rows, 1 << 20, "union.npy")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20 < expected.nbytes
    np.testing.assert_array_equal(work.read_array("union.npy"), expected)
    assert digest == leaks.write_union(work, names, rows, 1 << 30, "whole.npy") == hashlib.sha256(expected).hexdigest()
    leaks.write_union(work, [], 0, 1 << 20, "empty.npy")
    assert work.read_array("empty.npy").shape == (0,)


def test_a_filter_is_made_a_slice_at_a_time(monkeypatch):
    hashes = np.random.default_rng(0).integers(0, 1 << 64, 1000, np.uint64)
    expected = hash_set.bitmap_of(hashes)
    monkeypatch.setattr(hash_set, "_SLICE", 7)
    np.testing.assert_array_equal(hash_set.bitmap_of(hashes), expected)


def test_every_run_of_the_asked_length_is_found_and_none_that_is_much_shorter():
    rng = np.random.default_rng(0)
    for size in (LEAK - STRIDE, LEAK):
        for _ in range(50):
            train, held_out = rng.integers(0, 400, (2, 64))
            begin, at = rng.integers(0, 64 - size, 2)
            held_out[begin : begin + size] = train[at : at + size]
            leaked = np.sort(leaks.run_hashes(train, LEAK))
            record = store.Record(held_out, "aa", 0, 0)
            kept = leaks.separate([record], leaked, LEAK, ("A",)).records
            assert len(kept) == (size < LEAK)


def test_records_shorter_than_a_run_stay():
    record = store.Record(np.arange(5), "aa", 0, 0)
    leaked = np.sort(leaks.run_hashes(np.arange(64), LEAK))
    assert leaks.separate([record], leaked, LEAK, ("A",)).records == [record]


def test_a_validation_split_of_leaks_alone_is_refused(tmp_path):
    texts = [" ".join(words(100)) for _ in range(3)]
    for name, extra in (("train", ["x " + text for text in texts]), ("val", texts)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in extra))
    with pytest.raises(UserError, match="--leak_tokens=20: every validation record"):
        prepare.prepare(
            tmp_path / "out", f"{tmp_path}/train.jsonl", f"{tmp_path}/val.jsonl", vocab_size=320, workers=1, leak_tokens=20
        )


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"near_duplicates": 1.5}, "--near_duplicates=1.5"),
        ({"leak_tokens": 3}, "--leak_tokens=3"),
        ({"leak_tokens": 2000}, "--leak_tokens=2000"),
        ({"min_characters": -1}, "--min_characters=-1"),
    ],
)
def test_values_that_cannot_be_meant_are_refused(changes, flag):
    with pytest.raises(UserError, match=flag):
        arguments.check_arguments(arguments.Arguments(input=("x",), **changes))


def test_a_changed_evaluation_set_is_noticed(raw, prepared, tmp_path):
    (tmp_path / "sets").mkdir()
    (tmp_path / "sets/a.txt").write_text(" ".join(words(20)))
    values = {"vocab_size": 320, "workers": 1, "decontaminate": f"{tmp_path}/sets"}
    prepare.prepare(tmp_path / "out", f"{raw['root']}/train.jsonl", **values)
    prepare.prepare(tmp_path / "out", f"{raw['root']}/train.jsonl", **values)
    (tmp_path / "sets/b.txt").write_text(" ".join(words(20)))
    with pytest.raises(UserError, match="b.txt is new"):
        prepare.prepare(tmp_path / "out", f"{raw['root']}/train.jsonl", **values)


def test_evaluation_folders_may_be_separated_by_commas_or_given_one_by_one():
    assert arguments.split_at_commas(("a,b", "c")) == ["a", "b", "c"]
    assert arguments.split_at_commas("a, b") == ["a", "b"]


def test_a_document_and_its_words_are_hashed_once_for_all_filters(monkeypatch):
    calls = []
    plain = ngrams.words_of
    monkeypatch.setattr(ngrams, "words_of", lambda text: calls.append(text) or plain(text))
    cleaner = driver.clean_stage.Cleaner(driver.clean_stage.Limits(max_symbols=0.9, max_repetition=5.0, max_word_characters=30))
    assert cleaner("some text") == ""
    assert calls.count("some text") == 1
