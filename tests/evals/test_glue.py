"""Fine-tuning."""

import json
import pathlib
from collections.abc import Sequence
from typing import ClassVar

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from contrastive_jax.config import UserError, default_config
from contrastive_jax.evals import glue, results, senteval
from contrastive_jax.evals.task import Options
from contrastive_jax.inference import text_model
from contrastive_jax.inference.tokenize import RunTokenize
from contrastive_jax.models import encoder as encoder_lib
from contrastive_jax.objectives.objective import PairIds
from contrastive_jax.runtime import sharding

WORDS = [chr(ord("a") + i) for i in range(20)]


LENGTH = 16


def tiny(layers: int = 0, longest: int = LENGTH) -> text_model.TextModel:
    """An encoder of few blocks, with dropout, and its words."""

    class Words:
        def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
            return [[WORDS.index(word) for word in text.split()] for text in texts]

        reserved: ClassVar[dict[str, int]] = {}

    config = default_config().model
    config.update(num_layers=layers, d_model=16, num_heads=2, num_kv_heads=2, head_dim=8, d_ff=32, dropout=0.1)
    initial = encoder_lib.make_encoder(config, len(WORDS)).init(jax.random.key(0))
    encoder, forward_with = text_model.make_encoder_on_all_devices(config, initial)
    params = text_model.place_on_all_devices(config, initial)
    return text_model.TextModel("tiny", config, encoder, params, forward_with, RunTokenize(Words, False, longest))


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


FAST = glue.Recipe(epochs=3, seeds=2, batch_size=16, encoder_rate=3e-3, head_rate=3e-2)


def score(model: text_model.TextModel, folder: pathlib.Path, recipe: glue.Recipe) -> results.Rows:
    """The rows of a fine-tuning by this recipe."""
    opened = glue.open_pairs(model, str(folder), Options())
    return glue.score_fine_tuned(model, opened, recipe)


def test_a_separable_task_is_learnt_the_same_way_twice(separable: pathlib.Path) -> None:
    model = tiny()
    before, z = jax.device_get(model.params), model.encode(WORDS)
    rows = score(model, separable, FAST)
    assert list(rows) == ["majority", "seed 0", "seed 1", "best", "mean", "deviation"]
    assert rows["best"] == rows["mean"] == {"accuracy": 1.0} and rows["deviation"] == {"accuracy": 0.0}
    assert 0.3 < rows["majority"]["accuracy"] < 0.7
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(model.params))
    np.testing.assert_array_equal(model.encode(WORDS), z)


def test_shuffled_labels_give_chance_and_a_seed_gives_the_same_figures(tmp_path: pathlib.Path) -> None:
    write_pairs(tmp_path / "train.jsonl", 0, 100, shuffled=True)
    write_pairs(tmp_path / "validation_matched.jsonl", 1, 80, shuffled=True)
    write_pairs(tmp_path / "validation_mismatched.jsonl", 2, 70, shuffled=True)
    rows = score(tiny(), tmp_path, FAST._replace(epochs=1))
    assert rows["best"].keys() == {"matched", "mismatched"}
    assert all(0.3 < accuracy < 0.7 for accuracy in rows["mean"].values())
    assert score(tiny(), tmp_path, FAST._replace(epochs=1)) == rows


def write_entailment(path: pathlib.Path, seed: int, count: int) -> None:
    """The label is whether the letters of both texts are of the same kind; neither text says anything alone."""
    rng, rows = np.random.default_rng(seed), []
    for number in range(count):
        first, second = number % 4 // 2, number % 2
        premise, hypothesis = (WORDS[3 * kind + rng.integers(3)] for kind in (first, second))
        rows.append({"premise": premise, "hypothesis": hypothesis, "label": "yes" if first == second else "no"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_m18_a_joined_row_has_the_hypothesis_first_and_the_premise_loses_its_end() -> None:
    model, part = tiny(), senteval.Labelled(["c d e", " ".join(WORDS[:15])], ["yes", "no"], ["a b", "s t"])
    pairs = glue.tokenize_pairs(model, part, ["no", "yes"], joined=True)
    assert pairs.rows == [([0, 1, 2, 3, 4],), ([18, 19, *range(14)],)]
    assert model.truncation.share == 0.5
    batch = glue.make_batch(pairs, np.array([1, 0]), total=4, longest=LENGTH)
    assert batch.tokens.shape == (4, 1, 1, LENGTH) and batch.span_hash.shape == (4, 1)
    assert batch.segment.sum(3)[:, 0, 0].tolist() == [16, 5, 1, 1] and batch.label.tolist() == [0, 1, -1, -1]


@pytest.mark.parametrize("sees", ["both texts", "the hypothesis"])
def test_m18_entailment_is_learnt_from_a_row_of_both_texts_alone(sees: str, tmp_path: pathlib.Path) -> None:
    write_entailment(tmp_path / "train.jsonl", 0, 320)
    write_entailment(tmp_path / "dev.jsonl", 1, 200)
    model = tiny(layers=1, longest=2 if sees == "both texts" else 1)
    rows = score(model, tmp_path, FAST._replace(epochs=10, seeds=1, encoder_rate=1e-2, joined=True))
    assert rows["majority"] == {"accuracy": 0.5}
    assert rows["best"]["accuracy"] > 0.95 if sees == "both texts" else rows["best"]["accuracy"] < 0.6


def losses(separable: pathlib.Path, recipe: glue.Recipe) -> list[float]:
    """The loss of each of a few steps with dropout, on 40 pairs."""
    model, data = tiny(layers=1), glue.open_pairs(None, str(separable), Options())
    pairs = glue.tokenize_pairs(model, senteval.Labelled(*(column[:40] for column in data.train)), ["no", "yes"], recipe.joined)
    tuning = glue.make_fine_tuning(model, 2, recipe, 12)
    state, values = tuning.init(0), []
    for _ in range(recipe.epochs):
        for _, batch in glue.batches(tuning, pairs, np.arange(40), recipe.batch_size, LENGTH):
            state, loss = tuning.train_step(state, batch, 0)
            values.append(float(loss))
    return values


def test_rows_are_padded_to_few_lengths_and_the_last_batch_to_its_pairs() -> None:
    rows = [([1] * 3, [4]), ([2] * 17, [5] * 33), ([3] * 16, [6] * 2)]
    pairs = glue.TokenPairs(rows, np.array([7, 8, 9], np.int32))
    whole, rest = (glue.make_batch(pairs, np.array(chosen), total=4, longest=40) for chosen in ([2, 1], [0]))
    assert whole.tokens.shape == whole.segment.shape == (4, 2, 1, 40)  # 64 would be more than the model takes
    assert rest.tokens.shape == (4, 2, 1, 16)
    assert whole.segment.sum(3)[:, :, 0].tolist() == [[16, 2], [17, 33], [1, 1], [1, 1]]
    assert whole.label.tolist() == [9, 8, -1, -1] and rest.label.tolist() == [7, -1, -1, -1]
    assert whole.tokens[1, :, 0, 0].tolist() == [2, 5] and rest.tokens.sum(3)[:, :, 0].tolist() == [
        [3, 4],
        [0, 0],
        [0, 0],
        [0, 0],
    ]


def test_fillers_have_no_loss() -> None:
    rng = np.random.default_rng(0)
    z = rng.normal(size=(3, 2, 4)).astype(np.float32)
    head = {"kernel": rng.normal(size=(16, 3)).astype(np.float32), "bias": np.zeros(3, np.float32)}
    u, v = 2 * z[:, 0], 2 * z[:, 1]  # entries near 1: the square root of 4
    scores = np.concatenate([u, v, np.abs(u - v), u * v], axis=1) @ head["kernel"]
    logs = scores - np.log(np.exp(scores).sum(1, keepdims=True))
    ids = PairIds(None, None, np.array([2, -1, 0]))
    value, _ = glue.classification_loss(z, ids, head)
    assert float(value) == pytest.approx(-(logs[0, 2] + logs[2, 0]) / 2, rel=1e-5)


@pytest.mark.parametrize("joined", [pytest.param(False, marks=pytest.mark.slow), True])
def test_m18_one_device_and_eight_train_alike(joined: bool, separable: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = FAST._replace(batch_size=12, epochs=2, joined=joined)  # neither 12 nor 40 - 36 divides over eight devices
    eight = losses(separable, recipe)
    one_device = sharding.make_mesh(ConfigDict({"data": 1, "fsdp": 1, "tensor": 1}), jax.devices()[:1])
    monkeypatch.setattr(sharding, "all_devices_mesh", lambda: one_device)
    np.testing.assert_allclose(losses(separable, recipe), eight, rtol=1e-4)
    assert len(eight) == 8 and eight[0] != eight[4]


def test_bad_pairs_are_named(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(message: str) -> None:
        with pytest.raises(UserError, match=message):
            glue.open_pairs(None, str(tmp_path), Options())

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
            texts = {"premise": b"a b", "hypothesis": split.encode()}
            hidden = {"test_matched": [0], "validation_matched": [1]}.get(split, [])
            return [texts | {"label": -1 if i in hidden else i % 2} for i in range(sizes[split])]

    monkeypatch.setattr(tfds, "builder", lambda name: Builder())
    monkeypatch.setattr(tfds, "as_numpy", lambda rows: rows)
    _, train, held = glue.open_pairs(None, "tfds:glue/mnli", Options())
    assert train.labels == ["0", "1", "0", "1"] and train.texts == ["a b"] * 4 and train.second == ["train"] * 4
    assert {column: len(part.texts) for column, part in held.items()} == {"matched": 2, "mismatched": 2}
    features["label"] = tfds.features.Scalar(np.float32)
    with pytest.raises(UserError, match=r"--data=tfds:glue/stsb: the feature 'label' is not an integer class"):
        glue.open_pairs(None, "tfds:glue/stsb", Options())
