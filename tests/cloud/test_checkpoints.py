"""Checkpoints on an object store, at the emulators."""

import contextlib
import logging as std_logging

import jax
import numpy as np
import pytest
from cloud.emulators import listing
from etils import epath

from contrastive_jax import files
from contrastive_jax.runtime import checkpoint, digest, sharding

TREE = {"table": np.arange(64.0, dtype=np.float32).reshape(8, 8), "layer": {"bias": np.full(8, 2, np.float32)}}


def params(factor: float = 1.0) -> dict:
    return jax.device_put(jax.tree.map(lambda leaf: leaf * np.float32(factor), TREE), spread())


def spread() -> jax.NamedSharding:
    return jax.NamedSharding(sharding.all_devices_mesh(), jax.P("data"))


def shapes() -> dict:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=spread()), TREE)


def steps_on(bucket: str, folder: str = "checkpoints") -> set[str]:
    return {name.split("/")[2] for name in listing(bucket) if name.startswith(f"run/{folder}/")}


def test_a2_a_workdir_on_a_bucket_keeps_its_name() -> None:
    assert str(files.absolute("gs://b/r") / "checkpoints") == "gs://b/r/checkpoints"


def test_a2_checkpoints_are_saved_restored_kept_and_set_aside(bucket: str, caplog: pytest.LogCaptureFixture) -> None:
    workdir = f"{bucket}/run"
    with (
        caplog.at_level(std_logging.INFO, logger="absl"),
        contextlib.closing(checkpoint.Checkpoints(workdir, keep=2)) as checkpoints,
    ):
        assert str(checkpoints.directory) == f"{workdir}/checkpoints"
        for step, score in enumerate([0.1, 0.9, 0.2, 0.3], 1):
            checkpoints.save(step, {"score": score}, params=params(step), opt_state=params())
        checkpoints.wait()
    assert [f"checkpoint {step} is complete" in caplog.text for step in range(1, 6)] == [True] * 4 + [False]
    assert steps_on(bucket) == {"2", "3", "4"}  # the newest two and the best

    with contextlib.closing(checkpoint.Checkpoints(workdir, keep=2)) as checkpoints:
        assert (checkpoints.steps(), checkpoints.best(), checkpoints.latest()) == ([2, 3, 4], 2, 4)
        restored = checkpoints.restore(4, params=shapes())["params"]
        assert digest.hash_tree(restored) == digest.hash_tree(params(4))
        assert checkpoints.verify(2) == 2 * sum(leaf.nbytes for leaf in jax.tree.leaves(TREE))
        before = {name: size for name, size in listing(bucket).items() if name.startswith("run/checkpoints/4/")}
        checkpoints.set_aside(4)
        assert checkpoints.steps() == [2, 3]
    after = {name: size for name, size in listing(bucket).items() if name.startswith("run/damaged/")}
    assert after == {name.replace("checkpoints", "damaged"): size for name, size in before.items()}
    assert steps_on(bucket) == {"2", "3"}

    unchanged = listing(bucket)
    reader = checkpoint.Checkpoints(workdir, read_only=True)
    assert (reader.steps(), reader.best()) == ([2, 3], 2)
    assert listing(bucket) == unchanged


def test_a_checkpoint_without_its_last_file_does_not_count(bucket: str) -> None:
    workdir = epath.Path(bucket) / "run"
    with contextlib.closing(checkpoint.Checkpoints(workdir)) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, {}, params=params(step))
    for step in (2, 3):
        (workdir / "checkpoints" / str(step) / "commit_success.txt").unlink()  # as if the process had been killed before
    assert checkpoint.Checkpoints(workdir, read_only=True).steps() == [1]
    with contextlib.closing(checkpoint.Checkpoints(workdir)) as checkpoints:
        assert checkpoints.steps() == [1]
        checkpoints.save(3, {}, params=params(4))
        checkpoints.wait()
        assert checkpoints.verify(3)
    assert steps_on(bucket) == {"1", "3"}  # what is not whole takes no room


def test_a_damaged_object_is_found(bucket: str) -> None:
    workdir = epath.Path(bucket) / "run"
    with contextlib.closing(checkpoint.Checkpoints(workdir)) as checkpoints:
        checkpoints.save(1, {}, params=params())
    for name in listing(bucket):
        if "/params/" in name and "/d/" in name:
            (epath.Path(bucket) / name).write_bytes(b"\0" * 100)
    with pytest.raises(checkpoint.DamagedError, match="checkpoints/1"):
        checkpoint.Checkpoints(workdir, read_only=True).restore(1, params=shapes())
