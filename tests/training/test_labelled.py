"""Labelled pairs from a file to a trained run: hard negatives, labels that are learned, resuming, several devices, refusals."""

import functools
import itertools
import json
import pathlib

import jax
import numpy as np
import pytest
from conftest import recipe, shrink
from etils import epath
from ml_collections import ConfigDict

import contrastive_jax
from contrastive_jax.config import UserError
from contrastive_jax.data import pipeline, prepared
from contrastive_jax.data.preparation import prepare
from contrastive_jax.evals.labels import LabelledPairs
from contrastive_jax.inference import text_model
from contrastive_jax.runtime import sharding
from contrastive_jax.runtime.model_name import parse_model_name, read_params
from contrastive_jax.training import build, loop


def fit(config: ConfigDict, workdir: pathlib.Path, stop_at: int | None = None) -> list[dict]:
    contrastive_jax.train(config, workdir, stop_at)
    return [line for line in map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines()) if "loss" in line]


def small(name: str, dataset: pathlib.Path, **of_data: object) -> ConfigDict:
    """A recipe, shrunk, as a bag of embeddings: no test here looks at blocks. `dataset` is that of pairs."""
    config = shrink(recipe("labelled", name), dataset.parent)
    config.data.dir, config.model.num_layers = str(dataset), 0
    config.data.update(of_data)
    return config


@pytest.fixture(scope="module")
def scored(dataset: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Pairs of which half are equal (5) and half are unlike (0), prepared."""
    folder = tmp_path_factory.mktemp("scored")
    words = "cat dog fox hen pig cow ant bee owl elk".split()
    rows = [
        {"text1": f"the {a} and {b}", "text2": f"a {a} with {b}" if i % 2 else f"a {words[(i + 5) % 10]}", "score": i % 2 * 5}
        for i, (a, b) in enumerate((a, b) for a in words for b in words)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare.prepare(
        folder / "out", pairs=str(folder / "pairs.jsonl"), tokenizer=str(dataset), workers=1, validation_fraction=0.2
    )
    return folder / "out"


def test_row55_prepared_pairs_train_and_resume_bit_for_bit(scored: pathlib.Path, tmp_path: pathlib.Path) -> None:
    config = small("cosent", scored)
    config.update(steps=6, checkpoint_every=4)
    config.model.dropout = 0.3
    whole = fit(config, tmp_path / "whole")
    fit(config, tmp_path / "parts", stop_at=3)
    parts = fit(config, tmp_path / "parts")
    keys = ("step", "loss", "batch_digest", "gradient_norm", "label_correlation")
    assert [[line[key] for key in keys] for line in whole] == [[line[key] for key in keys] for line in parts]


@pytest.mark.parametrize("name", ["cosine", pytest.param("softmax", marks=pytest.mark.slow)])
def test_row55_labels_are_learned(name: str, scored: pathlib.Path, tmp_path: pathlib.Path) -> None:
    config = small(name, scored)
    config.steps, config.labels.scale, config.labels.classes = 60, 5.0, (6,)
    lines = fit(config, tmp_path)
    metric = "accuracy" if name == "softmax" else "label_correlation"
    assert np.mean([line[metric] for line in lines[-5:]]) > 0.8
    assert lines[-1]["loss"] < lines[0]["loss"]


def first_losses(config: ConfigDict, devices: int) -> list[float]:
    """The losses of the first two steps on so many devices."""
    mesh, manifest = sharding.make_mesh(config.mesh, jax.devices()[:devices]), prepared.load_manifest(config.data.dir)
    run = build.build(config, mesh, manifest["vocab_size"], manifest["reserved"])
    batches = pipeline.batches(prepared.open_split(config.data.dir, "train"), config.data, config.seed)
    state, losses = run.init(), []
    for batch in itertools.islice(batches, 2):
        rows = np.arange(config.data.batch_size)
        state, metrics, _ = run.train_step(state, sharding.to_global(batch, rows, len(rows), mesh))
        losses.append(float(metrics["loss"]))
    return losses


@pytest.mark.parametrize("name", ["infonce", pytest.param("rdrop", marks=pytest.mark.slow)])
def test_row55_hard_negatives_and_row51_copies_are_the_same_on_8_devices_and_cached(name: str, dataset: pathlib.Path) -> None:
    config = small(name, dataset / "pairs")
    config.model.dropout = 0.2
    expected = first_losses(config, 1)
    config.micro_batch = 8
    np.testing.assert_allclose(first_losses(config, 8), expected, rtol=2e-5)


def test_short_rows_of_queries_change_nothing_but_the_cost(dataset: pathlib.Path) -> None:
    config = small("infonce", dataset / "pairs", max_span=18)
    config.model.update(num_layers=1, zero_init_branches=False)
    config.data.one_source = "domain"
    whole = first_losses(config, 1)
    config.data.query_length, config.micro_batch = 20, 8
    np.testing.assert_allclose(first_losses(config, 8), whole, rtol=2e-5)
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    shapes = build.batch_shapes(config, mesh)
    assert shapes.tokens.shape == (16, 3, 1, 24) and shapes.scores.shape == (16, 2)
    assert build.row_tokens(config.data) == 20 + 2 * 24
    queue = config.copy_and_resolve_references()  # the encoder that is trained sees queries alone
    queue.data.update(views=2, hard_negatives=0)
    queue.memory.kind, queue.objective.symmetric = "queue", False
    assert np.isfinite(first_losses(queue, 1)).all()
    for changes, need in (
        ({"sampler": "neighbours"}, "config.data.sampler='fields'"),
        ({"query_length": 2}, "to lie between 3 and config.data.length=24"),
        ({"pack_pairs": 2}, "config.data.pack_pairs=1"),
    ):
        changed = config.copy_and_resolve_references()
        changed.data.update(changes)
        with pytest.raises(UserError, match=rf"config.data.query_length={changed.data.query_length}: needs {need}"):
            build.check_query_length(changed)


def test_row55_hard_negatives_and_labels_that_do_not_fit_are_refused(
    dataset: pathlib.Path, scored: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    config = small("infonce", dataset / "pairs", views=2)
    with pytest.raises(UserError, match=r"config.data.hard_negatives=1: of the 2 views .* config.data.views=3"):
        loop.set_up(config, epath.Path(tmp_path))
    config = small("softmax", scored)
    with pytest.raises(UserError, match=r"config.labels.classes=\(2,\): they are 2, but the data has the label 5"):
        loop.set_up(config, epath.Path(tmp_path))
    manifest = prepared.load_manifest(f"{scored},{scored}")
    assert manifest["fields"] == 2 and manifest["labels"] == [0.0, 5.0]


@pytest.mark.parametrize(
    "name", ["softmax", pytest.param("rdrop", marks=pytest.mark.slow), pytest.param("cosine", marks=pytest.mark.slow)]
)
def test_row55_the_held_out_labels_are_scored_as_numpy_does_it(name: str, scored: pathlib.Path, tmp_path: pathlib.Path) -> None:
    config, measure = small(name, scored), "label_correlation" if name == "cosine" else "accuracy"
    config.update(steps=12, eval_every=6, checkpoint_every=6, keep_best=f"labels/validation/{measure}")
    config.labels.update(scale=5.0, classes=(6,), product=name == "softmax")
    config.eval.pairs, config.model.dropout, config.noise.ops = 10, 0.3, (("delete", 0.2),)
    config.objective.extra = (("spread_mean", 0.1),)
    contrastive_jax.train(config, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    found = {line["step"]: line[config.keep_best] for line in lines if config.keep_best in line}
    assert sorted(found) == [0, 6, 12]
    assert {name for line in lines for name in line if name.startswith("labels/")} == {config.keep_best}
    # The model reads the texts themselves, one by one, and NumPy does the rest.
    model, records = text_model.load(str(tmp_path)), prepared.open_split(scored, "validation")
    pairs = records.read_records(range(len(records)))
    ends = [[i for i, token in enumerate(ids) if token == model.tokenizer.reserved["eos"]] for ids in pairs.token_lists()]
    decode = model.tokenizer.decode
    texts = [(decode(ids[:end]), decode(ids[end + 1 : -1])) for ids, (end, _) in zip(pairs.token_lists(), ends, strict=True)]
    x, y = zip(*texts, strict=True)
    u, v = 4 * model.encode(x, "query"), 4 * model.encode(y, "document")  # √e = 4
    expected = np.corrcoef((u * v).sum(-1), pairs.label)[0, 1]
    if name != "cosine":
        spread = functools.partial(sharding.even_shardings, mesh=sharding.all_devices_mesh())
        head = read_params(parse_model_name(str(tmp_path)), spread)[1]["objective"]
        seen = np.concatenate([u, v, np.abs(u - v), *[u * v] * (name == "softmax")], axis=-1)
        expected = ((seen @ np.asarray(head["kernel"]) + np.asarray(head["bias"])).argmax(-1) == pairs.label).mean()
    assert found[12] == pytest.approx(expected, abs=1e-4)


def test_row55_held_out_labels_are_all_scored_once_on_1_and_8_devices(
    scored: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, manifest = small("softmax", scored), prepared.load_manifest(scored)
    config.labels.classes = (6,)
    records = prepared.open_split(scored, "validation")
    label = records.read_records(range(len(records))).label
    assert len(label) % config.data.batch_size  # the last batch is not full
    found = []
    for devices in (1, 8):
        run = build.build(config, sharding.make_mesh(config.mesh, jax.devices()[:devices]), manifest["vocab_size"])
        params = run.init().params["encoder"]
        found.append(LabelledPairs(config, run).embed(params))
        np.testing.assert_array_equal(found[-1][1], label)
    np.testing.assert_allclose(found[0][0], found[1][0], atol=1e-6)
    # Of several processes, each copies the vectors of the others.
    monkeypatch.setattr(type(jax.tree.leaves(params)[0]), "is_fully_addressable", property(lambda _: False))
    np.testing.assert_array_equal(LabelledPairs(config, run).embed(params)[0], found[1][0])


def test_row55_single_texts_with_a_class_are_scored_without_the_query_key_test(
    scored: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    source = str(scored.parent / "pairs.jsonl")
    prepare.prepare(
        tmp_path / "one", pairs=source, text_field="text2", tokenizer=str(scored), workers=1, validation_fraction=0.2
    )
    config = small("softmax", tmp_path / "one", views=1)
    config.update(steps=60, eval_every=60)
    config.labels.classes = (6,)
    contrastive_jax.train(config, tmp_path / "run")
    first, *_, last = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert {name for name in first if "/" in name} == {"labels/validation/accuracy"}
    assert last["labels/validation/accuracy"] > 0.8  # a text with "with" is of class 5
