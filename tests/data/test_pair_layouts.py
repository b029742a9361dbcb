"""Pairs as the field stores them: five layouts of one truth, files of sources, scores, and what is drawn from long lists."""

import json
import pathlib
import shutil
from collections import Counter

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from conftest import recipe, shrink
from etils import epath
from test_pairs import write

from contrastive_jax.config import UserError, default_config
from contrastive_jax.data import pipeline, prepared, spans, tokenizer
from contrastive_jax.data.preparation import prepare
from contrastive_jax.data.preparation.arguments import Arguments
from contrastive_jax.data.raw import by_id
from contrastive_jax.training import loop

QUERIES = [f"how many cats, {i}" for i in range(60)]
POSITIVES = [[f"answer {i} {j}" for j in range(1 + i % 2)] for i in range(60)]
NEGATIVES = [[f"wrong {i} {j}" for j in range(3 + i % 2)] for i in range(60)]
SCORES = [[0.9 - 0.1 * j for j in range(1 + i % 2)] + [0.5 - 0.1 * j for j in range(3 + i % 2)] for i in range(60)]
TEXTS = [*zip(QUERIES, POSITIVES, NEGATIVES, SCORES, strict=True)]
PLAIN = {"vocab_size": 300, "workers": 1, "validation_fraction": 0.2}


def layout(folder: pathlib.Path, name: str) -> str:
    """Writes the first positive and two negatives of each query in a layout; returns the value of --pairs."""
    folder.mkdir()
    corpus, rows = [], []
    for i, (query, positives, negatives, _) in enumerate(TEXTS):
        positive, wrong = positives[0], negatives[:2]
        if name == "columns":
            rows.append({"anchor": query, "positive": positive} | {f"negative_{j + 1}": x for j, x in enumerate(wrong)})
        elif name == "documents":
            rows.append({"query": query, "document": positive, "negative": wrong[0], "negative_1": wrong[1]})
        elif name == "lists":
            rows.append({"query": query, "pos": [positive], "neg": wrong})
        elif name == "passages":
            title, _, text = positive.partition(" ")
            rows.append(
                {"query_id": f"q{i}", "query": query, "positive_passages": [{"docid": "1", "title": title, "text": text}]}
            )
            rows[-1]["negative_passages"] = [{"docid": "2", "text": x} for x in wrong]
        else:
            ids = [f"d{i}.{j}" for j in range(3)]
            corpus += [{"docid": x, "text": text} for x, text in zip(ids, [positive, *wrong], strict=True)]
            rows.append({"query_id": f"q{i}"})
            if name == "later passages":
                rows[-1] |= {"query_text": query, "positive_document_ids": ids[:1], "negative_document_ids": ids[1:]}
            else:
                rows[-1] |= {"document_ids": ids}
    suffix = {"columns": ".parquet", "lists": ".jsonl.zst", "passages": ".jsonl.gz"}.get(name, ".jsonl")
    write(folder / f"train{suffix}", rows)
    lines = ["[quiz]", f'files = "train{suffix}"']
    if corpus:
        write(folder / "corpus.parquet", corpus)
        lines.append('documents = "corpus.parquet"')
    if name == "ids":
        write(folder / "queries.jsonl.gz", [{"_id": f"q{i}", "text": query} for i, query in enumerate(QUERIES)])
        lines.append('queries = "queries.*"')
    (folder / "pairs.toml").write_text("\n".join(lines))
    return str(folder / "pairs.toml")


def test_every_layout_of_one_truth_has_one_content(tmp_path: pathlib.Path) -> None:
    hashes = {}
    for name in ("columns", "documents", "lists", "passages", "later passages", "ids"):
        manifest = prepare.prepare(tmp_path / f"{name} out", pairs=layout(tmp_path / name, name), **PLAIN)
        assert (manifest["fields"], manifest["hard_negatives"], manifest["domains"]) == (4, 2, ["quiz"])
        hashes[name] = manifest["content_hash"]
    assert len(set(hashes.values())) == 1, hashes
    assert {*read(tmp_path / "ids out")} == {(q, p[0], *n[:2]) for q, p, n, _ in TEXTS}


def read(folder: pathlib.Path) -> list[tuple[str, ...]]:
    """The texts of all pairs of a prepared dataset."""
    words, found = tokenizer.load(folder), []
    for split in ("train", "validation"):
        records = prepared.open_split(folder, split)
        for ids in records.read_records(range(len(records))).token_lists():
            text, end = [], []
            for token in ids:
                if token == words.reserved["eos"]:
                    text.append(words.decode(end))
                    end = []
                else:
                    end.append(token)
            found.append(tuple(text))
    return found


def lists(folder: pathlib.Path, name: str = "scored.jsonl") -> pathlib.Path:
    rows = []
    for query, positives, negatives, scores in TEXTS:
        rows.append({"query": query, "pos": positives, "neg": negatives, "prompt": "Find: "})
        rows[-1] |= {"pos_scores": scores[: len(positives)], "neg_scores": scores[len(positives) :]}
    return write(folder / name, rows)


def test_positives_and_negatives_are_drawn_with_their_scores(tmp_path: pathlib.Path) -> None:
    manifest = prepare.prepare(tmp_path / "out", pairs=str(lists(tmp_path)), **PLAIN)
    assert (manifest["fields"], manifest["hard_negatives"]) == (5, 3) and manifest["numbers"][-1] == "scores"
    config, words = default_config().data, tokenizer.load(tmp_path / "out")
    config.update(dir=str(tmp_path / "out"), batch_size=16, length=64, max_span=62, sampler="fields", views=4, hard_negatives=2)
    records, drawn = prepared.open_split(config.dir, "train"), Counter()
    scored = {f"Find: {q}": dict(zip(p + n, map(np.float32, s), strict=True)) for q, p, n, s in TEXTS}
    batches = pipeline.batches(records, config, seed=0)
    for _ in range(60):
        batch = next(batches)
        assert batch.scores.shape == (16, 3) and batch.scores.dtype == np.float32
        for rows, scores in zip(batch.tokens[:, :, 0], batch.scores, strict=True):
            query, *documents = (words.decode(row.tolist()) for row in rows)
            assert [scored[query][document] for document in documents] == scores.tolist()
            assert [document.split()[0] for document in documents] == ["answer", "wrong", "wrong"]
            drawn.update((query, document) for document in documents)
            assert len(set(documents)) == 3
    for query, documents in scored.items():
        seen = {document: drawn[query, document] for document in documents}
        if sum(seen.values()):  # of the training split: each is drawn about equally often
            for word in ("answer", "wrong"):
                counts = [count for document, count in seen.items() if document.startswith(word)]
                expected = sum(counts) / len(counts)
                assert all(abs(count - expected) < 5 * expected**0.5 for count in counts), seen
    again = next(pipeline.batches(records, config, 0, np.arange(8, 16), start=3))
    whole = next(pipeline.batches(records, config, 0, start=3))
    np.testing.assert_array_equal(again.scores, whole.scores[8:])
    for changes, message in (
        ({"hard_negatives": 4, "views": 5}, "hard_negatives=4: some pairs of config.data.dir have 3"),
        ({"hard_negatives": 1, "views": 5}, "views=5: the pairs of config.data.dir have 1 positives; set config.data.hard_neg"),
    ):
        config.update(changes)
        with pytest.raises(UserError, match=message):
            pipeline.open_stream(records, config, 0)


def test_pairs_without_scores_or_of_an_earlier_version_are_refused(tmp_path: pathlib.Path, dataset: pathlib.Path) -> None:
    config = shrink(recipe("finetune"), dataset)
    config.objective.extra = (("kl", 1.0),)
    with pytest.raises(UserError, match=r"config.objective: 'kl': the pairs of config.data.dir=.* have no scores"):
        loop.set_up(config, epath.Path(tmp_path / "run"))
    old = shutil.copytree(dataset / "pairs", tmp_path / "old")
    manifest = json.loads((old / "manifest.json").read_text())
    del manifest["numbers"]
    (old / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"manifest.json: pairs of an earlier version, .*; prepare the data again"):
        prepared.load_manifest(old)


def test_pairs_with_too_few_negatives_are_left_out_or_refused_in_training(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    rows = [{"query": q, "pos": p, "neg": n[: i % 4]} for i, (q, p, n, _) in enumerate(TEXTS)]  # 0 to 3 negatives
    pairs = str(write(tmp_path / "mined.jsonl", rows))
    manifest = prepare.prepare(tmp_path / "enough", pairs=pairs, min_negatives=2, **PLAIN)
    assert sum(split["records"] for split in manifest["splits"].values()) == 30
    assert (manifest["fields"], manifest["hard_negatives"]) == (4, 2)
    config = default_config().data
    config.update(dir=str(tmp_path / "all"), batch_size=4, length=64, max_span=62, sampler="fields", views=3, hard_negatives=1)
    prepare.prepare(tmp_path / "all", pairs=pairs, **PLAIN)
    with pytest.raises(
        UserError, match=r"views=3: some pairs .* have 2 texts; lower it, or prepare them with --min_negatives=1"
    ):
        pipeline.open_stream(prepared.open_split(config.dir, "train"), config, 0)

    (tmp_path / "pairs.toml").write_text('[mined]\nfiles = "mined.jsonl"')
    with pytest.raises(UserError, match=r"--min_negatives=2: write min_negatives for each source of .*pairs.toml"):
        prepare.prepare(tmp_path / "toml", pairs=str(tmp_path / "pairs.toml"), min_negatives=2, **PLAIN)

    path = tmp_path / "all/manifest.json"  # as a version wrote it that had no such flag
    manifest = json.loads(path.read_text())
    del manifest["arguments"]["min_negatives"]
    path.write_text(json.dumps(manifest))
    prepare.prepare(tmp_path / "all", pairs=pairs, **PLAIN)
    assert "is already prepared with these arguments" in capsys.readouterr().err


def test_numbers_are_drawn_without_repeats_and_each_set_equally() -> None:
    uniform = np.random.default_rng(0).random((20_000, 2), np.float32)
    drawn = spans.draw(uniform, np.full((20_000, 1), 4))
    counts = Counter(map(tuple, drawn.tolist()))
    assert sorted(counts) == [(i, j) for i in range(4) for j in range(i + 1, 4)]
    assert all(abs(count - 20_000 / 6) < 5 * (20_000 / 6) ** 0.5 for count in counts.values())
    np.testing.assert_array_equal(spans.draw(uniform[:5], np.full((5, 1), 2)), [[0, 1]] * 5)


def test_a_file_of_sources_says_prompts_lengths_and_which_negatives_are_kept(tmp_path: pathlib.Path) -> None:
    lists(tmp_path)
    write(tmp_path / "topics.jsonl", [{"query": f"text {i}", "document": f"topic {i}"} for i in range(40)])
    (tmp_path / "pairs.toml").write_text(
        """
        [scored]
        files = ["scored.jsonl"]
        query_prompt = "query: "
        document_prompt = "passage: "
        document_tokens = 6
        min_negatives = 3
        max_negatives = 3
        relative_margin = 0.5

        [topics]
        files = "topics.jsonl"
        in_batch = false
        """
    )
    options = PLAIN | {"vocab_size": 304}
    manifest = prepare.prepare(tmp_path / "out", pairs=str(tmp_path / "pairs.toml"), **options)
    assert manifest["domains"] == ["scored", "topics"] and "hard_negatives" not in manifest
    prompts = {"query_prompt": "query: ", "document_prompt": "passage: ", "in_batch": True}
    assert manifest["sources"]["scored"] == prompts and not manifest["sources"]["topics"]["in_batch"]
    words, found = tokenizer.load(tmp_path / "out"), {texts[0]: texts[1:] for texts in read(tmp_path / "out")}
    # Scores of 0.4 and less stay: half of 0.9, or of 0.8, is 0.45 or 0.4. Every other query then has two.
    kept = [(q, p, n[1:4]) for q, p, n, s in TEXTS if len(n) > 3]
    assert len([query for query in found if query.startswith("query: ")]) == len(kept) == 30
    assert sum(manifest["rejects"]["too few hard negatives"].values()) == 30
    for query, positives, negatives in kept:
        documents = found[f"query: Find: {query}"]
        expected = [words.encode(f"passage: {text}")[:6] for text in (*positives, *negatives)]
        assert [words.encode(text) for text in documents] == [words.encode(words.decode(ids)) for ids in expected]
    records = prepared.open_split(tmp_path / "out", "train")
    assert records.alone == {1}
    config = default_config().data
    config.update(dir=str(tmp_path / "out"), batch_size=8, length=64, max_span=62, sampler="fields")
    with pytest.raises(UserError, match=r"config.data.one_source='': 'topics' has no in-batch negatives; set it to 'domain'"):
        pipeline.open_stream(records, config, 0)
    config.one_source = "domain"
    batches = pipeline.batches(records, config, 0)
    documents = [next(batches).document for _ in range(8)]
    assert {int(each[0]) == -3 for each in documents} == {True, False}
    assert all((each == -3).all() or (each >= 0).all() for each in documents)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no source; write a table"),
        ("[a", "it has a table .NAME. for each source"),
        ("[a]\nquery_prompt = 'x'", r"\[a\] has no files"),
        ("[a]\nfiles = 'x'\nprompt = 'y'", r"\[a\] prompt: no such key; there are files, query_prompt"),
        ("[a]\nfiles = 'x'\nquery_tokens = '5'", r"\[a\] query_tokens = '5': must be a whole number"),
        ("[a]\nfiles = 'x'\nin_batch = 1", r"\[a\] in_batch = 1: must be true or false"),
        ("[a]\nfiles = 'x'\nmax_negatives = -1", r"\[a\] max_negatives = -1: must be at least 0"),
        ("[a]\nfiles = 'none-*.jsonl'", "no file matches"),
        ('["é"]\nfiles = "x"', "can't decode byte 0xe9 .*; it has a table"),
    ],
)
def test_a_wrong_file_of_sources_is_one_line(tmp_path: pathlib.Path, text: str, message: str) -> None:
    (tmp_path / "pairs.toml").write_bytes(text.encode("latin-1"))  # TOML is UTF-8
    with pytest.raises(UserError, match=message):
        prepare.prepare(tmp_path / "out", pairs=str(tmp_path / "pairs.toml"), **PLAIN)


def test_ids_without_texts_and_damaged_files_are_one_line(tmp_path: pathlib.Path) -> None:
    source = layout(tmp_path / "ids", "ids")
    corpus = pyarrow.parquet.read_table(tmp_path / "ids/corpus.parquet")
    write(tmp_path / "ids/corpus.parquet", corpus.to_pylist()[:-1])
    with pytest.raises(UserError, match=r"train.jsonl:60: no text of a pair: no documents with the id d59.2"):
        prepare.prepare(tmp_path / "out", pairs=source, **PLAIN)
    bare = str(tmp_path / "ids/train.jsonl")
    with pytest.raises(UserError, match="no pair in its first lines .*say where their texts are with `documents`"):
        prepare.prepare(tmp_path / "bare", pairs=bare, **PLAIN)
    damaged = (tmp_path / "ids/corpus.parquet").read_bytes()
    (tmp_path / "ids/corpus.parquet").write_bytes(damaged[: len(damaged) // 2])
    with pytest.raises(UserError, match="corpus.parquet: damaged file"):
        prepare.prepare(tmp_path / "damaged", pairs=source, **PLAIN)
    (tmp_path / "ids/train.jsonl").unlink()
    (tmp_path / "ids/train.parquet").write_bytes(damaged[: len(damaged) // 2])
    with pytest.raises(UserError, match="train.parquet.*damaged file"):
        prepare.prepare(tmp_path / "other", pairs=str(tmp_path / "ids/train.parquet"), **PLAIN)
    write(tmp_path / "bad.jsonl", [{"query": "q", "pos": ["a"], "neg": ["b"], "neg_scores": [1, 2]}])
    with pytest.raises(UserError, match="neg_scores has not one number for each of 1 documents"):
        prepare.prepare(tmp_path / "scores", pairs=str(tmp_path / "bad.jsonl"), **PLAIN)


def test_texts_are_found_by_their_ids_on_disk(tmp_path: pathlib.Path) -> None:
    texts = {f"id {i}": f"text {i} é" for i in range(2000)} | {"": "of no name"}
    assert by_id.write(tmp_path / "texts", texts.items()) == 2001
    found = by_id.open_texts(str(tmp_path / "texts"))
    assert all(found.get(key) == text for key, text in texts.items())
    assert found.get("id 2000") is None
    with pytest.raises(UserError, match="x: two texts have this id"):
        by_id.write(tmp_path / "twice", [("x", "a"), ("y", "b"), ("x", "c")])
    by_id.write(tmp_path / "none", [])
    assert by_id.Texts(tmp_path / "none").get("x") is None


def test_an_interrupted_prepare_of_ids_goes_on(tmp_path: pathlib.Path) -> None:
    source = layout(tmp_path / "ids", "ids")
    first = prepare.prepare(tmp_path / "out", pairs=source, **PLAIN)
    assert prepare.prepare(tmp_path / "out", pairs=source, **PLAIN) == first
    rows = [json.loads(line) for line in (tmp_path / "ids/train.jsonl").read_text().splitlines()]
    write(tmp_path / "ids/corpus.parquet", [{"docid": x, "text": f"new {x}"} for row in rows for x in row["document_ids"]])
    with pytest.raises(UserError, match="is of other input: the input .*corpus.parquet has changed"):
        prepare.prepare(tmp_path / "out", pairs=source, **PLAIN)


def test_sources_with_different_prompts_name_them() -> None:
    def prompts(*of_queries: str) -> dict:
        sources = {f"s{i}": {"query_prompt": x, "document_prompt": "d: "} for i, x in enumerate(of_queries)}
        return prepared.prompts_of({"sources": sources})

    assert prompts("q: ", "q: ") == {"query": "q: ", "document": "d: "}
    assert prompts("q: ", "find: ") == {"s0_query": "q: ", "s1_query": "find: ", "document": "d: "}
    assert prompts("", "") == {"document": "d: "} and prepared.prompts_of({}) == {}


def test_a_limit_is_that_of_all_sources_together(tmp_path: pathlib.Path) -> None:
    for name in ("one", "two", "three"):
        write(tmp_path / f"{name}.jsonl", [{"query": f"{name} {i:02}", "document": f"text {i:02}"} for i in range(50)])
    (tmp_path / "pairs.toml").write_text("".join(f"[{name}]\nfiles = '{name}.jsonl'\n" for name in ("one", "two")))
    arguments = Arguments(pairs=(f"{tmp_path}/pairs.toml", f"{tmp_path}/three.jsonl@5"), limit=30)
    shards = prepare.find_source(arguments).shards
    assert [(shard.order, shard.domain) for shard in shards] == [(0, "one"), (1, "two"), (2, "")]
    assert [shard.max_lines for shard in shards[:2]] == [9, 10] and shards[2].max_lines == 5
    held_out = prepare.find_source(arguments._replace(validation=(f"{tmp_path}/t*.jsonl",), pairs=(f"{tmp_path}/one.jsonl",)))
    limits = {
        split: [shard.max_lines for shard in held_out.shards if shard.split == split] for split in ("train", "validation")
    }
    assert {split: sum(of_split) for split, of_split in limits.items()} == {"train": 30, "validation": 30}


def test_texts_of_ids_are_those_of_this_call(tmp_path: pathlib.Path) -> None:
    """A process keeps texts open; a second call in it read those of the first."""
    rows = [{"query_text": f"question {i}", "positive_document_ids": [f"d{i}"]} for i in range(40)]
    write(tmp_path / "train.jsonl", rows)
    (tmp_path / "pairs.toml").write_text('[quiz]\nfiles = "train.jsonl"\ndocuments = "corpus.jsonl"')
    for word in ("old", "newer"):
        write(tmp_path / "corpus.jsonl", [{"_id": f"d{i}", "text": f"{word} answer {i}"} for i in range(40)])
        prepare.prepare(tmp_path / "out", pairs=str(tmp_path / "pairs.toml"), overwrite=True, **PLAIN)
        assert {*read(tmp_path / "out")} == {(f"question {i}", f"{word} answer {i}") for i in range(40)}
    assert not (tmp_path / "out/.work").exists()
