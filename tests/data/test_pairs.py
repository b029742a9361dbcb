"""Pairs of texts: prepared from every kind of file, cut at their fields, with their labels in the batch."""

import csv
import datetime
import decimal
import gzip
import io
import json
import math
import pathlib
import re

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tokenizers
import zstandard

from contrastive_jax.config import UserError, default_config
from contrastive_jax.data import pipeline, prepared, tokenizer
from contrastive_jax.data.preparation import prepare
from contrastive_jax.data.raw import pairs, sources
from contrastive_jax.data.raw.sources import Document, Part, Shard
from contrastive_jax.evals import query_key

ROWS = [
    {"query": f"how many, {i} or {i * i}", "document": f'a "{i}" \t of {i + 1} cats', "negative": f"dog {i}", "score": i / 7}
    for i in range(60)
]


def write(path: pathlib.Path, rows: list[dict]) -> pathlib.Path:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=20)
        return path
    if ".csv" in path.name:
        file = io.StringIO()
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
        text = file.getvalue()
    elif ".tsv" in path.name:
        lines = [[str(value).replace("\t", " ") for value in row.values()] for row in rows]
        text = "".join("\t".join(line) + "\n" for line in [[*rows[0]], *lines])
    else:
        text = "".join(json.dumps(row) + "\n" for row in rows)
    compress = {".gz": gzip.compress, ".zst": zstandard.compress}.get(path.suffix, bytes)
    path.write_bytes(compress(text.encode()))
    return path


def make(folder: pathlib.Path, rows: list[dict], name: str = "pairs.jsonl", **arguments: object) -> dict:
    path = write(folder / name, rows)
    more = {"vocab_size": 300, "record_tokens": 64, "workers": 1, "validation_fraction": 0.2} | arguments
    return prepare.prepare(folder / "out", pairs=str(path), **more)


def read(folder: pathlib.Path, split: str = "train") -> list[tuple[tuple[str, ...], float]]:
    """The texts and the label of each pair of a prepared dataset, in any order."""
    records, words = prepared.open_split(folder / "out", split), tokenizer.load(folder / "out")
    batch = records.read_records(range(len(records)))
    found = []
    for ids, label in zip(batch.token_lists(), batch.label.tolist(), strict=True):
        ends = [i for i, token in enumerate(ids) if token == words.reserved["eos"]]
        assert ends[-1] == len(ids) - 1
        begins = [0, *(i + 1 for i in ends)]
        found.append((tuple(words.decode(ids[a:b]) for a, b in zip(begins, ends, strict=False)), label))
    return found


@pytest.mark.parametrize("name", ["p.jsonl", "p.jsonl.gz", "p.jsonl.zst", "p.tsv", "p.csv", "p.csv.gz", "p.parquet"])
def test_row55_all_fields_and_labels_of_a_file_come_back(tmp_path: pathlib.Path, name: str) -> None:
    manifest = make(tmp_path, ROWS, name)
    assert manifest["fields"] == 3
    tab = " " if "tsv" in name else "\t"
    expected = {(row["query"], row["document"].replace("\t", tab), row["negative"]): np.float32(row["score"]) for row in ROWS}
    found = read(tmp_path) + read(tmp_path, "validation")
    assert dict(found) == expected and len(found) == len(ROWS)  # float32, bit for bit
    lowest, highest = manifest["labels"]
    assert 0 <= lowest < highest <= 59 / 7 + 1e-6


def test_row55_a_table_without_names_and_classes_with_names(tmp_path: pathlib.Path) -> None:
    names = ["entailment", "neutral", "contradiction"]
    path = tmp_path / "nli.tsv"
    path.write_text("".join(f"{names[i % 3]}\tpremise {i}\thypothesis {i}\n" for i in range(30)))
    options = {"text_field": "2,3", "label_field": "1", "labels": ",".join(names)}
    more = {"vocab_size": 300, "workers": 1, "validation_fraction": 0.2} | options
    manifest = prepare.prepare(tmp_path / "out", pairs=str(path), **more)
    assert manifest["fields"] == 2 and manifest["labels"] == [0.0, 2.0]
    found = dict(read(tmp_path) + read(tmp_path, "validation"))
    assert found == {(f"premise {i}", f"hypothesis {i}"): i % 3 for i in range(30)}
    with pytest.raises(UserError, match="label neutral is not among --labels"):
        prepare.prepare(tmp_path / "other", pairs=str(path), **more | {"labels": "entailment,contradiction"})
    with pytest.raises(UserError, match=r"label entailment is no number \(--labels=NAME,NAME names the classes\)"):
        prepare.prepare(tmp_path / "unnamed", pairs=str(path), **more | {"labels": ""})


def test_row55_what_is_no_pair_stops_prepare_and_a_label_may_be_missing(tmp_path: pathlib.Path) -> None:
    rows = [{"text1": f"a {i}", "text2": f"b {i}"} | ({"label": i % 2} if i % 4 else {}) for i in range(40)]
    make(tmp_path, rows)
    found = read(tmp_path) + read(tmp_path, "validation")
    assert sum(math.isnan(label) for _, label in found) == 10
    for bad, reason in (({"text1": "alone"}, "no text of a pair: 0 of 2 fields"), ({"text1": "a", "text2": 3}, "not a string")):
        with pytest.raises(UserError, match=rf"bad.jsonl:41: .*{reason}"):
            prepare.prepare(
                tmp_path / "other", pairs=str(write(tmp_path / "bad.jsonl", [*rows, bad])), overwrite=True, workers=1
            )
    with pytest.raises(UserError, match=r"--pairs=.*: no pair in its first lines .*--text_field=A,B names the fields"):
        prepare.prepare(tmp_path / "no", pairs=str(write(tmp_path / "no.jsonl", [{"a": "x", "b": "y"}])), workers=1)
    with pytest.raises(UserError, match="--label_field, --labels and --min_negatives go with --pairs"):
        prepare.prepare(tmp_path / "other", input="x.jsonl", label_field="y")


def test_labels_are_numbers_or_names() -> None:
    assert [pairs.number_of(label, ()) for label in (True, 3, "0.1", 2.5)] == [1, 3, np.float32(0.1), 2.5]
    assert [pairs.number_of(label, ("false", "true")) for label in (True, "true", False)] == [1, 1, 0]
    assert math.isnan(pairs.number_of(None, ())) and math.isnan(pairs.number_of("", ("a",)))
    assert pairs.number_of(decimal.Decimal("0.1"), ()) == np.float32(0.1)
    assert pairs.number_of(decimal.Decimal(1), ("0", "1")) == 1
    for label, name in ((datetime.date(2024, 1, 31), "2024-01-31"), (b"ab", "b'ab'"), ([1], r"\[1\]"), ("many", "many")):
        with pytest.raises(pairs.NoPairError, match=f"label {name} is no number"):
            pairs.number_of(label, ())


def test_row55_batches_have_the_fields_as_views_and_the_label_of_each_pair(tmp_path: pathlib.Path) -> None:
    make(tmp_path, ROWS, leak_tokens=30)
    words, config = tokenizer.load(tmp_path / "out"), default_config().data
    config.update(dir=str(tmp_path / "out"), batch_size=16, length=80, max_span=64, sampler="fields", views=3)
    config.hard_negatives = 1
    records = prepared.open_split(config.dir, "train")
    expected = {row["query"]: (row["document"], row["negative"], np.float32(row["score"])) for row in ROWS}
    batches = pipeline.batches(records, config, seed=0)
    first = [next(batches) for _ in range(5)]
    for batch in first:
        assert batch.tokens.shape == (16, 3, 1, 80) and batch.label.dtype == np.float32
        for tokens, label in zip(batch.tokens[:, :, 0], batch.label, strict=True):
            query, *others = (words.decode(row.tolist()) for row in tokens)
            assert (*others, label) == expected[query]
            assert (tokens[:, 0] == [words.reserved["x_open"], *[words.reserved["y_open"]] * 2]).all()
        queries = {words.decode(row.tolist()) for row in batch.tokens[:, 0, 0]}
        assert len(set(batch.document.tolist())) == len(queries)  # a pair is a document of its own
    resumed = next(pipeline.batches(records, config, seed=0, start=3))
    mine = next(pipeline.batches(records, config, 0, np.arange(8, 16), start=3))
    for whole, again, part in zip(first[3], resumed, mine, strict=True):
        np.testing.assert_array_equal(whole, again)
        np.testing.assert_array_equal(whole[8:], part)
    config.update(max_span=4, views=2, hard_negatives=0)
    cut = next(pipeline.batches(records, config, seed=0))
    assert cut.tokens.shape[1] == 2 and ((cut.segment > 0).sum(-1) <= 6).all()
    config.update(pack_pairs=4, pack_rows=2)
    packed = next(pipeline.batches(records, config, seed=0))
    np.testing.assert_array_equal(packed.label, cut.label)


def test_row55_a_sampler_that_does_not_fit_the_data_is_refused(dataset: pathlib.Path) -> None:
    config = default_config().data
    config.update(dir=str(dataset / "pairs"), batch_size=16, length=24, min_span=6, max_span=20)
    of_pairs, of_documents = (prepared.open_split(path, "train") for path in (dataset / "pairs", dataset))
    with pytest.raises(UserError, match=r"config.data.sampler='neighbours': config.data.dir holds pairs; set it to 'fields'"):
        pipeline.open_stream(of_pairs, config, 0)
    config.update(sampler="fields", views=4)
    with pytest.raises(UserError, match=r"config.data.views=4: some pairs of config.data.dir have 3 texts; lower it"):
        pipeline.open_stream(of_pairs, config, 0)
    with pytest.raises(UserError, match=r"holds no pairs; make them with `prepare --pairs=GLOB`"):
        pipeline.open_stream(of_documents, config, 0)


def test_row55_the_query_key_test_of_pairs_is_from_the_first_text_to_the_second(tmp_path: pathlib.Path) -> None:
    make(tmp_path, ROWS, validation_fraction=0.5)
    words, config = tokenizer.load(tmp_path / "out"), default_config()
    config.eval.update(pairs=20, span=62)
    config.data.length = 64
    records = prepared.open_split(tmp_path / "out", "validation")
    found = query_key.make_pairs(records, config.eval, config.data)
    expected = {row["query"]: row["document"] for row in ROWS}
    for (query, document), spans in zip(found.tokens, found.spans, strict=True):
        assert words.decode(document.tolist()) == expected[words.decode(query.tolist())]
        assert words.decode(spans[0].tolist()) in expected
    config.eval.pairs = 61
    with pytest.raises(UserError, match=r"config.eval.pairs=61: only \d+ held-out records have two texts"):
        query_key.make_pairs(records, config.eval, config.data)


def rows_of_csv(folder: pathlib.Path, content: bytes) -> list[tuple[str, ...] | str]:
    """The texts of each row of a table of queries and documents, or why there are none."""
    path = folder / "rows.csv"
    path.write_bytes(content)
    shard = Shard(str(path), 0, "", size=len(content), version=str(len(content)), pair=pairs.PairFields())
    items = sources.read(Part(shard, 0, len(content), 1, len(content), True))
    return [item.pair.texts if isinstance(item, Document) and item.pair else item.reason for item in items]


def test_quotes_and_long_values_of_a_csv_are_read(tmp_path: pathlib.Path) -> None:
    expected = [("a, b", 'the "c"'), ("5 inch", '5" wide'), ("x" * 200_000, "é"), ("", "")]
    rows = b'"a, b","the ""c"""\r\n5 inch,5" wide\n' + f'{"x" * 200_000},"\u00e9"\n"",\n'.encode()
    assert rows_of_csv(tmp_path, b"query,document\n" + rows) == [*expected[:3], "empty text"]


@pytest.mark.parametrize("row", [b'one,"two\nlines"\n', b"a,b\rc,d\n", b'"a"b,c\n'])
def test_what_is_no_row_of_csv_is_a_bad_line(tmp_path: pathlib.Path, row: bytes) -> None:
    """A quoted line break made two rows of one, neither of which the file has."""
    good, bad, *_, last = rows_of_csv(tmp_path, b"query,document\nq,d\n" + row + b"r,e\n")
    assert (good, last) == (("q", "d"), ("r", "e"))
    assert bad.startswith("not a row of CSV: ") and bad.endswith("; a value may have no line breaks")
    (whole,) = rows_of_csv(tmp_path, b'query,"document\nq,d\n')
    assert whole.startswith("the first line is not a row of CSV: ")


def test_a_pair_with_a_text_of_no_tokens_is_left_out(tmp_path: pathlib.Path) -> None:
    """BERT's normaliser drops characters of no width: the text has none of its own, and training could not cut a span."""
    words = {word for row in ROWS for word in re.findall(r"\w+", " ".join(map(str, row.values())))}
    made = tokenizers.Tokenizer(
        tokenizers.models.WordPiece({x: i for i, x in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *sorted(words)])})
    )
    made.normalizer, made.pre_tokenizer = tokenizers.normalizers.BertNormalizer(), tokenizers.pre_tokenizers.BertPreTokenizer()
    made.save(str(tmp_path / "tokenizer.json"))
    nothing = "\u200b"
    empty = [ROWS[0] | {name: nothing} for name in ("query", "document", "negative")] + [
        ROWS[1] | {"document": nothing, "negative": nothing}
    ]
    manifest = make(tmp_path, [*ROWS, *empty], tokenizer=str(tmp_path / "tokenizer.json"))
    assert sum(split["records"] for split in manifest["splits"].values()) == len(ROWS)
    assert [*manifest["rejects"]] == ["empty text"] and sum(manifest["rejects"]["empty text"].values()) == len(empty)
    texts = [texts for split in ("train", "validation") for texts, _ in read(tmp_path, split)]
    assert len(texts) == len(ROWS) and all(len(each) == 3 and all(each) for each in texts)
    with pytest.raises(UserError, match="no document for the train split"):
        make(tmp_path, empty, tokenizer=str(tmp_path / "tokenizer.json"), overwrite=True, validation_fraction=0.5)


def test_labels_of_a_parquet_file_may_be_decimals(tmp_path: pathlib.Path) -> None:
    scores = {row["query"]: decimal.Decimal(i) / 4 for i, row in enumerate(ROWS)}
    make(tmp_path, [row | {"score": scores[row["query"]]} for row in ROWS], "scores.parquet")
    found = read(tmp_path) + read(tmp_path, "validation")
    assert {texts[0]: label for texts, label in found} == {query: float(score) for query, score in scores.items()}
