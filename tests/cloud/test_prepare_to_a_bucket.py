"""The command prepare with its output on a bucket: interrupted, continued, and kept apart from other runs."""

import json
import os
import pathlib
import socket
import time
import types
from collections.abc import Callable
from typing import Any

import pytest
from cloud.emulators import listing
from conftest import fail_after
from etils import epath

from contrastive_jax.config import UserError
from contrastive_jax.data.preparation import driver, engine, prepare, workspace
from contrastive_jax.files import MachineError


@pytest.fixture
def given(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Arguments of prepare, for documents of some five parts."""
    monkeypatch.setattr(driver, "PART_BYTES", (2000, 2000))
    monkeypatch.setattr(workspace, "SETTLE_SECONDS", 0.01)
    texts = [" ".join(str(n * n % 1000 + k) for k in range(60)) for n in range(40)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return {"input": f"{tmp_path}/a.jsonl", "validation_fraction": 0.2, "vocab_size": 300, "record_tokens": 64, "workers": 1}


def test_a_run_goes_on_and_makes_what_a_local_one_makes(
    bucket: str, given: dict, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = prepare.prepare(tmp_path / "local", **given)
    for tasks in (4, 5):  # in the stages hash and token
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(engine.LocalEngine, "map", fail_after(tasks))
            prepare.prepare(f"{bucket}/data", **given)
        assert {"data/.incomplete", "data/.work/tasks/hash-00000.json"} <= set(listing(bucket))
        assert "data/manifest.json" not in listing(bucket)
    assert prepare.prepare(f"{bucket}/data", **given) == local
    files = {f"data/{path.relative_to(tmp_path / 'local')}" for path in (tmp_path / "local").rglob("*") if path.is_file()}
    assert set(listing(bucket)) == files
    assert prepare.prepare(f"{bucket}/data", **given) == local
    changed = prepare.prepare(f"{bucket}/data", **given | {"record_tokens": 32}, overwrite=True)
    assert changed["window"] == 32 and set(listing(bucket)) == files


class Folder:
    """The folder of a dataset on a bucket, and what a second process does to it while a first one sleeps."""

    def __init__(self, bucket: str, monkeypatch: pytest.MonkeyPatch):
        self.marker = epath.Path(bucket) / "data" / ".incomplete"
        self.meanwhile: list[Callable[[], object]] = []
        self.said: list[str] = []
        clock = types.SimpleNamespace(time=time.time, sleep=lambda seconds: self.meanwhile and self.meanwhile.pop(0)())
        monkeypatch.setattr(workspace, "time", clock)

    def mark(self, owner: str, seconds_ago: float) -> None:
        self.marker.write_text(json.dumps({"owner": owner, "id": owner, "time": time.time() - seconds_ago}))

    def take(self) -> workspace.Marker:
        return workspace.Marker(self.marker.parent, self.said.append)


@pytest.fixture
def folder(gs_bucket: str, monkeypatch: pytest.MonkeyPatch) -> Folder:
    return Folder(gs_bucket, monkeypatch)


def test_two_runs_into_one_folder_are_kept_apart(folder: Folder, given: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    output = str(folder.marker.parent)
    folder.mark("process 1 of another", 1)
    folder.meanwhile = [lambda: folder.mark("process 1 of another", 0)]
    with pytest.raises(UserError, match="process 1 of another is preparing it; wait for that, or end it"):
        prepare.prepare(output, **given)
    with monkeypatch.context() as patch, pytest.raises(MachineError, match="process 2 of another has taken over"):
        patch.setattr(driver, "finish", lambda *arguments: folder.mark("process 2 of another", 1000))
        folder.mark("process 1 of another", 1000)  # silent for long
        prepare.prepare(output, **given)
    folder.mark(f"process {2**22 + 1} of {socket.gethostname()}", 0)  # no process has this number here: it was killed
    prepare.prepare(output, **given)


def test_the_one_of_two_that_looked_at_the_same_time_ends(folder: Folder) -> None:
    folder.meanwhile = [lambda: folder.mark("process 1 of another", 0)]  # it saw no marker either
    with pytest.raises(UserError, match="process 1 of another is preparing it"), folder.take():
        pass
    assert json.loads(folder.marker.read_text())["owner"] == "process 1 of another"


def test_a_run_that_has_ended_meanwhile_is_not_waited_for(folder: Folder) -> None:
    folder.mark("process 1 of another", 1)
    folder.meanwhile = [folder.marker.unlink]
    with folder.take() as marker:
        marker.check()
    assert not folder.marker.exists()
    with pytest.raises(InterruptedError), folder.take():
        raise InterruptedError
    assert json.loads(folder.marker.read_text())["time"] == 0


def test_a_live_process_of_this_machine_is_seen_without_proc(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workspace.os.path, "exists", lambda path: False)  # macOS has no /proc
    folder.mark(f"process {os.getppid()} of {socket.gethostname()}", 0)
    assert folder.take().is_held()
    folder.mark("mine", 0)
    assert folder.take().is_held()
    folder.marker.write_text("[1]")
    assert not folder.take().is_held()


def test_a_second_call_leaves_the_files_of_a_run_that_replaces_the_dataset(folder: Folder, given: dict) -> None:
    output = str(folder.marker.parent)
    made = prepare.prepare(output, **given)
    folder.mark("process 1 of another", 0)
    (folder.marker.parent / ".work" / "plan_id").write_text("of another")
    assert prepare.prepare(output, **given) == made
    assert {"data/.incomplete", "data/.work/plan_id"} <= set(listing(str(folder.marker.parent.parent)))


def test_the_old_dataset_stays_until_everything_is_checked(gs_bucket: str, given: dict) -> None:
    prepare.prepare(f"{gs_bucket}/data", **given)
    before = listing(gs_bucket)
    with pytest.raises(UserError, match="--memory_gb=0.1: one worker and the main process need"):
        prepare.prepare(f"{gs_bucket}/data", **given | {"record_tokens": 32}, overwrite=True, memory_gb=0.1)
    assert listing(gs_bucket) == before


def test_a_file_of_sources_may_be_on_a_bucket(bucket: str, tmp_path: pathlib.Path) -> None:
    folder = epath.Path(bucket) / "sets"
    lines = [json.dumps({"query": f"question {i}", "document": f"answer {i}"}) for i in range(40)]
    (folder / "nq" / "1.jsonl").write_text("\n".join(lines[:20]))
    (folder / "nq" / "2.jsonl").write_text("\n".join(lines[20:]))
    (folder / "pairs.toml").write_bytes('["größe"]\nfiles = "nq/*.jsonl"'.encode())
    arguments = {"vocab_size": 300, "validation_fraction": 0.2, "workers": 1}
    manifest = prepare.prepare(tmp_path / "out", pairs=f"{folder}/pairs.toml", **arguments)
    assert manifest["domains"] == ["größe"] and sum(split["records"] for split in manifest["splits"].values()) == 40
    with pytest.raises(UserError, match=r"--pairs=\S+/nowhere.toml: no such file"):
        prepare.prepare(tmp_path / "other", pairs=f"{folder}/nowhere.toml", **arguments)
