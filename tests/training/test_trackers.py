"""A tracker gets what metrics.jsonl gets, under one id per run; without one, none is imported."""

import json
import pathlib
import sqlite3
import sys
import types

import pytest
from conftest import ROOT, recipe, shrink
from ml_collections import ConfigDict

import contrastive_jax
from contrastive_jax.config import UserError


def run(config: ConfigDict, workdir: pathlib.Path, stop_at: int) -> list[dict]:
    contrastive_jax.train(config, workdir, stop_at)
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def tiny(dataset: pathlib.Path, tracker: str) -> ConfigDict:
    config = shrink(recipe("bag"), dataset)
    config.update(steps=4, tracker=tracker)
    return config


def test_no_tracker_is_imported_without_being_asked_for(dataset: pathlib.Path, tmp_path: pathlib.Path) -> None:
    for path in (ROOT / "contrastive_jax").rglob("*.py"):
        assert "import wandb" not in path.read_text() and "import trackio" not in path.read_text()
    before = set(sys.modules)
    run(tiny(dataset, ""), tmp_path, 1)
    assert not {"wandb", "trackio"} & (set(sys.modules) - before)
    assert not (tmp_path / "tracker_id").exists()


def test_a_tracker_that_is_not_installed_is_refused_at_once(
    dataset: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("wandb", "trackio"):
        monkeypatch.setitem(sys.modules, name, None)  # what import finds where there is no such package
        with pytest.raises(UserError, match=rf"config.tracker='{name}': .*; pip install {name}, or set config.tracker=''"):
            run(tiny(dataset, name), tmp_path / "run", 1)
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="config.tracker='tensorboard': choose one of wandb, trackio"):
        run(tiny(dataset, "tensorboard"), tmp_path / "run", 1)


class FakeWandb(types.ModuleType):
    """A package that notes how it is used; its runs cannot be sent at step 3."""

    Error = RuntimeError

    def __init__(self) -> None:
        super().__init__("wandb")
        self.inits, self.sent, self.finished = list[dict](), list[dict](), 0

    def Settings(self, **settings: object) -> dict:  # noqa: N802, the name is wandb's
        return settings

    def init(self, **arguments: object) -> "FakeWandb":
        self.inits.append(arguments)
        return self

    def define_metric(self, name: str, step_metric: str) -> None:
        assert (name, step_metric) == ("*", "step")

    def log(self, values: dict) -> None:
        if values["step"] == 3:
            raise ConnectionError("no network")
        self.sent.append(values)

    def finish(self) -> None:
        self.finished += 1


def test_a_resumed_run_keeps_its_id_and_a_tracker_that_fails_ends_no_run(
    dataset: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for stop_at in (2, 4):
        lines = run(tiny(dataset, "wandb"), tmp_path, stop_at)
    run_id = (tmp_path / "tracker_id").read_text()
    assert [(init["id"], init["resume"], init["name"]) for init in fake.inits] == [(run_id, "allow", tmp_path.name)] * 2
    assert fake.inits[0]["config"]["steps"] == 4 and fake.inits[0]["dir"] == str(tmp_path)
    assert [(values["step"], values["loss"]) for values in fake.sent] == [
        (line["step"], line["loss"]) for line in lines if line["step"] != 3
    ]
    assert "step 3 could not be sent (ConnectionError: no network)" in caplog.text
    assert fake.finished == 2


def test_wandb_offline(dataset: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    sent, log = list[dict](), wandb.Run.log
    monkeypatch.setattr(wandb.Run, "log", lambda run, values: (sent.append(values), log(run, values))[1])
    for stop_at in (2, 4):
        lines = run(tiny(dataset, "wandb"), tmp_path, stop_at)
    run_id = (tmp_path / "tracker_id").read_text()
    folders = list((tmp_path / "wandb").glob("offline-run-*"))
    assert folders and all(folder.name.endswith(f"-{run_id}") for folder in folders)  # the resumed run is the same one
    assert [{"step": values["step"], "loss": values["loss"]} for values in sent] == [
        {"step": line["step"], "loss": line["loss"]} for line in lines
    ]


def test_wandb_without_a_login_is_one_line(
    dataset: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")

    def refuse(**arguments: object) -> None:
        raise wandb.errors.UsageError("No API key configured. Use `wandb login` to log in.")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(UserError, match="config.tracker='wandb': No API key configured.*; or set WANDB_MODE=offline"):
        run(tiny(dataset, "wandb"), tmp_path, 1)


def test_trackio_in_its_local_database(
    dataset: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    for stop_at in (2, 4):
        lines = run(tiny(dataset, "trackio"), tmp_path / "run", stop_at)
    run_id = (tmp_path / "run" / "tracker_id").read_text()
    (database,) = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(database) as connection:
        rows = connection.execute("SELECT run_name, step, metrics FROM metrics ORDER BY step").fetchall()
    connection.close()
    assert {row[0] for row in rows} == {f"run-{run_id}"}
    assert [(row[1], json.loads(row[2])["loss"]) for row in rows] == [(line["step"], line["loss"]) for line in lines]
    capsys.readouterr()
