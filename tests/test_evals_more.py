"""Evaluations by hand-made cases: word similarity, code search, fine-tuning, MTEB's own tasks."""

import gzip
import json
import pathlib
import sys
from collections.abc import Sequence

import jax
import numpy as np
import pytest
from etils import epath
from ml_collections import ConfigDict
from test_text_model import write_folder

from configs import base
from contrastive_jax import finetune, mteb_model, sharding, text_model
from contrastive_jax.evals import codesearch, sts, wordsim

WORDS = [chr(ord("a") + i) for i in range(20)]
LENGTH = 16


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("plain.tsv", "tiger\tcat\t7.35\ncar\tbook\t1\n\nsun\tmoon\t5\n"),
        ("wordsim.csv", "\ufeffWord 1,Word 2,Human (mean),1,2\ntiger,cat,7.35,9,7\ncar,book,1,1,2\nsun,moon,5,4,4\n"),
        ("simlex.tsv", "word1\tword2\tPOS\tSimLex999\ntiger\tcat\tN\t7.35\ncar\tbook\tN\t1\nsun\tmoon\tN\t5\n"),
        ("quoted.csv", '"tiger", cat ,7.35\r\ncar,book,1\r\nsun,moon,5\r\n'),
    ],
)
def test_word_similarities_are_read(name: str, text: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / name).write_text(text)
    found = wordsim.read(epath.Path(tmp_path / name))
    assert found.score.tolist() == [7.35, 1, 5]
    assert (found.first, found.second) == (["tiger", "car", "sun"], ["cat", "book", "moon"])


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a,b,1\nc,d\ne,f,2\n", 2),
        ("a,b,1\nc,d,much\ne,f,2\n", 2),
        ("a b 1\n", 1),
        ("a,b,1\nc,d,nan\n", 2),
        ("x,y,z\na,b,c\n", 2),
    ],
)
def test_a_line_without_a_score_is_named(text: str, line: int, tmp_path: pathlib.Path) -> None:
    (tmp_path / "words.csv").write_text(text)
    with pytest.raises(ValueError, match=rf"words.csv:{line}: not word, word, score between tabs or commas"):
        wordsim.read(epath.Path(tmp_path / "words.csv"))


def test_word_similarities_are_scored(tmp_path: pathlib.Path) -> None:
    (tmp_path / "one.csv").write_text("w1,w2,score\na,b,1\na,c,2\na,d,3\na,e,4\n")
    (tmp_path / "two.tsv").write_text("a\tb\t40\na\tc\t30\na\td\t20\na\te\t10\n")
    angles = dict(zip("abcde", [0.0, 0.9, 0.5, 0.7, 0.1], strict=True))  # cosines rank as 1, 3, 2, 4
    encode = sts.cosines(lambda texts: np.array([[np.cos(angles[text]), np.sin(angles[text])] for text in texts]))
    rows = sts.evaluate(encode, epath.Path(tmp_path), wordsim.read, wordsim.PATTERN)
    assert rows.keys() == {"one", "two", "all", "mean"}
    assert rows["one"]["spearman"] == pytest.approx(0.8)  # 1 - 6 · 2 / (4 · 15)
    assert rows["two"]["spearman"] == pytest.approx(-0.8)
    assert rows["mean"]["spearman"] == pytest.approx(0, abs=1e-12)


def write_code(path: pathlib.Path, names: Sequence[str], **more: object) -> None:
    lines = [json.dumps({"docstring": f"doc {name}", "code": f"def {name}"} | more) for name in names]
    text = ("\n".join(lines) + "\n").encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)


def test_reciprocal_ranks_by_hand() -> None:
    scores = np.array([[0.9, 0.1, 0.2], [0.5, 0.4, 0.6], [0.3, 0.7, 0.7]])  # ranks 1, 3, and 2: a tie counts against it
    np.testing.assert_allclose(codesearch.reciprocal_ranks(scores), [1, 1 / 3, 1 / 2])


def test_code_is_searched_in_batches_of_a_thousand(tmp_path: pathlib.Path) -> None:
    calls: list[tuple[str, list[str]]] = []
    names = [f"n{i}" for i in range(2500)]
    write_code(tmp_path / "java_0.jsonl", names[:7], language="java")
    write_code(tmp_path / "python_0.jsonl.gz", names, language="python")
    write_code(tmp_path / "go.jsonl", names[:1], docstring_tokens=["doc", "of"], code_tokens=["func", "x"])

    def encode(texts: list[str], view: int) -> np.ndarray:
        calls.append((texts[0].split()[0], texts))
        numbers = np.array([int(text.split()[1].removeprefix("n")) if text[-1].isdigit() else 0 for text in texts])
        if view == 1 and len(texts) == 7:
            numbers = np.where(numbers == 3, 4, numbers)  # 3 is found by nobody, 4 by two
        return np.stack([np.cos(numbers / 2500), np.sin(numbers / 2500)], axis=1)

    rows = codesearch.evaluate(codesearch.products(encode), epath.Path(tmp_path))
    assert list(rows) == ["go", "java", "python", "mean"]
    assert rows["python"]["mrr"] == rows["go"]["mrr"] == 1
    # The code of 3 lies where that of 4 does: 3 has 2 and both before it or beside it, 4 has two.
    assert rows["java"]["mrr"] == pytest.approx((5 + 1 / 3 + 1 / 2) / 7)
    assert rows["mean"]["mrr"] == pytest.approx(np.mean([row["mrr"] for row in list(rows.values())[:3]]))
    assert [len(texts) for _, texts in calls] == [1, 1, 7, 7, *[1000] * 4]  # what is left of 2,500 is dropped
    assert calls[0][1] == ["doc of"] and calls[1][1] == ["func x"]
    assert len({text for kind, texts in calls[4:] if kind == "doc" for text in texts}) == 2000
    assert codesearch.bm25(["the sum", "a list"], ["sum of all", "list of them"]).argmax(1).tolist() == [0, 1]


def test_bad_code_is_named(tmp_path: pathlib.Path) -> None:
    data = epath.Path(tmp_path)
    with pytest.raises(ValueError, match=r"no .jsonl or .jsonl.gz of docstring and code there"):
        codesearch.evaluate(codesearch.bm25, data)
    for line in ('{"docstring": "a"}', '{"docstring": "a", "code": " "}', "[1]", '{"docstring": "a", "code_tokens": [1]}', "{"):
        (tmp_path / "go.jsonl").write_text('{"docstring": "a", "code": "b"}\n' + line + "\n")
        with pytest.raises(ValueError, match=r"go.jsonl:2: not an object with docstring\(_tokens\) and code\(_tokens\)"):
            codesearch.read(data)
    (tmp_path / "go.jsonl").unlink()
    write_code(tmp_path / "go.jsonl.gz", [f"n{i}" for i in range(100)])
    (tmp_path / "go.jsonl.gz").write_bytes((tmp_path / "go.jsonl.gz").read_bytes()[:-20])
    with pytest.raises(ValueError, match="go.jsonl.gz: damaged"):
        codesearch.read(data)


def tiny(layers: int = 0) -> text_model.TextModel:
    """An encoder of few blocks, with dropout, and its words."""
    config = base.get_config().model
    config.update(num_layers=layers, d_model=16, num_heads=2, num_kv_heads=2, head_dim=8, d_ff=32, dropout=0.1)
    encoder, encode = text_model.encoder_of(config, len(WORDS), LENGTH)
    params = text_model.place(encoder.init(jax.random.key(0)))

    def tokenize(texts: Sequence[str], view: int) -> list[list[int]]:
        return [[WORDS.index(word) for word in text.split()] for text in texts]

    protocol = {"max_tokens": LENGTH}
    return text_model.TextModel(protocol, tokenize, text_model.bind(encode, params), encoder.apply, params)


def write_pairs(path: pathlib.Path, seed: int, count: int, shuffled: bool = False) -> None:
    """Pairs of a few words; the label says whether the second text is of the first half of the words."""
    rng, rows = np.random.default_rng(seed), []
    for _ in range(count):
        half = rng.integers(2)
        first, second = rng.choice(WORDS, rng.integers(1, 16)), rng.choice(WORDS[:10] if half else WORDS[10:], 3)
        label = "yes" if (rng.integers(2) if shuffled else half) else "no"
        rows.append({"premise": " ".join(first), "hypothesis": " ".join(second), "label": label})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def separable(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("separable")
    write_pairs(folder / "train.jsonl", 0, 190)
    write_pairs(folder / "dev.jsonl", 1, 40)
    return folder


FAST = finetune.Recipe(epochs=3, seeds=2, batch_size=16, encoder_rate=3e-3, head_rate=3e-2)


def test_a_separable_task_is_learnt_the_same_way_twice(separable: pathlib.Path) -> None:
    model = tiny()
    before, z = jax.device_get(model.params), model.encode(WORDS)
    rows = finetune.evaluate(model, separable, FAST)
    assert list(rows) == ["majority", "seed 0", "seed 1", "best", "mean", "deviation"]
    assert rows["best"] == rows["mean"] == {"accuracy": 1.0} and rows["deviation"] == {"accuracy": 0.0}
    assert 0.3 < rows["majority"]["accuracy"] < 0.7
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(model.params))
    np.testing.assert_array_equal(model.encode(WORDS), z)


def test_shuffled_labels_give_chance_and_a_seed_gives_the_same_figures(tmp_path: pathlib.Path) -> None:
    write_pairs(tmp_path / "train.jsonl", 0, 100, shuffled=True)
    write_pairs(tmp_path / "validation_matched.jsonl", 1, 80, shuffled=True)
    write_pairs(tmp_path / "validation_mismatched.jsonl", 2, 70, shuffled=True)
    rows = finetune.evaluate(tiny(), tmp_path, FAST._replace(epochs=1))
    assert rows["best"].keys() == {"matched", "mismatched"}
    assert all(0.3 < accuracy < 0.7 for accuracy in rows["mean"].values())
    assert finetune.evaluate(tiny(), tmp_path, FAST._replace(epochs=1)) == rows


def losses(separable: pathlib.Path, recipe: finetune.Recipe, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Of a few steps with dropout."""
    model, found = tiny(layers=1), []
    train = finetune.read(separable)[0]
    labels = np.array([label == "yes" for label in train.labels], np.int32)
    pairs = finetune.Pairs(model.tokenize(train.texts, 0)[:40], model.tokenize(train.second, 0)[:40], labels[:40])
    functions, progress = finetune.make(model, 2, recipe, 12), finetune.Progress(8, 12)
    monkeypatch.setattr(progress, "step", lambda loss: found.append(float(loss)))
    finetune.fine_tune(functions, pairs, {}, recipe, LENGTH, 0, progress)
    return found


def test_rows_are_padded_to_few_lengths_and_the_last_batch_to_its_rows() -> None:
    pairs = finetune.Pairs([[1] * 3, [2] * 17, [3] * 16], [[4], [5] * 33, [6] * 2], np.array([7, 8, 9], np.int32))
    one, two = finetune.batches(pairs, np.array([2, 1, 0]), 2, 4, 40)
    assert one["first"].shape == (4, 32) and one["second"].shape == (4, 40)  # 64 would be more than the model takes
    assert two["first"].shape == two["second"].shape == (4, 16)
    assert one["first_mask"].sum(1).tolist() == [16, 17, 1, 1] and one["second_mask"].sum(1).tolist() == [2, 33, 1, 1]
    assert one["label"].tolist() == [9, 8, 0, 0] and one["weight"].tolist() == [1, 1, 0, 0]
    assert two["label"].tolist() == [7, 0, 0, 0] and two["weight"].tolist() == [1, 0, 0, 0]
    assert two["first"].sum() == 3 and two["second"].sum() == 4


@pytest.mark.slow
def test_one_device_and_eight_train_alike(separable: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = FAST._replace(batch_size=12, epochs=2)  # neither 12 nor 40 - 36 divides over eight devices
    eight = losses(separable, recipe, monkeypatch)
    one = sharding.make_mesh(ConfigDict({"data": 1, "fsdp": 1, "tensor": 1}), jax.devices()[:1])
    monkeypatch.setattr(text_model, "one_axis", lambda: one)
    np.testing.assert_allclose(losses(separable, recipe, monkeypatch), eight, rtol=1e-4)
    assert len(eight) == 8 and eight[0] != eight[4]


def test_bad_pairs_are_named(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(message: str) -> None:
        with pytest.raises(ValueError, match=message):
            finetune.read(epath.Path(tmp_path))

    write_pairs(tmp_path / "train.jsonl", 0, 5)
    refused(r"needs train and validation \(or dev\), as .jsonl in a folder; there are \['train'\]")
    (tmp_path / "dev.jsonl").write_text('{"question": "a", "passage": "b", "label": true}\n')
    refused("dev has the label 'True', which train does not have")
    (tmp_path / "dev.jsonl").write_text('{"sentence1": "a", "sentence2": "b", "label": "no"}\n{"text": "a", "label": "no"}\n')
    refused("dev has 2 texts and 1 partners; give two texts in each line")
    (tmp_path / "dev.jsonl").write_text('{"sentence1": "a", "sentence2": "b"}\n')
    refused("dev.jsonl:1: not an object with text and label")
    write_pairs(tmp_path / "dev.jsonl", 1, 5)
    write_pairs(tmp_path / "validation.jsonl", 1, 5)
    refused("dev and validation are two names of one part")


def test_glue_is_read_from_tfds(monkeypatch: pytest.MonkeyPatch) -> None:
    tfds = pytest.importorskip("tensorflow_datasets")
    features = {
        "premise": tfds.features.Text(),
        "hypothesis": tfds.features.Text(),
        "label": tfds.features.ClassLabel(num_classes=3),
    }
    sizes = {"train": 4, "validation_matched": 3, "validation_mismatched": 2, "test_matched": 1}

    class Builder:
        info = type("Info", (), {"features": features, "splits": dict.fromkeys(sizes)})

        def download_and_prepare(self) -> None:
            pass

        def as_dataset(self, split: str) -> list[dict]:
            hidden = split.startswith("test")
            texts = {"premise": b"a b", "hypothesis": split.encode()}
            return [texts | {"label": -1 if hidden else i % 2} for i in range(sizes[split])]

    monkeypatch.setattr(tfds, "builder", lambda name: Builder())
    monkeypatch.setattr(tfds, "as_numpy", lambda rows: rows)
    train, held = finetune.read("tfds:glue/mnli")
    assert train.labels == ["0", "1", "0", "1"] and train.texts == ["a b"] * 4 and train.second == ["train"] * 4
    assert {column: len(part.texts) for column, part in held.items()} == {"matched": 3, "mismatched": 2}


def test_without_mteb_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mteb", None)
    with pytest.raises(ValueError, match=r"pip install 'contrastive_jax\[mteb\]'"):
        mteb_model.run(tiny(), ["STSBenchmark"])


@pytest.mark.filterwarnings("default")
def test_a_task_of_mteb_equals_ours(tmp_path: pathlib.Path) -> None:
    mteb = pytest.importorskip("mteb")
    model = text_model.open_model(f"hf:{write_folder(tmp_path / 'bert', 'bert')}")
    assert isinstance(mteb_model.MtebModel(model), mteb.EncoderProtocol)
    words, rng = "the cat dog sat ran on a mat hat".split(), np.random.default_rng(0)
    texts = [" ".join(rng.choice(words, 5)) for _ in range(60)]
    data = tmp_path / "stsb"
    data.mkdir()
    lines = [f"{rng.uniform(0, 5):.3f}\t{a}\t{b}\n" for a, b in zip(texts[:30], texts[30:], strict=True)]
    (data / "dev.tsv").write_text("".join(lines))
    with pytest.raises(ValueError, match=r"STSBenchmark is scored on test; that .tsv is not there"):
        mteb_model.run(model, ["STSBenchmark"], epath.Path(data))
    (data / "dev.tsv").rename(data / "test.tsv")
    rows = mteb_model.run(model, ["STSBenchmark"], epath.Path(data))
    ours = sts.evaluate(sts.cosines(lambda texts: model.encode([*texts])), epath.Path(data))
    assert rows["STSBenchmark"]["main_score"] == pytest.approx(ours["test"]["spearman"], abs=1e-4)
    with pytest.raises(ValueError, match=r"--mteb=STSBenchmrk: 'STSBenchmrk' not found. Did you mean: 'STSBenchmark'"):
        mteb_model.run(model, ["STSBenchmrk"])
    with pytest.raises(ValueError, match=r"absent: no such folder"):
        mteb_model.run(model, ["STSBenchmark"], epath.Path(tmp_path / "absent"))


@pytest.mark.filterwarnings("default")
def test_mteb_says_which_texts_are_documents(tmp_path: pathlib.Path) -> None:
    mteb = pytest.importorskip("mteb")
    views = []

    class Spy(text_model.TextModel):
        def encode(self, texts: Sequence[str], view: int = 0) -> np.ndarray:
            views.append((view, list(texts)))
            return np.zeros((len(texts), 2), np.float32)

    model = Spy(*tiny()._replace(protocol={"model": "hf:a/b", "parameters": "0", "max_tokens": 9}))
    for prompt in (None, *mteb.types.PromptType):
        mteb_model.MtebModel(model).encode([{"text": ["a", "b"]}, {"text": ["c"]}], task_metadata=None, prompt_type=prompt)
    assert views == [(0, ["a", "b", "c"]), (0, ["a", "b", "c"]), (1, ["a", "b", "c"])]
