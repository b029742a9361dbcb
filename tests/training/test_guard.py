"""Steps that are not finite leave no trace; a run that no longer trains is stopped with its reason."""

import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import recipe, shrink
from etils import epath
from ml_collections import ConfigDict

import contrastive_jax
from contrastive_jax.config import UserError, default_config
from contrastive_jax.data.batch import Batch
from contrastive_jax.objectives.objective import Given, Objective, PairIds
from contrastive_jax.training import guard, loop, metrics, views
from contrastive_jax.training import step as step_lib
from contrastive_jax.training.memory import Encoded
from contrastive_jax.training.noise import Vocabulary
from contrastive_jax.training.views import Rows


class Bad(NamedTuple):
    """A memory whose state is the sum of all embeddings; document 7 makes it a NaN where `where` is "memory"."""

    where: str
    fixed_views: int = 0

    def init(self, params: dict) -> jax.Array:
        return jnp.float32(0)

    def before_step(self, state: jax.Array, rows: Rows, ids: PairIds, step: jax.Array, rng: jax.Array) -> tuple:
        total = state + rows.tokens.sum() + jnp.where((ids.document[0] == 7) & (self.where == "memory"), jnp.nan, 0.0)
        return total, Given(keys=total)

    def after_step(self, state: jax.Array, params: dict, step: jax.Array) -> jax.Array:
        return state

    def shardings(self, params: object, batch: object) -> None:
        return None


@pytest.mark.parametrize("where", ["loss", "gradient", "parameters", "memory"])
def test_a_step_that_is_not_finite_changes_nothing(where: str) -> None:
    def bad(ids: PairIds, name: str) -> jax.Array:
        return (ids.document[0] == 7) & (where == name)

    def loss(z: jax.Array, ids: PairIds, params: dict, given: Given) -> tuple[jax.Array, dict]:
        zero = params["scale"] - jax.lax.stop_gradient(params["scale"])
        root = jnp.sqrt(jnp.where(bad(ids, "gradient"), zero, 1.0))  # 0, whose gradient is infinite
        large = jnp.where(bad(ids, "parameters"), 1e18, 0.0) * zero
        return ((z + given.keys) * params["scale"]).sum() + jnp.where(bad(ids, "loss"), jnp.nan, 0.0) + root + large, {}

    leap = optax.stateless(lambda updates, _: jax.tree.map(lambda u: jnp.where(u > 1e17, jnp.inf, -0.1 * u), updates))
    optimizer = optax.chain(optax.trace(0.9), leap)
    train_step = step_lib.make_train_step(
        views=views.make_views(default_config(), Vocabulary(320, {})),
        encode=lambda params, rows, rng: Encoded(rows.tokens[:, :, 0].astype(jnp.float32) * params["encoder"]),
        objective=Objective(init=lambda rng: {}, loss=loss),
        memory=Bad(where),
        optimizer=optimizer,
        seed=0,
    )
    step = jax.jit(train_step)
    params = {"encoder": jnp.float32(2), "objective": {"scale": jnp.float32(3)}}
    fresh = step_lib.TrainState(jnp.int32(0), params, optimizer.init(params), jnp.float32(0))
    ones = jnp.ones((2, 2, 1, 1), jnp.int32)
    batch = Batch(ones, ones, jnp.array([1, 2]), jnp.ones((2, 2), jnp.int32))
    after, values, _ = step(fresh, batch)
    assert not values["skipped"] and after.params["encoder"] != 2 and after.memory != 0
    again, values, _ = step(after, batch._replace(document=jnp.array([7, 2])))
    assert values["skipped"] and int(again.step) == 2
    shown = {"loss": values["loss"], "gradient": values["gradient_norm"], "parameters": values["parameter_norm"]}
    assert not np.isfinite(shown.get(where, np.nan))
    jax.tree.map(np.testing.assert_array_equal, again._replace(step=0), after._replace(step=0))


def reported(temperature: float = 0.05, skipped: bool = False) -> dict:
    norms = {"loss": np.nan if skipped else 1.0, "gradient_norm": 1.0, "parameter_norm": 1.0}
    return norms | {"temperature": temperature, "skipped": skipped, "batch_digest": "abc"}


def test_a_run_without_a_temperature_is_judged_too() -> None:
    values = {name: value for name, value in reported().items() if name != "temperature"}
    guard.Guard(default_config().guard, warmup_steps=20).steps(1, [values, values])


def test_so_many_skipped_steps_in_a_row_stop_the_run() -> None:
    config = default_config().guard
    config.skipped_in_a_row = 2
    judge = guard.Guard(config, warmup_steps=20)
    judge.steps(1, [reported(), *[reported(skipped=True)] * 2, reported(), *[reported(skipped=True)] * 2])
    judge.steps(7, [reported()])
    judge.steps(8, [reported(skipped=True)])
    with pytest.raises(guard.StoppedError, match=r"3 steps in a row .* 8 \(batch abc\), 9 .*--replay_step=8 "):
        judge.steps(9, [reported(skipped=True)] * 2)


def test_collapse_and_a_leaping_temperature_stop_the_run(caplog: pytest.LogCaptureFixture) -> None:
    config = default_config().guard
    judge = guard.Guard(config, warmup_steps=20)
    sound = {"effective_rank": 100.0, "embedding_std": 0.9}
    for step, std in ((20, 0.05), (100, 0.05), (120, 0.9), (140, 0.05)):
        judge.embeddings(step, sound | {"embedding_std": std})
    assert "step 140: embedding std 0.05, the embeddings collapse" in caplog.text
    assert "step 100:" not in caplog.text  # guard.warmup_steps
    judge.embeddings(160, sound | {"embedding_std": 0.05})
    with pytest.raises(guard.StoppedError, match=r"step 180: embedding std 0.05, .* at 3 log lines in a row"):
        judge.embeddings(180, sound | {"embedding_std": 0.05})
    judge.steps(1, [reported(0.05), reported(0.056)])
    assert "the temperature went from 0.05 to 0.056" in caplog.text
    with pytest.raises(guard.StoppedError, match=r"step 3: the temperature went from 0.056 to 0.09"):
        judge.steps(3, [reported(0.09)])


def test_statistics_of_collapsed_and_of_spread_embeddings() -> None:
    rng = np.random.default_rng(0)
    spread = rng.normal(size=(512, 2, 32))
    spread /= np.linalg.norm(spread, axis=-1, keepdims=True)
    assert metrics.embedding_metrics(spread)["embedding_std"] == pytest.approx(1, abs=0.05)
    one = np.broadcast_to(spread[:1], spread.shape)
    assert metrics.embedding_metrics(one)["embedding_std"] == pytest.approx(0, abs=1e-6)


def run(config: ConfigDict, workdir: pathlib.Path) -> None:
    contrastive_jax.train(config, workdir)


def test_a_recipe_made_to_diverge_is_stopped(dataset: pathlib.Path, tmp_path: pathlib.Path) -> None:
    config = shrink(recipe("debug"), dataset)
    config.steps, config.log_every, config.checkpoint_every = 20, 5, 2
    config.optim.learning_rate, config.optim.warmup_steps, config.optim.clip_norm = 1e38, 0, 0.0
    config.guard.skipped_in_a_row = 4
    with pytest.raises(guard.StoppedError, match=r"5 steps in a row .*: 1 \(batch [0-9a-f]{32}\), 2 "):
        run(config, tmp_path)


def test_a_temperature_that_runs_away_is_stopped(dataset: pathlib.Path, tmp_path: pathlib.Path) -> None:
    config = shrink(recipe("debug"), dataset)
    config.steps, config.log_every = 20, 5
    config.optim.learning_rate_rules = (("log_temperature", 1000.0), *config.optim.learning_rate_rules)
    with pytest.raises(guard.StoppedError, match=r"the temperature went from .* config.guard.temperature_jump_stop=1.5"):
        run(config, tmp_path)


def test_a_recipe_made_to_collapse_is_stopped(dataset: pathlib.Path, tmp_path: pathlib.Path) -> None:
    config = shrink(recipe("siglip"), dataset)
    config.steps, config.log_every, config.guard.warmup_steps = 200, 10, 5
    config.objective.mask_margin, config.optim.learning_rate = -3.0, 0.02  # nothing is a negative: all may become one
    with pytest.raises(guard.StoppedError, match=r"the embeddings collapse: below config.guard"):
        run(config, tmp_path)
    assert not (tmp_path / "checkpoints" / "200").exists()


def test_a_step_is_replayed(dataset: pathlib.Path, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    config = shrink(recipe("debug"), dataset)
    config.steps, config.checkpoint_every, config.model.dropout = 5, 2, 0.1
    run(config, tmp_path)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with caplog.at_level("INFO", logger="absl"):
        loop.replay(loop.set_up(config, epath.Path(tmp_path)), 4)
    with pytest.raises(UserError, match=r"--replay_step=0: must be at least 1"):
        loop.replay(loop.set_up(config, epath.Path(tmp_path)), 0)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    # A step with a NaN, after one without: JAX runs it again to find the operation.
    setup = loop.set_up(config, epath.Path(tmp_path))

    def nan_at_4(state: step_lib.TrainState, batch: Batch) -> tuple:
        nan = jnp.where(state.step == 3, jnp.nan, 0.0)
        state, values, z = setup.run.train_step(state, batch)
        return state, values | {"loss": values["loss"] + nan}, z

    run_with_nan = setup.run._replace(train_step=jax.jit(nan_at_4, donate_argnums=0))
    with pytest.raises(FloatingPointError):
        loop.replay(setup._replace(run=run_with_nan), 4)
    digest = caplog.text.rpartition(" batch digest: ")[2].split()[0]
    assert f'"batch_digest": "{digest}"' in lines[3]
    assert "replayed step 4, starting from the state of step 2: no NaN" in caplog.text
