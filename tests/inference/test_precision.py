"""Vectors of products whose factors are rounded: near to those of float32, and named in the protocol."""

import pathlib
import sys

import numpy as np
import pytest
from conftest import finish, recipe, start
from hf_folders import WORDS, write_folder

from contrastive_jax import config as config_lib
from contrastive_jax.config import UserError
from contrastive_jax.evals import run
from contrastive_jax.inference import text_model

TEXTS = [" ".join(np.random.default_rng(i).choice(WORDS[4:], 1 + i % 30)) for i in range(64)]


@pytest.mark.parametrize(("precision", "least"), [("bfloat16", 0.9999), ("int8", 0.999)])
def test_vectors_of_rounded_products_are_near_to_those_of_float32(tmp_path: pathlib.Path, precision: str, least: float) -> None:
    name = f"hf:{write_folder(tmp_path / 'bert', 'bert')}"
    exact, rounded = text_model.load(name), text_model.load(name, precision=precision)
    z, near = exact.encode(TEXTS), rounded.encode(TEXTS)
    assert ((z * near).sum(1) > least).all() and np.abs(z - near).max() > 1e-6
    np.testing.assert_allclose(np.linalg.norm(near, axis=1), 1, atol=1e-6)
    assert "precision" not in exact.protocol() and rounded.protocol()["precision"] == precision
    np.testing.assert_array_equal(text_model.load(name, precision="float32").encode(TEXTS), z)


def test_encode_takes_a_precision(tmp_path: pathlib.Path) -> None:
    folder, texts, output = write_folder(tmp_path / "bert", "bert"), tmp_path / "texts.txt", tmp_path / "z.npy"
    texts.write_text("\n".join(TEXTS))
    command = [sys.executable, "-m", "contrastive_jax", "encode", f"--model=hf:{folder}", f"--input={texts}"]
    finish(start([*command, f"--output={output}", "--precision=int8"]))
    np.testing.assert_allclose(np.load(output), text_model.load(f"hf:{folder}", precision="int8").encode(TEXTS), atol=1e-6)


def test_no_training_computes_in_int8() -> None:
    with pytest.raises(UserError, match="--precision=int8: glue trains, and int8 products have no gradient"):
        run.evaluate_model("hf:absent", ["glue"], ["rte"], precision="int8")
    config = recipe("debug")
    config.model.products = "int8"
    with pytest.raises(UserError, match="config.model.products='int8'"):
        config_lib.check(config)
