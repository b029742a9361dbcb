"""The value and the gradient of every recipe's compiled step, at its own sizes, against the same program in float64."""

from collections.abc import Iterator

import float64
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import AS_USERS, SMALL_RECIPES, recipe
from ml_collections import ConfigDict

from contrastive_jax.data import pieces
from contrastive_jax.data.batch import Batch
from contrastive_jax.runtime import sharding
from contrastive_jax.training import build, optim

VOCABULARY = 2048
# A batch of so many pairs of two rows of 64 tokens has more tokens than XLA's wrong sums began at: 32,768.
PAIRS = 320


def make_config(name: str, argument: str) -> ConfigDict:
    """The recipe at its own sizes, but for the number of pairs where that is large, and in float32."""
    config = recipe(name, *[argument] * bool(argument))
    config.model.products = "float32"
    config.xla_options = (*config.xla_options, *AS_USERS)
    if config.data.batch_size > PAIRS:
        config.micro_batch = PAIRS // 2 if config.micro_batch else 0
        config.data.batch_size = PAIRS
    config.mesh.update(data=1, fsdp=1, tensor=1)
    return config


def make_batch(config: ConfigDict, shapes: Batch) -> Batch:
    """Texts of half a row or more, whose pairs share half of their tokens."""
    rng = np.random.default_rng(0)
    n, views, _, length = shapes.tokens.shape
    common = rng.integers(8, VOCABULARY, (n, 1, 1, length))
    own = rng.integers(8, VOCABULARY, (n, views, 1, length))
    filled = np.arange(length) < rng.integers(length // 2, length + 1, (n, views, 1, 1))
    tokens = np.where(rng.random(own.shape) < 0.5, common, own) * filled
    labels = None if shapes.label is None else (np.arange(n) % 2).astype(np.float32)
    scores = None if shapes.scores is None else rng.normal(size=shapes.scores.shape).astype(np.float32)
    hashes = rng.integers(0, 2**31, shapes.span_hash.shape)
    arrays = (tokens, filled.astype(np.int32), np.arange(n), hashes)
    return Batch(*(jnp.asarray(x, jnp.int32) for x in arrays), labels, scores)


# The temperature's gradient is a sum that nearly cancels: its error was 1.02e-5 of it with rounding alone.
NEARLY_CANCELS = pytest.mark.xfail(strict=False, reason="rounding of the gradient of the temperature")
# The recipe `pairs` has the sizes of modern_base: in float64 its step takes more time and memory than a machine of 2 cores has.
CHECKED = [each for each in SMALL_RECIPES if each[0] != "pairs"]
MARKED = [pytest.param(*each, marks=[NEARLY_CANCELS] * (each == ("mixers", "bilstm"))) for each in CHECKED]


@pytest.fixture(autouse=True)
def forget_programs() -> Iterator[None]:
    """JAX keeps a program per operation and shape that is evaluated alone: those of all recipes would fill the memory."""
    yield
    jax.clear_caches()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "argument"), MARKED)
def test_loss_and_gradient_of_a_step_are_those_of_float64(name: str, argument: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # An optimiser whose state is the gradient, so that the step returns it.
    monkeypatch.setattr(optim, "make_optimizer", lambda *_: optax.trace(decay=0.0))
    config = make_config(name, argument)
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    rng = np.random.default_rng(1)
    tables = pieces.Tables(*(rng.random(VOCABULARY) < share for share in (0.6, 0.05, 0.6)))
    run = build.build(config, mesh, VOCABULARY, tables=tables)
    batch, state = make_batch(config, build.batch_shapes(config, mesh)), run.init()
    program, shapes = jax.make_jaxpr(run.train_step, return_shape=True)(state, batch)
    exact_state, exact_metrics, _ = jax.tree.unflatten(
        jax.tree.structure(shapes), float64.evaluate(program, jax.tree.leaves((state, batch)))
    )
    state, metrics, _ = run.train_step(state, batch)
    gradients = jax.tree_util.tree_leaves_with_path(state.opt_state.trace)
    exact_gradients = jax.tree.leaves(exact_state.opt_state.trace)
    whole = np.sqrt(sum(np.square(x).sum() for x in exact_gradients))
    errors = {"loss": abs(float(metrics["loss"]) / float(exact_metrics["loss"]) - 1)}
    for (path, ours), exact in zip(gradients, exact_gradients, strict=True):
        # The gradient of a key's bias, for example, is 0: what rounding leaves of it is compared with the whole gradient.
        difference = np.linalg.norm(np.asarray(ours, np.float64) - exact)
        errors[sharding.path_of(path)] = difference / max(np.linalg.norm(exact), 1e-3 * whole)
    assert whole > 0 and {path: error for path, error in errors.items() if not error < 1e-5} == {}
