"""Training that starts from the weights of another model."""

import hashlib
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from conftest import recipe, shrink
from etils import epath
from hf_folders import TEXTS, WORDS, write_folder, write_run
from ml_collections import ConfigDict

from contrastive_jax.config import UserError
from contrastive_jax.data import tokenizer
from contrastive_jax.inference import export, text_model
from contrastive_jax.runtime import checkpoint
from contrastive_jax.training import build, loop


def prepared(dataset: pathlib.Path, copy: pathlib.Path, tokenizer_json: pathlib.Path | None = None) -> pathlib.Path:
    """Copies the dataset, as if it were prepared with this tokenizer.json, or with its own tokenizer."""
    shutil.copytree(dataset, copy, ignore=shutil.ignore_patterns("tokenizer.model") if tokenizer_json else None)
    if tokenizer_json:
        shutil.copy(tokenizer_json, copy / "tokenizer.json")
    manifest = json.loads((copy / "manifest.json").read_text())
    loaded = tokenizer.load(copy)
    manifest |= {"tokenizer_sha256": loaded.sha256, "reserved": loaded.reserved}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    return copy


def config_of(data: pathlib.Path, name: str) -> ConfigDict:
    config = shrink(recipe("debug"), data)
    config.init_from = name
    return config


def fresh(config: ConfigDict, workdir: pathlib.Path) -> tuple[loop.Setup, dict]:
    setup = loop.set_up(config, epath.Path(workdir))
    state = setup.run.init(loop.warm_start.encoder_params(setup.config, setup.manifest, setup.run.mesh))
    return setup, jax.device_get(state.params["encoder"])


@pytest.mark.parametrize("family", ["bert", "modernbert", "gpt2"])
def test_a_run_starts_as_the_folder_and_exports_as_one(family: str, dataset: pathlib.Path, tmp_path: pathlib.Path) -> None:
    folder = write_folder(tmp_path / family, family)
    data = prepared(dataset, tmp_path / "data", folder / "tokenizer.json")
    setup, params = fresh(config_of(data, f"hf:{folder}"), tmp_path / "run")
    source = text_model.load(f"hf:{folder}")
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
    run = text_model.load(str(tmp_path / "run"))
    assert run.tokenize(TEXTS, "document") == source.tokenize(TEXTS, "document")
    z = source.encode(TEXTS)
    np.testing.assert_allclose(run.encode(TEXTS), z, atol=1e-5)
    (tmp_path / "out").mkdir()
    assert export.write(run, setup.config, tmp_path / "out", "both") == {}
    again = text_model.load(str(tmp_path / "out"))
    assert again.tokenize(TEXTS) == source.tokenize(TEXTS)
    np.testing.assert_allclose(again.encode(TEXTS), z, atol=1e-5)
    assert again.tokenize(["a [SEP] hat"]) == run.tokenize(["a [SEP] hat"])
    if family != "modernbert":  # rows of 24 tokens keep all positions
        assert setup.config.model.max_length == again.max_tokens == 40
    # Runs that start from that run, and from its export.
    for name in (f"{tmp_path / 'run'}@1", str(tmp_path / "out")):
        second_config = config_of(data, name)
        if name.endswith("out"):
            second_config.data.dir = str(prepared(dataset, tmp_path / "data_of_export", tmp_path / "out" / "tokenizer.json"))
        _, second = fresh(second_config, tmp_path / "second")
        jax.tree.map(np.testing.assert_array_equal, second, params)
    with pytest.raises(UserError, match=r"config.init_from: .*@best: no checkpoint has a score"):
        fresh(config_of(data, f"{tmp_path / 'run'}@best"), tmp_path / "second")


def test_what_cannot_be_started_from_is_named(dataset: pathlib.Path, tmp_path: pathlib.Path) -> None:
    folder = write_folder(tmp_path / "bert", "bert")
    data = prepared(dataset, tmp_path / "data", folder / "tokenizer.json")
    config = config_of(data, f"hf:{folder}")
    config.data.length = 48
    with pytest.raises(UserError, match="config.model.max_length=40: config.data.length needs a table of 48 learned positions"):
        fresh(config, tmp_path / "run")
    manifest = json.loads((data / "manifest.json").read_text()) | {"tokenizer_sha256": hashlib.sha256(b"").hexdigest()}
    (data / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"its tokenizer is not that of hf:.*; prepare the data with --tokenizer=.*bert"):
        fresh(config_of(data, f"hf:{folder}"), tmp_path / "run")
    # Older folders of sentence-transformers have the weights and the tokenizer in a folder of their own.
    (folder / "0_Transformer").mkdir()
    for file in ("config.json", "model.safetensors", "tokenizer.json"):
        (folder / file).rename(folder / "0_Transformer" / file)
    (folder / "modules.json").write_text((folder / "modules.json").read_text().replace('"path": ""', '"path": "0_Transformer"'))
    with pytest.raises(UserError, match=r"prepare the data with --tokenizer=.*bert/0_Transformer$"):
        fresh(config_of(data, f"hf:{folder}"), tmp_path / "run")
    data = prepared(dataset, tmp_path / "data2", folder / "0_Transformer" / "tokenizer.json")
    fresh(config_of(data, f"hf:{folder}"), tmp_path / "run")
    with pytest.raises(UserError, match="config.init_from: nowhere: no config.json there"):
        fresh(config_of(data, "nowhere"), tmp_path / "run")


def test_a_run_may_add_token_weights_and_ngrams_to_a_model(dataset: pathlib.Path, tmp_path: pathlib.Path) -> None:
    data, trained, sizes = prepared(dataset, tmp_path / "data"), tokenizer.load(dataset), ((2, 128),)
    for name, changes in {"plain": {}, "richer": {"token_weights": True, "ngrams": sizes}}.items():
        (tmp_path / name).mkdir()
        write_run(tmp_path / name, "bag", trained, embedding_dim=0, **changes)
    config = config_of(data, str(tmp_path / "plain"))
    config.model.update(token_weights=True, ngrams=sizes)
    setup, params = fresh(config, tmp_path / "run")
    assert setup.config.model.ngrams == sizes and setup.config.model.token_weights and not setup.config.model.num_layers
    assert not params["transformer"]["ngrams"]["order_2"].any() and not params["token_weight"].any()
    source = text_model.load(str(tmp_path / "plain")).params["transformer"]["embedding"]
    np.testing.assert_array_equal(params["transformer"]["embedding"][: len(source)], source)
    setup, params = fresh(config_of(data, str(tmp_path / "richer")), tmp_path / "second")
    assert setup.config.model.ngrams == sizes and params["transformer"]["ngrams"]["order_2"].any()


def test_tables_may_have_fewer_or_more_rows() -> None:
    fresh = {"a": jax.numpy.zeros((4, 2)), "b": jax.numpy.zeros(3)}
    for rows in (2, 4, 6):
        params = build.overlay(fresh, {"a": jax.numpy.ones((rows, 2))})
        assert params["a"].sum() == 2 * min(rows, 4) and params["b"].sum() == 0
    with pytest.raises(
        UserError, match=r"a parameter has shape \(4, 3\) there, this model needs \(4, 2\); set config.model.embedding_dim and"
    ):
        build.overlay(fresh, {"a": jax.numpy.ones((4, 3))})


def test_a_tokenizer_of_the_ecosystem_keeps_its_ids_apart(tmp_path: pathlib.Path) -> None:
    loaded = tokenizer.load(write_folder(tmp_path / "bert", "bert"))
    assert loaded.reserved == {"pad": 0, "bos": 2, "eos": 3, "mask": 19, "x_open": 2, "x_close": 3, "y_open": 2, "y_close": 3}
    assert loaded.vocab_size == 20
    ids = loaded.encode("the cat [CLS] sat")
    assert ids[:2] == [4, 5] and not set(ids) & set(loaded.reserved.values())
    assert loaded.encode_batch(["the cat", "sat"]) == [loaded.encode("the cat"), loaded.encode("sat")]
    assert loaded.decode([2, *loaded.encode("the cat"), 3, 0]) == "the cat"
