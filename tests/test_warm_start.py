"""Training that begins with the weights of another model."""

import hashlib
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from conftest import recipe, shrink
from etils import epath
from ml_collections import ConfigDict
from test_text_model import TEXTS, WORDS, write_folder

from contrastive_jax import build, checkpoint, export, text_model, train
from contrastive_jax.data import tokenizer


def prepared(dataset: pathlib.Path, copy: pathlib.Path, words: pathlib.Path) -> pathlib.Path:
    """The dataset, as if it were prepared with this tokenizer.json."""
    shutil.copytree(dataset, copy)
    shutil.copy(words, copy / "tokenizer.json")
    manifest = json.loads((copy / "manifest.json").read_text())
    found = tokenizer.load(copy)
    manifest |= {"tokenizer_sha256": found.sha256, "reserved": found.reserved}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    return copy


def config_of(data: pathlib.Path, name: str) -> ConfigDict:
    config = shrink(recipe("debug"), data)
    config.init_from = name
    return config


def fresh(config: ConfigDict, workdir: pathlib.Path) -> tuple[train.Setup, dict]:
    setup = train.set_up(config, epath.Path(workdir))
    state = setup.run.init(train.warm_start.encoder_params(setup.config, setup.manifest, setup.run.mesh))
    return setup, jax.device_get(state.params["encoder"])


@pytest.mark.parametrize("family", ["bert", "modernbert", "gpt2"])
def test_a_run_begins_as_the_folder_and_exports_as_one(family: str, dataset: pathlib.Path, tmp_path: pathlib.Path) -> None:
    folder = write_folder(tmp_path / family, family)
    data = prepared(dataset, tmp_path / "data", folder / "tokenizer.json")
    setup, params = fresh(config_of(data, f"hf:{folder}"), tmp_path / "run")
    theirs = text_model.open_model(f"hf:{folder}")
    assert setup.config.model.num_layers == 3 and setup.config.model.dropout == 0.1  # the folder's, the recipe's
    embedding = params["transformer"]["embedding"]
    assert len(embedding) == 384 and embedding[len(WORDS) :].std() > 0.01  # ids that the folder has none of
    # The same vectors, of a checkpoint and of its export.
    (tmp_path / "run" / "config.json").write_text(json.dumps(setup.config.to_dict(), default=str))
    shutil.copy(folder / "tokenizer.json", tmp_path / "run")
    writer = checkpoint.Checkpoints(epath.Path(tmp_path / "run"), keep=1)
    writer.save(1, {"config": {}}, params={"encoder": jax.device_put(params)})
    writer.wait()
    writer.close()
    run = text_model.open_model(str(tmp_path / "run"))
    assert run.tokenize(TEXTS, 1) == theirs.tokenize(TEXTS, 1)
    z = theirs.encode(TEXTS)
    np.testing.assert_allclose(run.encode(TEXTS), z, atol=1e-5)
    (tmp_path / "out").mkdir()
    assert export.write(run, setup.config, tmp_path / "out", "both") == {}
    again = text_model.open_model(str(tmp_path / "out"))
    assert again.tokenize(TEXTS, 0) == theirs.tokenize(TEXTS, 0)
    np.testing.assert_allclose(again.encode(TEXTS), z, atol=1e-5)
    # And a run that begins with that run.
    _, second = fresh(config_of(data, f"{tmp_path / 'run'}@1"), tmp_path / "second")
    jax.tree.map(np.testing.assert_array_equal, second, params)


def test_what_cannot_begin_is_named(dataset: pathlib.Path, tmp_path: pathlib.Path) -> None:
    folder = write_folder(tmp_path / "bert", "bert")
    data = prepared(dataset, tmp_path / "data", folder / "tokenizer.json")
    config = config_of(data, f"hf:{folder}")
    config.data.length = 48
    with pytest.raises(ValueError, match=r"config.data.length=48: hf:.*bert has positions for 40; lower it"):
        fresh(config, tmp_path / "run")
    manifest = json.loads((data / "manifest.json").read_text()) | {"tokenizer_sha256": hashlib.sha256(b"").hexdigest()}
    (data / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"its tokenizer is not that of hf:.*; prepare the data with --tokenizer=hf:"):
        fresh(config_of(data, f"hf:{folder}"), tmp_path / "run")
    with pytest.raises(ValueError, match="config.init_from=nowhere: no config.json there"):
        fresh(config_of(data, "nowhere"), tmp_path / "run")


def test_tables_may_have_fewer_or_more_rows() -> None:
    fresh = {"a": jax.numpy.zeros((4, 2)), "b": jax.numpy.zeros(3)}
    for rows in (2, 4, 6):
        found = build.merge(fresh, {"a": jax.numpy.ones((rows, 2))})
        assert found["a"].sum() == 2 * min(rows, 4) and found["b"].sum() == 0
    with pytest.raises(
        ValueError, match=r"a parameter \(4, 3\) where this model has \(4, 2\); set config.model.embedding_dim as"
    ):
        build.merge(fresh, {"a": jax.numpy.ones((4, 3))})


def test_a_tokenizer_of_the_ecosystem_keeps_its_ids_apart(tmp_path: pathlib.Path) -> None:
    words = tokenizer.load(write_folder(tmp_path / "bert", "bert"))
    assert words.reserved == {"pad": 0, "bos": 2, "eos": 3, "mask": 19, "x_open": 2, "x_close": 3, "y_open": 2, "y_close": 3}
    assert words.vocab_size == 20
    ids = words.encode("the cat [CLS] sat")
    assert ids[:2] == [4, 5] and not set(ids) & set(words.reserved.values())
    assert words.encode_batch(["the cat", "sat"]) == [words.encode("the cat"), words.encode("sat")]
    assert words.decode([2, *words.encode("the cat"), 3, 0]) == "the cat"
