"""A damaged file never becomes a model; a run does not go on as another one by mistake."""

import contextlib
import errno
import gc
import pathlib
import shutil
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import recipe, shrink
from etils import epath
from ml_collections import ConfigDict

from contrastive_jax import files as files_lib
from contrastive_jax.commands import verify
from contrastive_jax.config import UserError
from contrastive_jax.runtime import checkpoint, digest, sharding
from contrastive_jax.training import loop

# Readers that Orbax leaves behind when one of them fails.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def test_a_digest_depends_on_values_and_places_and_not_on_the_layout() -> None:
    rng = np.random.default_rng(0)
    for kind in (np.float32, np.int32, jnp.bfloat16, bool):
        normal = rng.normal(size=(8, 6)) * 3
        x = jnp.asarray(normal > 0 if kind is bool else normal, kind)
        plain = digest.hash_tree({"x": x})
        for spec in (jax.P("data"), jax.P(("data", "fsdp")), jax.P("fsdp", "tensor"), jax.P()):
            mesh = sharding.make_mesh(ConfigDict({"data": 2, "fsdp": 2, "tensor": 2}))
            assert digest.hash_tree({"x": jax.device_put(x, jax.NamedSharding(mesh, spec))}) == plain
        other = x.at[3, 4].set(~x[3, 4] if kind is bool else x[3, 4] + 1)
        assert digest.hash_tree({"x": other}) != plain
        assert digest.hash_tree({"x": x[::-1]}) != plain
    assert digest.hash_tree({"x": jnp.float32(0)}) != digest.hash_tree({"x": jnp.float32(-0.0)})
    assert (
        digest.combine_hashes({"a": "1", "b": "2"})
        == digest.combine_hashes({"b": "2", "a": "1"})
        != digest.combine_hashes({"a": "2", "b": "1"})
    )


@pytest.fixture(autouse=True)
def leave_nothing() -> Iterator[None]:
    """What Orbax left behind complains here, under this file's filter, and not in a test to come."""
    yield
    gc.collect()


@pytest.fixture(scope="module")
def trained(dataset: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[ConfigDict, pathlib.Path]:
    """A run with checkpoints 2 and 4."""
    config, workdir = shrink(recipe("moco"), dataset), tmp_path_factory.mktemp("trained")
    config.update(steps=4, checkpoint_every=2)
    loop.train(loop.set_up(config, epath.Path(workdir)), 4)
    return config, workdir


def files_of(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def damage(path: pathlib.Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    else:
        for place in np.linspace(0, len(content) - 1, 5).astype(int):
            content[place] ^= 0x5A
        path.write_bytes(content)


def check_damage(trained: tuple[ConfigDict, pathlib.Path], tmp_path: pathlib.Path, how: str, files: list[pathlib.Path]) -> int:
    """Damages one file of checkpoint 4 after the other; returns how often the run went back to checkpoint 2."""
    config, workdir = trained
    setup = loop.set_up(config, epath.Path(tmp_path / "other"))
    sound = checkpoint.Checkpoints(workdir, read_only=True)
    expected = {step: sound.restore(step, **loop.items_of(setup.run.shapes)) for step in (2, 4)}
    expected = {step: {name: digest.hash_tree(tree) for name, tree in items.items()} for step, items in expected.items()}
    went_back = 0
    for file in files:
        copy = tmp_path / "copy"
        shutil.copytree(workdir, copy)
        damage(copy / file.relative_to(workdir), how)
        checkpoints = checkpoint.Checkpoints(copy)
        state = loop.restore_or_init(setup, checkpoints)
        reached = int(state.step)
        went_back += reached == 2
        assert {name: digest.hash_tree(tree) for name, tree in loop.items_of(state).items()} == expected[reached], file
        assert (copy / "damaged" / "4").exists() == (reached == 2)
        checkpoints.close()
        shutil.rmtree(copy)
    return went_back


@pytest.mark.slow
@pytest.mark.parametrize("how", ["missing", "truncated", "changed"])
def test_damage_of_any_file_is_seen_or_harmless(
    how: str, trained: tuple[ConfigDict, pathlib.Path], tmp_path: pathlib.Path
) -> None:
    files = files_of(trained[1] / "checkpoints" / "4")
    assert 4 <= check_damage(trained, tmp_path, how, files) <= len(files)


def test_damage_sends_the_run_back_to_the_checkpoint_before(
    trained: tuple[ConfigDict, pathlib.Path], tmp_path: pathlib.Path
) -> None:
    files = files_of(trained[1] / "checkpoints" / "4" / "opt_state")
    largest = max(files, key=lambda path: path.stat().st_size)
    assert check_damage(trained, tmp_path, "changed", [largest]) == 1


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ESTALE, "Stale file handle", "params"),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes"),
        ValueError('PERMISSION: Error opening "zarr" driver: [OS error 13: Permission denied]'),
        MemoryError(),
    ],
)
def test_what_the_machine_refuses_is_no_damage(
    error: Exception, trained: tuple[ConfigDict, pathlib.Path], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, workdir = trained
    copy = shutil.copytree(workdir, tmp_path / "copy")
    setup, checkpoints = loop.set_up(config, epath.Path(copy)), checkpoint.Checkpoints(copy)

    def restore(*args: object, **values: object) -> None:
        raise error

    monkeypatch.setattr(checkpoints._handlers["params"], "restore", restore)
    with pytest.raises(files_lib.MachineError, match="checkpoints/4: cannot be read .*; it stays as it is"):
        loop.restore_or_init(setup, checkpoints)
    assert checkpoints.steps() == [2, 4] and not (copy / "damaged").exists()
    checkpoints.close()


def test_processes_wait_until_they_see_the_same_checkpoints(
    trained: tuple[ConfigDict, pathlib.Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other process sees the newest checkpoint of a shared folder late, or never."""
    checkpoints, slept, late = checkpoint.Checkpoints(trained[1], read_only=True), list[int](), 2

    def gather(own: np.ndarray) -> np.ndarray:
        return np.stack([own, own if len(slept) > late else own ^ 1])

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(checkpoint.multihost_utils, "process_allgather", gather)
    monkeypatch.setattr(checkpoint.time, "sleep", slept.append)
    checkpoints._wait_for_same_steps()
    assert slept == [0, 1, 9]
    late = 100
    with pytest.raises(files_lib.MachineError, match=r"the processes see different checkpoints .*process 0 sees \[2, 4\]"):
        checkpoints._wait_for_same_steps()


def test_what_a_killed_process_had_written_is_deleted(trained: tuple[ConfigDict, pathlib.Path], tmp_path: pathlib.Path) -> None:
    _, workdir = trained
    copy = shutil.copytree(workdir, tmp_path / "copy")
    left = copy / "checkpoints" / "3.orbax-checkpoint-tmp"
    left.mkdir()
    (left / "part").write_text("half")
    checkpoint.Checkpoints(copy, read_only=True)
    assert left.exists()
    with contextlib.closing(checkpoint.Checkpoints(copy)) as checkpoints:
        checkpoints.save(6, {}, params={"x": jnp.ones(3)})
    assert not left.exists()
    assert checkpoint.Checkpoints(copy, read_only=True).steps() == [2, 4, 6]


def test_strict_stops_at_damage_and_verify_reports_it(
    trained: tuple[ConfigDict, pathlib.Path], tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    config, workdir = trained
    shutil.copytree(workdir, tmp_path / "copy")
    largest = max(files_of(tmp_path / "copy" / "checkpoints" / "4" / "params"), key=lambda path: path.stat().st_size)
    damage(largest, "changed")
    setup = loop.set_up(config, epath.Path(tmp_path / "copy"), strict=True)
    with pytest.raises(checkpoint.DamagedError, match=r"checkpoints/4"):
        loop.restore_or_init(setup, checkpoint.Checkpoints(tmp_path / "copy"))
    for folder, is_whole, phrases in (
        (workdir, True, ("2: whole", "4: whole")),
        (tmp_path / "copy", False, ("2: whole", "DAMAGED: ")),
    ):
        assert verify.verify(epath.Path(folder)) == is_whole
        out = capsys.readouterr().out
        assert all(phrase in out for phrase in phrases), out
    with pytest.raises(UserError, match="no checkpoints/ there"):
        verify.verify(epath.Path(tmp_path))


def test_b9_another_run_or_other_batches_are_refused(trained: tuple[ConfigDict, pathlib.Path]) -> None:
    config, workdir = trained[0].copy_and_resolve_references(), trained[1]
    config.model.d_ff = 48
    with pytest.raises(
        UserError, match=r"does not fit this config: .*mlp.* is float32\[1,32,16\] there, float32\[1,48,16\] here"
    ):
        loop.restore_or_init(loop.set_up(config, epath.Path(workdir)), checkpoint.Checkpoints(workdir))
    config.model.d_ff, config.data.batch_size, config.memory.queue = 32, 24, 2
    with pytest.raises(UserError, match="config.data.batch_size=24: this run has 16 so far"):
        loop.restore_or_init(loop.set_up(config, epath.Path(workdir)), checkpoint.Checkpoints(workdir))
    before = (workdir / "config.json").read_text()
    with pytest.raises(UserError):
        loop.train(loop.set_up(config, epath.Path(workdir)), 5)
    assert (workdir / "config.json").read_text() == before  # a refused run changes nothing
    config.data.batch_size, config.memory.queue = 16, trained[0].memory.queue
    setup = loop.set_up(config, epath.Path(workdir))
    for path, value in (("seed", 7), ("data.weights", (("a", 1.0),)), ("data.max_span", 19), ("data.shuffle_records", 9)):
        changed = config.copy_and_resolve_references()
        changed.update_from_flattened_dict({path: value})
        with pytest.raises(UserError, match=f"config.{path}=.*: this run has .* so far; restore it, or say --other_data"):
            loop.restore_or_init(setup._replace(config=changed), checkpoint.Checkpoints(workdir))
    other = setup._replace(manifest=setup.manifest | {"content_hash": "other"})
    with pytest.raises(UserError, match="holds other data than this run had"):
        loop.restore_or_init(other, checkpoint.Checkpoints(workdir))
    assert int(loop.restore_or_init(other._replace(other_data=True), checkpoint.Checkpoints(workdir)).step) == 4
