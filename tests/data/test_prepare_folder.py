"""The folder in which prepare makes a dataset: nothing of the user's, of another run or of another plan is lost or mixed in."""

import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import pytest

from contrastive_jax.config import UserError
from contrastive_jax.data.preparation import driver, engine, prepare, workspace
from contrastive_jax.data.preparation.work import Work
from contrastive_jax.files import MachineError


@pytest.fixture
def given(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Arguments of prepare, for documents of some five parts."""
    monkeypatch.setattr(driver, "PART_BYTES", (2000, 2000))
    texts = [" ".join(str(n * n % 1000 + k) for k in range(60)) for n in range(40)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return {"input": f"{tmp_path}/a.jsonl", "validation_fraction": 0.2, "vocab_size": 300, "record_tokens": 64, "workers": 1}


def names(folder: pathlib.Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def interrupt(*values: Any, **named: Any) -> None:
    raise KeyboardInterrupt


def interrupt_after(tasks: int, seen: list[tuple[Callable, Any]]) -> Callable:
    """A `LocalEngine.map` that ends after so many tasks; `seen` gets those that were to run."""

    def run(self: engine.LocalEngine, function: Callable, remaining: list, done: Callable) -> None:
        for task in remaining:
            seen.append((function, task))
            if len(seen) > tasks:
                raise KeyboardInterrupt
            done(function(task))

    return run


def test_a_folder_of_the_users_own_is_left_alone(given: dict, tmp_path: pathlib.Path) -> None:
    own = tmp_path / "data.incomplete" / "notes" / "mine.txt"
    own.parent.mkdir(parents=True)
    own.write_text("mine")
    with pytest.raises(
        UserError, match=r"data\.incomplete, where .* holds files of something else, such as notes/mine\.txt; move"
    ):
        prepare.prepare(tmp_path / "data", **given, overwrite=True)
    assert own.read_text() == "mine" and names(tmp_path / "data.incomplete") == {"notes"}
    shutil.rmtree(tmp_path / "data.incomplete")
    (tmp_path / "data.incomplete").write_text("mine")
    with pytest.raises(UserError, match=r"data\.incomplete, where it would be made, is a file; move it away"):
        prepare.prepare(tmp_path / "data", **given)


def test_something_else_at_the_output_is_refused(given: dict, tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=r"^--output=\S+/file: is a file; give the name of a folder$"):
        prepare.prepare(tmp_path / "file", **given, overwrite=True)
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "manifest.json").write_text('{"name": "an app", "format": "zip"}')
    with pytest.raises(UserError, match=r"^--output=\S+/app: its manifest\.json is not that of a prepared dataset; choose"):
        prepare.prepare(tmp_path / "app", **given, overwrite=True)
    assert names(tmp_path / "app") == {"manifest.json"}


@pytest.mark.parametrize("same", [True, False])
def test_a_dataset_that_another_process_has_made_meanwhile_stays(
    same: bool, given: dict, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[dict] = []

    def find_slowly(arguments: Any) -> prepare.Source:
        monkeypatch.setattr(prepare, "find_source", find_source)
        made.append(prepare.prepare(tmp_path / "data", **given))
        return find_source(arguments)

    find_source = prepare.find_source
    monkeypatch.setattr(prepare, "find_source", find_slowly)
    if same:
        assert prepare.prepare(tmp_path / "data", **given) == made[0]
    else:
        with pytest.raises(UserError, match=r"was made with other arguments \(--record_tokens: 64\); --overwrite replaces it"):
            prepare.prepare(tmp_path / "data", **given | {"record_tokens": 32})
    assert json.loads((tmp_path / "data" / "manifest.json").read_text()) == made[0]
    assert names(tmp_path) == {"a.jsonl", "data"}


def test_a_task_of_another_plan_writes_nothing(given: dict, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Callable, Any]] = []
    folder = tmp_path / "data.incomplete"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(engine.LocalEngine, "map", interrupt_after(3, seen))
        prepare.prepare(tmp_path / "data", **given)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(engine.LocalEngine, "map", interrupt_after(3, []))
        prepare.prepare(tmp_path / "data", **given | {"sample_mb": 11}, overwrite=True)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for function, task in seen:
        with pytest.raises(MachineError, match=r"data\.incomplete: another run of prepare works there now"):
            function(task)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    shutil.rmtree(folder)
    with pytest.raises(MachineError, match="or has finished"):
        seen[0][0](seen[0][1])
    assert not folder.exists()


def test_outcomes_of_another_plan_are_made_again(given: dict, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = prepare.prepare(tmp_path / "whole", **given)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(engine.LocalEngine, "map", interrupt_after(4, []))
        prepare.prepare(tmp_path / "data", **given)
    late = tmp_path / "data.incomplete" / ".work" / "tasks" / "hash-00001.json"
    late.write_text(json.dumps(json.loads(late.read_text()) | {"plan_id": "another", "read_bytes": 1, "domains": ["late"]}))
    assert prepare.prepare(tmp_path / "data", **given) == whole


def test_a_dataset_whose_removal_is_interrupted_does_not_look_whole(
    given: dict, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare.prepare(tmp_path / "data", **given)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", interrupt)
        workspace.remove_dataset(tmp_path / "data")
    assert names(tmp_path / "data") == {"index", "pile", "rejects.jsonl", "tokenizer.model"}


def test_emptying_a_folder_that_is_interrupted_leaves_nothing_to_go_on_from(
    given: dict, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = prepare.prepare(tmp_path / "whole", **given)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(driver, "write_rejects", interrupt)
        prepare.prepare(tmp_path / "data", **given)
    remove, left = Work.remove, iter(range(6))

    def remove_some(work: Work, name: str) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt
        remove(work, name)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Work, "remove", remove_some)
        prepare.prepare(tmp_path / "data", **given | {"record_tokens": 32}, overwrite=True)
    assert (tmp_path / "data.incomplete" / "pile").exists()
    assert prepare.prepare(tmp_path / "data", **given) == whole
