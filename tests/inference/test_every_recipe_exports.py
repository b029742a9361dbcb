"""Shipped encoders, shrunk, train and give the same vectors from the exported folder; test_every_recipe.py has all recipes."""

import pathlib

import numpy as np
import pytest
from conftest import recipe, shrink
from etils import epath
from exporting import TEXTS, check_export

from contrastive_jax.config import UserError
from contrastive_jax.inference import text_model
from contrastive_jax.training import loop

STEPS = 3


def train(name: str, argument: str, dataset: pathlib.Path, workdir: pathlib.Path) -> None:
    config = shrink(recipe(name, *[argument] * bool(argument)), dataset)
    config.steps = STEPS
    assert loop.train(loop.set_up(config, epath.Path(workdir)), STEPS) == STEPS


@pytest.mark.filterwarnings("default")  # torch's and transformers' own
@pytest.mark.parametrize(  # they differ once they are shrunk
    "name", ["bag", "modern_base", *(pytest.param(name, marks=pytest.mark.slow) for name in ("bert_base", "cpt_text", "debug"))]
)
def test_an_encoder_exports_and_loads_with_the_same_vectors(name: str, dataset: pathlib.Path, tmp_path: pathlib.Path) -> None:
    train(name, "", dataset, tmp_path / "run")
    check_export(tmp_path / "run", tmp_path / "out")


@pytest.mark.slow
def test_row59_a_run_with_another_mixer_gives_vectors(dataset: pathlib.Path, tmp_path: pathlib.Path) -> None:
    train("mixers", "gmlp", dataset, tmp_path / "run")
    model = text_model.load(str(tmp_path / "run"))
    together = model.encode(TEXTS)
    for text, z in zip(TEXTS, together, strict=True):  # of whatever length the other texts are
        np.testing.assert_allclose(model.encode([text])[0], z, atol=1e-6)
    with pytest.raises(UserError, match="^--max_tokens=40: the run has positions for 24 tokens; lower it"):
        text_model.load(str(tmp_path / "run"), 40)
