"""Files on an object store, at the emulators."""

import pathlib

import pytest
from cloud.emulators import listing
from etils import epath
from jax._src.lru_cache import LRUCache

from contrastive_jax import files


def test_only_local_names_become_absolute(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")
    expected = {"runs/a": f"{tmp_path}/runs/a", "~/b": "/home/somebody/b", "gs://b/r": "gs://b/r", "s3://b/r": "s3://b/r"}
    assert {name: str(files.absolute(name)) for name in expected} == expected
    assert files.absolute(files.absolute("gs://b/r")) == epath.Path("gs://b/r")


def test_a_file_on_a_bucket_is_written_and_read(bucket: str) -> None:
    path = epath.Path(bucket) / "runs" / "1" / "a.txt"
    path.write_text("text")
    assert listing(bucket) == {"runs/1/a.txt": 4}
    assert listing(f"{bucket}/runs/2") == {}
    assert path.read_text() == "text"


def test_jax_keeps_compiled_programs_on_a_bucket(bucket: str) -> None:
    folder = f"{bucket}/run/compiled"
    LRUCache(folder, max_size=-1).put("program", b"code")
    assert LRUCache(folder, max_size=-1).get("program") == b"code"
    assert all(name.startswith("run/compiled/program") for name in listing(bucket))
