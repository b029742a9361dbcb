"""Every shipped recipe, shrunk, trains, exports, and gives the same vectors from the exported folder."""

import importlib.util
import json
import pathlib
import shutil

import numpy as np
import pytest
from conftest import ROOT, recipe, shrink
from etils import epath

from configs import cpt_text
from contrastive_jax.data import tokenizer
from contrastive_jax.inference import export, text_model
from contrastive_jax.training import loop

STEPS = 3
TEXTS = ["the cat", "  a dog ran  ", "the cat 7 sat on a mat, a dog 49 ran " * 2, "", "x " * 1000]
# Recipes that share an encoder, once shrunk, with one that is tested anyway.
SAME_ENCODER = {"flatnce", "large_batch", "moco", "siglip", "pile_small", "s-gpu", "m", "l", "xl"}
NAMES = [(path.stem, "") for path in sorted((ROOT / "configs").glob("*.py")) if path.stem != "cpt_text"]
NAMES += [("cpt_text", size) for size in cpt_text.SIZES]


@pytest.fixture(scope="module")
def data(dataset: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The dataset with a tokenizer, which an export needs."""
    folder = tmp_path_factory.mktemp("data") / "prepared"
    shutil.copytree(dataset, folder)
    trained = tokenizer.train([f"the cat {i} sat on a mat, a dog {i * i} ran" for i in range(80)], 300)
    (folder / trained.file).write_bytes(trained.model)
    return folder


def train(name: str, size: str, data: pathlib.Path, workdir: pathlib.Path) -> None:
    """Trains a shrunk recipe for a few steps, and leaves its config in float32: bfloat16 has no digits to compare."""
    config = shrink(recipe(name, *[size] * bool(size)), data)
    config.steps = STEPS
    assert loop.train(loop.set_up(config, epath.Path(workdir)), STEPS) == STEPS
    stored = json.loads((workdir / "config.json").read_text())
    stored["model"] |= {"dtype": "float32", "attention": "plain"}
    (workdir / "config.json").write_text(json.dumps(stored))


@pytest.mark.filterwarnings("default")  # torch's and transformers' own
@pytest.mark.parametrize(
    ("name", "size"),
    [pytest.param(*each, marks=[pytest.mark.slow] * bool(SAME_ENCODER & set(each))) for each in NAMES],
)
def test_a_recipe_trains_exports_and_loads_with_the_same_vectors(
    name: str, size: str, data: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    train(name, size, data, tmp_path / "run")
    model = text_model.load(str(tmp_path / "run"))
    assert model.config is not None and model.max_tokens == model.config.model.max_length
    for view in ("query", "document"):
        (tmp_path / view).mkdir()
        export.write(model, model.config, tmp_path / view, view)
        exported = text_model.load(str(tmp_path / view))
        assert exported.max_tokens == model.max_tokens
        assert exported.tokenize(TEXTS) == model.tokenize(TEXTS, view)
        np.testing.assert_allclose(exported.encode(TEXTS), model.encode(TEXTS, view), atol=1e-6)
    if importlib.util.find_spec("sentence_transformers") is None:
        pytest.skip("sentence-transformers and torch are not installed, which load the same folder")
    export.export(model, tmp_path / "out")  # it compares the vectors with sentence-transformers' to 1e-5
