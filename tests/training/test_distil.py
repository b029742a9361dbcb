"""A run that learns from another model: its embeddings, its token predictions, and some of its blocks."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import recipe, shrink
from etils import epath
from ml_collections import ConfigDict

from contrastive_jax.config import UserError
from contrastive_jax.data import pipeline, prepared, tokenizer
from contrastive_jax.data.batch import Batch
from contrastive_jax.inference import text_model
from contrastive_jax.objectives import distillation, tokens
from contrastive_jax.runtime import checkpoint, sharding
from contrastive_jax.training import build, loop, warm_start


@pytest.fixture(scope="module")
def data(dataset: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The dataset with the hash of its tokenizer, which whoever starts from a model is asked for."""
    copy = shutil.copytree(dataset, tmp_path_factory.mktemp("distil") / "data")
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["tokenizer_sha256"] = tokenizer.load(copy).sha256
    (copy / "manifest.json").write_text(json.dumps(manifest))
    return copy


@pytest.fixture(scope="module")
def teacher(data: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A run of three blocks of width 24, with a head of tokens."""
    workdir = tmp_path_factory.mktemp("teacher")
    config = shrink(recipe("debug"), data)
    config.model.update(num_layers=3, d_model=24, init_std=0.2, zero_init_branches=False, pooling="max", embedding_dim=12)
    config.model.update(remat="full", saved=(("query", 2),), scan=False)  # which a student need not know
    config.noise.ops, config.tokens.name, config.tokens.head = (("mask", 0.15),), "mlm", "mlp"
    loop.train(loop.set_up(config, epath.Path(workdir)), 2)
    return workdir


def student(data: pathlib.Path, source: str = "") -> ConfigDict:
    config = shrink(recipe("debug"), data)
    config.model.update(init_std=0.2, zero_init_branches=False)
    config.objective.name, config.memory.kind, config.memory.source = "similarity", "frozen", source
    return config


def first_batch(config: ConfigDict, mesh: jax.sharding.Mesh) -> Batch:
    host = next(pipeline.batches(prepared.open_split(config.data.dir, "train"), config.data, 0))
    return sharding.to_global(host, np.arange(16), 16, mesh)


def unit(rng: np.random.Generator, *shape: int) -> np.ndarray:
    x = rng.normal(size=shape)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_row56_similarity_is_the_mean_square_of_all_cosines_whatever_the_widths() -> None:
    rng = np.random.default_rng(0)
    v, t = unit(rng, 40, 6), unit(rng, 40, 11)
    difference = v @ v.T - t @ t.T
    value, gradient = jax.value_and_grad(distillation.mean_square)(jnp.float32(v), jnp.float32(t))
    np.testing.assert_allclose(value, (difference**2).mean(), rtol=2e-6)
    np.testing.assert_allclose(gradient, 4 * difference @ v / 40**2, rtol=1e-5, atol=1e-8)
    rotation = np.linalg.qr(rng.normal(size=(11, 11)))[0]
    np.testing.assert_allclose(distillation.mean_square(jnp.float32(v), jnp.float32(t @ rotation)), value, rtol=2e-6)
    # The same vectors have the loss 0, and a rotation of them no gradient either, but for rounding.
    for same, bound in ((t, 0), (t @ rotation, 5e-7)):
        value, gradient = jax.value_and_grad(distillation.mean_square)(jnp.float32(same), jnp.float32(t))
        assert abs(value) <= bound and np.abs(gradient).max() < 1e-7


def test_row56_a_student_equal_to_its_teacher_learns_nothing(dataset: pathlib.Path) -> None:
    config = student(dataset)
    config.model.dropout = 0.0
    mesh = sharding.make_mesh(config.mesh)
    run = build.build(config, mesh, 320)
    _, metrics, _ = run.train_step(run.init(), first_batch(config, mesh))
    assert abs(metrics["loss"]) < 1e-5 and metrics["gradient_norm"] < 1e-5


def test_row56_a_teacher_of_another_size_stays_as_it_was(
    data: pathlib.Path, teacher: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    config = student(data, f"{teacher}@2")
    config.model.update(remat="full", saved=(("query", 1),), scan=True)  # all blocks of the student, but not of the teacher
    config.steps = 10
    setup = loop.set_up(config, epath.Path(tmp_path))
    start = loop.restore_or_init(setup, checkpoint.Checkpoints(epath.Path(tmp_path)))
    source = text_model.load(str(teacher))
    jax.tree.map(
        np.testing.assert_array_equal, jax.device_get(start.memory["target"]["encoder"]), jax.device_get(source.params)
    )
    in_optimizer = [x.shape for x in jax.tree.leaves(start.opt_state)]
    assert (384, 16) in in_optimizer and (384, 24) not in in_optimizer
    # The loss is that of the teacher's vectors: its own pooling and projection, without dropout.
    batch = first_batch(config, setup.run.mesh)
    given = []
    for model, params in ((setup.run.encoder, start.params["encoder"]), (source.encoder, source.params)):
        rows = (np.asarray(x)[:, :, 0].reshape(-1, x.shape[-1]) for x in (batch.tokens, batch.segment))
        given.append(np.float64(model.apply(jax.device_get(params), *rows)))
    expected = 100 * np.square(given[0] @ given[0].T - given[1] @ given[1].T).mean()
    config.model.dropout = 0.0
    still = build.build(config, setup.run.mesh, 320)
    _, metrics, _ = still.train_step(jax.tree.map(jnp.copy, start), batch)
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-4)
    # After ten steps of the loop.
    assert loop.train(setup, 10) == 10
    end = loop.restore_or_init(setup, checkpoint.Checkpoints(epath.Path(tmp_path)))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(end.memory["target"]["encoder"]), jax.device_get(source.params))
    losses = [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines() if "loss" in line]
    assert losses[-1] < 0.9 * losses[0]


GUIDED = {"name": "infonce", "mask_guide": True, "mask_margin": 0.0, "extra": (("embedding", 0.5), ("spread_square", 1.0))}


@pytest.mark.parametrize("changes", [{}, GUIDED], ids=["similarity", "guided"])
def test_row56_one_and_eight_devices_and_micro_batches_agree(changes: dict, data: pathlib.Path, teacher: pathlib.Path) -> None:
    seen = []
    for devices, micro_batch, fsdp in ((1, 0, 1), (8, 8, 2)):
        config = student(data, str(teacher))
        config.mesh.update(data=devices // fsdp, fsdp=fsdp)
        config.micro_batch, config.model.embedding_dim = micro_batch, 12  # as wide as the teacher's
        config.objective.update(changes)
        mesh = sharding.make_mesh(config.mesh, jax.devices()[:devices])
        run = build.build(config, mesh, 320)
        state = run.init((), warm_start.teacher_params(config, prepared.load_manifest(config.data.dir), mesh))
        state, metrics, _ = run.train_step(state, first_batch(config, mesh))
        seen.append((metrics["loss"], metrics["gradient_norm"], state.params["encoder"]["transformer"]["embedding"]))
    for other in seen[1:]:
        for a, b in zip(seen[0], other, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_row56_resume_is_exact(data: pathlib.Path, teacher: pathlib.Path, tmp_path: pathlib.Path) -> None:
    config = student(data, str(teacher))
    config.model.dropout = 0.3
    for name, stops in (("whole", [4]), ("parts", [2, 4])):
        for stop in stops:
            loop.train(loop.set_up(config, epath.Path(tmp_path / name)), stop)
    ends = []
    for name in ("whole", "parts"):
        setup = loop.set_up(config, epath.Path(tmp_path / name))
        ends.append(loop.restore_or_init(setup, checkpoint.Checkpoints(epath.Path(tmp_path / name))))
    jax.tree.map(np.testing.assert_array_equal, *(jax.device_get(state) for state in ends))


def test_row56_blocks_of_another_model(data: pathlib.Path, teacher: pathlib.Path, tmp_path: pathlib.Path) -> None:
    config = shrink(recipe("debug"), data)
    config.init_from, config.init_layers, config.model.embedding_dim = str(teacher), (0, 2), 12
    config.model.products = "bfloat16"  # how a run computes is its own choice
    setup = loop.set_up(config, epath.Path(tmp_path))
    assert setup.config.model.num_layers == 2 and config.model.num_layers == 1  # the caller's is as it was
    assert setup.config.model.products == "bfloat16"
    state = loop.restore_or_init(setup, checkpoint.Checkpoints(epath.Path(tmp_path)))
    ours, theirs = (jax.device_get(p) for p in (state.params["encoder"], text_model.load(str(teacher)).params))
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a, b[[0, 2]]), *(p["transformer"].pop("blocks") for p in (ours, theirs))
    )
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_row56_what_does_not_go_together_is_named(data: pathlib.Path, teacher: pathlib.Path, tmp_path: pathlib.Path) -> None:
    def refused(message: str, config: ConfigDict, **keys: object) -> None:
        config.update_from_flattened_dict({key.replace("__", "."): value for key, value in keys.items()})
        with pytest.raises(UserError, match=message):
            loop.set_up(config, epath.Path(tmp_path))

    refused("^config.objective: 'similarity' needs a target; set", student(data), memory__kind="")
    refused(
        "^config.memory.source=.*: only a frozen target is another model", student(data, str(teacher)), memory__kind="average"
    )
    refused("^config.memory.source: nowhere: no config.json", student(data, "nowhere"))
    narrow, folder = token_student(data, str(teacher)), token_student(data)
    refused("^config.tokens.distil: a teacher of width 24 has no cosine with states of width 16", narrow, model__d_model=16)
    refused("^config.tokens.distil=.*: give weights of mlm, kl and cosine", token_student(data), tokens__distil=(("ce", 1.0),))
    refused("^config.tokens.name='distil': needs a teacher", folder, memory__kind="average")
    refused(r"^config.init_layers=\(0,\): there is no model to take", student(data), init_layers=(0,))
    refused(r"^config.init_layers=\(0, 3\): .* has 3 blocks", student(data), init_layers=(0, 3), init_from=str(teacher))


def token_student(data: pathlib.Path, source: str = "") -> ConfigDict:
    config = student(data, source)
    config.objective.weight, config.tokens.name, config.tokens.head = 0.0, "distil", "mlp"
    config.noise.ops, config.model.d_model, config.model.dropout = (("mask", 0.3),), 24, 0.0
    return config


def test_row56_predictions_and_states_of_a_teacher_equal_the_dense_formula() -> None:
    rng, (n, length, d, w, rows) = np.random.default_rng(0), (5, 7, 8, 20, 32)
    config = token_student(pathlib.Path("unused"))
    config.tokens.head = "linear"
    table, states, of_teacher, table_of_teacher = (
        rng.normal(size=size) for size in ((rows, d), (n, length, d), (n, length, d), (rows, d))
    )
    real = np.arange(length) < np.array([[7], [4], [5], [6], [3]])
    picked, token = real & (rng.random((n, length)) < 0.4), rng.integers(0, w, (n, length))
    bias, bias_of_teacher = rng.normal(size=(2, w))
    heads = [{"hidden": {}, "bias": jnp.float32(x)} for x in (bias, bias_of_teacher)]
    seen = tokens.Teacher(heads[1], jnp.float32(table_of_teacher), jnp.float32(of_teacher))
    targets = tokens.Targets(jnp.array(picked), jnp.array(token), jnp.array(real), seen)

    def logsoftmax(x: np.ndarray) -> np.ndarray:
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    ours, theirs = states @ table[:w].T + bias, of_teacher @ table_of_teacher[:w].T + bias_of_teacher
    p, q = logsoftmax(theirs / 2), logsoftmax(ours / 2)
    kl = (np.exp(p) * (p - q)).sum(-1)[real].mean()
    mlm = -np.take_along_axis(logsoftmax(ours), token[..., None], -1)[..., 0][picked].mean()
    norms = np.linalg.norm(states, axis=-1) * np.linalg.norm(of_teacher, axis=-1)
    cosine = ((states * of_teacher).sum(-1) / norms)[real].mean()
    for weights, expected in (
        ((("kl", 5.0), ("mlm", 2.0), ("cosine", 1.0)), 5 * 4 * kl + 2 * mlm + 1 - cosine),
        ((("kl", 1.0), ("cosine", 0.0)), 4 * kl),
    ):
        config.tokens.distil = weights
        loss = tokens.make_token_loss(config, d, w)
        assert loss is not None
        value, metrics = tokens.mean(loss.loss(heads[0], jnp.float32(table), jnp.float32(states), targets))
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        right = (ours.argmax(-1) == token)[picked] if len(weights) == 3 else (ours.argmax(-1) == theirs.argmax(-1))[real]
        np.testing.assert_allclose(metrics["token_accuracy"], right.mean(), rtol=1e-6)
    # A student equal to its teacher learns from the masked tokens alone.
    config.tokens.distil = (("kl", 5.0), ("cosine", 1.0))
    loss = tokens.make_token_loss(config, d, w)
    assert loss is not None
    targets = targets._replace(teacher=tokens.Teacher(heads[0], jnp.float32(table), jnp.float32(states)))
    value, gradient = jax.value_and_grad(lambda x: tokens.mean(loss.loss(heads[0], jnp.float32(table), x, targets))[0])(
        jnp.float32(states)
    )
    assert abs(value) < 1e-6 and np.abs(gradient).max() < 1e-6


@pytest.mark.slow
def test_row56_a_step_learns_the_teachers_predictions_on_any_mesh(data: pathlib.Path, teacher: pathlib.Path) -> None:
    seen = []
    for devices, micro_batch in ((1, 0), (8, 8)):
        config = token_student(data, str(teacher))
        config.mesh.data, config.micro_batch = devices, micro_batch
        mesh = sharding.make_mesh(config.mesh, jax.devices()[:devices])
        run = build.build(config, mesh, 320)
        source = warm_start.teacher_params(config, prepared.load_manifest(config.data.dir), mesh)
        state = run.init((), source)
        assert state.memory["target"].keys() >= {"encoder", "tokens"}
        jax.tree.map(np.testing.assert_array_equal, state.memory["target"]["tokens"], source["tokens"])
        state, metrics, _ = run.train_step(state, first_batch(config, mesh))
        assert {"kl_loss", "mlm_loss", "cosine_loss"} <= metrics.keys()
        seen.append((metrics["loss"], metrics["gradient_norm"], state.params["encoder"]["transformer"]["embedding"]))
    for a, b in zip(*seen, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
