"""Every recipe can be traced at its own size; shrunk, it resumes exactly, goes on on fewer devices, and exports or refuses."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from conftest import RECIPES, SMALL_RECIPES, VARIANTS, recipe, shrink, trace
from etils import epath
from exporting import check_export
from transfers import like_an_accelerator

from contrastive_jax.config import UserError
from contrastive_jax.runtime.checkpoint import Checkpoints
from contrastive_jax.training import loop
from contrastive_jax.training.step import TrainState


def quick() -> list:
    """The recipes that are not too large, of which all variants but the first are slow tests."""
    first = dict(reversed(SMALL_RECIPES))
    return [each if first[each[0]] == each[1] else pytest.param(*each, marks=pytest.mark.slow) for each in SMALL_RECIPES]


@pytest.mark.parametrize(("name", "argument"), quick())
def test_every_recipe_has_a_step(name: str, argument: str) -> None:
    """tests/planning compiles that of the others."""
    config = recipe(name, *[argument] * bool(argument))
    run, (state, metrics, z) = trace(config)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(lambda x: (x.shape, x.dtype), run.shapes)
    assert metrics["loss"].shape == () and z.shape[0] == config.data.batch_size


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_that_a_recipe_does_not_have_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=f":absent: .*no such .*choose one of .*{VARIANTS[name][-1]}"):
        recipe(name, "absent")


def fit(setup: loop.Setup, workdir: pathlib.Path, stop_at: int = 4) -> list[dict]:
    """Trains; returns the lines of metrics.jsonl. All runs of a setup share one compiled step."""
    assert loop.train(setup._replace(workdir=epath.Path(workdir)), stop_at) == stop_at
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


# What an exported folder depends on, of the recipes that are done, and the keys of config.model of which it has nothing.
EXPORTED: set[tuple] = set()
WITHOUT_FORM = {"dropout", "attention_dropout", "zero_init_branches", "init", "init_std", "part_mask", "latent_kappa", "remat"}


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # torch's and transformers' own
@pytest.mark.parametrize(("name", "argument"), RECIPES)
def test_every_recipe_trains_resumes_moves_to_two_of_eight_devices_and_exports_or_refuses(
    name: str, argument: str, dataset: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = shrink(recipe(name, *[argument] * bool(argument)), dataset)
    config.model.dtype, config.model.dropout = "float32", 0.1
    setup = loop.set_up(config, epath.Path(tmp_path / "whole"))
    for workdir in ("parts", "fewer"):
        (tmp_path / workdir).mkdir()
    with like_an_accelerator():
        whole = fit(setup, tmp_path / "whole")
    assert [line["step"] for line in whole] == [1, 2, 3, 4] and all(np.isfinite(line["loss"]) for line in whole)

    def state_of(workdir: str) -> TrainState:
        return jax.device_get(loop.restore_or_init(setup, Checkpoints(epath.Path(tmp_path / workdir))))

    fit(setup, tmp_path / "parts", stop_at=2)
    shutil.copytree(tmp_path / "parts", tmp_path / "fewer", dirs_exist_ok=True)
    parts = fit(setup, tmp_path / "parts")
    keys = ("step", "loss", "batch_digest", "gradient_norm")
    assert [[line[key] for key in keys] for line in parts] == [[line[key] for key in keys] for line in whole]
    jax.tree.map(np.testing.assert_array_equal, state_of("parts"), state_of("whole"))
    with monkeypatch.context() as patch:
        two = jax.devices()[:2]
        patch.setattr(jax, "devices", lambda *_: two)
        fewer = fit(loop.set_up(config, epath.Path(tmp_path / "fewer")), tmp_path / "fewer")
    assert [line["batch_digest"] for line in fewer] == [line["batch_digest"] for line in whole]
    np.testing.assert_allclose([line["loss"] for line in fewer], [line["loss"] for line in whole], rtol=1e-4)
    form = config.data.delimiters, *((key, x) for key, x in sorted(config.model.items()) if key not in WITHOUT_FORM)
    if form not in EXPORTED:
        check_export(tmp_path / "whole", tmp_path / "out", views=("query",))
        EXPORTED.add(form)
