"""The command prepare, interrupted: a run goes on from the tasks that are done, and makes the same dataset."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time
from typing import Any

import pytest
from conftest import ROOT, fail_after

from contrastive_jax.config import UserError
from contrastive_jax.data import tokenizer
from contrastive_jax.data.preparation import driver, engine, prepare, workspace
from contrastive_jax.files import MachineError

LETTERS = "abcdefghijklmnopqrstuvwxyz"
# A process with parts of 2 KB.
PROGRAM = "import sys, json; from contrastive_jax.data.preparation import driver, prepare; driver.PART_BYTES = (2000, 2000); {}"
PREPARE = PROGRAM.format("prepare.prepare(**json.loads(sys.argv[1]))")


def text(number: int) -> str:
    rng = random.Random(number)
    return " ".join("".join(rng.choices(LETTERS, k=rng.randrange(2, 6))) for _ in range(60))


def write_documents(path: pathlib.Path, numbers: range) -> None:
    lines = [json.dumps({"text": text(n), "meta": {"pile_set_name": "AB"[n % 2]}}) + "\n" for n in numbers]
    path.write_text("".join(lines))


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "PART_BYTES", (2000, 2000))


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Two files of train, of some ten parts each, and one of validation; ten documents come twice."""
    folder = tmp_path_factory.mktemp("raw")
    for name, numbers in {"train-0": range(60), "train-1": range(50, 110), "val": range(110, 120)}.items():
        write_documents(folder / f"{name}.jsonl", numbers)
    return folder


def arguments(raw: pathlib.Path, **changes: Any) -> dict[str, Any]:
    inputs = {"input": f"{raw}/train-*.jsonl", "validation": f"{raw}/val.jsonl"}
    return inputs | {"vocab_size": 350, "record_tokens": 32, "workers": 1} | changes


@pytest.fixture(scope="module")
def whole(raw: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    output = tmp_path_factory.mktemp("whole") / "data"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "PART_BYTES", (2000, 2000))
        prepare.prepare(output, **arguments(raw))
    return output


def manifest(output: pathlib.Path) -> dict[str, Any]:
    return json.loads((output / "manifest.json").read_text())


def outcomes(output: pathlib.Path) -> dict[str, float]:
    """The outcomes of tasks that are there, and when each was written."""
    tasks = pathlib.Path(f"{output}.incomplete/.work/tasks")
    return {path.name: path.stat().st_mtime for path in tasks.glob("[!.]*")} if tasks.exists() else {}


def start(given: dict[str, Any]) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PREPARE, json.dumps(given)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)


@pytest.mark.parametrize("stride", [1, 7])
def test_a_run_that_ends_after_any_task_goes_on(
    stride: int, raw: pathlib.Path, whole: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, before = 0, dict[str, float]()
    while True:
        monkeypatch.setattr(engine.LocalEngine, "map", fail_after(stride))
        try:
            prepare.prepare(tmp_path / "data", **arguments(raw))
            break
        except KeyboardInterrupt:
            runs, after = runs + 1, outcomes(tmp_path / "data")
        assert {name: changed for name, changed in after.items() if name in before} == before  # no task ran again
        assert len(after) - len(before) in (stride, stride + 1)  # and the tokenizer
        before = after
    assert runs > 100 // stride // 3
    assert manifest(tmp_path / "data") == manifest(whole)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_killed_at_any_moment_a_run_goes_on(raw: pathlib.Path, whole: pathlib.Path, tmp_path: pathlib.Path) -> None:
    given, before = arguments(raw, output=str(tmp_path / "data"), workers=2), dict[str, float]()
    for kill in range(3):
        process, deadline = start(given), time.monotonic() + 60
        goal = len(before) + 9 + kill
        while len(outcomes(tmp_path / "data")) < goal and time.monotonic() < deadline:
            time.sleep(0.002)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        after = outcomes(tmp_path / "data")
        assert not (tmp_path / "data").exists() and len(after) >= goal
        assert before.items() <= after.items()  # what was done was not done again
        before = after
    process = start(given)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert f"going on from the {len(before)} tasks that are done" in errors
    assert manifest(tmp_path / "data") == manifest(whole)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_killed_worker_is_one_line() -> None:
    with (
        engine.LocalEngine(2) as local,
        pytest.raises(MachineError, match="a worker was ended by SIGKILL, most likely for want"),
    ):
        local.map(signal.raise_signal, [signal.SIGKILL, signal.SIGKILL], lambda outcome: None)


def test_two_runs_into_one_folder_are_kept_apart(raw: pathlib.Path, tmp_path: pathlib.Path) -> None:
    target = tmp_path / "data"
    with workspace.Lock(workspace.work_folder(target), target):
        process = start(arguments(raw, output=str(target)))
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert f"--output={target}: process {os.getpid()} is preparing it" in errors


def test_other_arguments_on_a_half_made_folder_start_anew_with_overwrite_alone(
    raw: pathlib.Path,
    whole: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(engine.LocalEngine, "map", fail_after(5))
        prepare.prepare(tmp_path / "data", **arguments(raw, record_tokens=16))
    assert capsys.readouterr().err.endswith("stopped; the same command goes on from what is done\n")
    before = outcomes(tmp_path / "data")
    message = (
        r"data\.incomplete: was begun with other arguments \(--record_tokens: 16\); 5 tasks are done, .* or give --overwrite"
    )
    with pytest.raises(UserError, match=message):
        prepare.prepare(tmp_path / "data", **arguments(raw))
    with pytest.raises(UserError, match="--memory_gb=0.1: one worker and the main process need"):
        prepare.prepare(tmp_path / "data", **arguments(raw), overwrite=True, memory_gb=0.1)
    assert outcomes(tmp_path / "data") == before and len(before) == 5
    assert prepare.prepare(tmp_path / "data", **arguments(raw), overwrite=True) == manifest(whole)
    assert "was begun with other arguments (--record_tokens: 16); starting anew" in capsys.readouterr().err


def test_b4_a_changed_input_is_not_already_prepared(
    raw: pathlib.Path, whole: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("train-0", "train-1", "val"):
        (tmp_path / f"{name}.jsonl").write_bytes((raw / f"{name}.jsonl").read_bytes())
    monkeypatch.chdir(tmp_path)
    given = arguments(pathlib.Path("."), tokenizer=str(tmp_path / "tokenizer.model"))
    (tmp_path / "tokenizer.model").write_bytes((whole / "tokenizer.model").read_bytes())
    made = prepare.prepare("data", **given)
    assert prepare.prepare("data", **given) == made

    write_documents(tmp_path / "train-2.jsonl", range(200, 210))
    with pytest.raises(UserError, match=r"the input \S+/train-2.jsonl is new since it was made; --overwrite replaces it"):
        prepare.prepare("data", **given)
    (tmp_path / "train-2.jsonl").unlink()
    status = (tmp_path / "val.jsonl").stat()
    os.utime(tmp_path / "val.jsonl", ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    with pytest.raises(UserError, match=r"the input \S+/val.jsonl has changed since it was made"):
        prepare.prepare("data", **given)
    os.utime(tmp_path / "val.jsonl", ns=(status.st_atime_ns, status.st_mtime_ns))

    sample = [text(number) for number in range(300, 400)]
    (tmp_path / "tokenizer.model").write_bytes(tokenizer.train(sample, 350).model)
    with pytest.raises(UserError, match=r"tokenizer.model has changed since it was made"):
        prepare.prepare("data", **given)
    (tmp_path / "tokenizer.model").write_bytes((whole / "tokenizer.model").read_bytes())

    monkeypatch.chdir("/")  # the same relative glob means other files here
    with pytest.raises(UserError, match=r"--input=/train-\*.jsonl: no file matches|made with other arguments"):
        prepare.prepare(tmp_path / "data", **given)
    monkeypatch.chdir(tmp_path)
    for path in tmp_path.glob("*.jsonl"):
        path.unlink()
    assert prepare.prepare("data", **given) == made  # the raw text is no longer needed


def test_b4_other_packages_are_another_input(monkeypatch: pytest.MonkeyPatch) -> None:
    before = prepare.identity_of_python()
    assert before == prepare.identity_of_python()
    monkeypatch.setattr("importlib.metadata.distributions", lambda: [])
    assert before != prepare.identity_of_python()


def test_b10_validation_documents_are_not_in_the_tokenizers_sample(tmp_path: pathlib.Path) -> None:
    """Each document repeats a word of its own, which is a piece of the tokenizer if the document was in the sample."""
    rng = random.Random(0)
    texts = [" ".join(["".join(rng.choices(LETTERS, k=12))] * 40) for _ in range(60)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare.prepare(tmp_path / "out", input=f"{tmp_path}/a.jsonl", validation_fraction=0.3, vocab_size=360, workers=1)
    splits = manifest(tmp_path / "out")["splits"]
    assert splits["validation"]["documents"] > 5
    tokens_per_document = {name: split["tokens"] / split["documents"] for name, split in splits.items()}
    assert tokens_per_document["validation"] > 2.5 * tokens_per_document["train"]


def test_memory_limits_the_workers_and_never_the_result() -> None:
    budget = prepare.choose_budget(3.0, 64, 500 << 20, 400 << 20)
    assert 1 < budget.workers < 8
    assert budget.workers * budget.worker_bytes + (400 << 20) <= 3e9
    with pytest.raises(UserError, match=r"--memory_gb=0\.5: one worker and the main process need 0\.9 GB"):
        prepare.choose_budget(0.5, 1, 500 << 20, 400 << 20)


def test_preparing_imports_no_tensorflow_beam_or_jax(raw: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """With one worker, all tasks run in the main process."""
    report = "prepare.prepare(**json.loads(sys.argv[1])); print({'tensorflow', 'apache_beam', 'jax'} & sys.modules.keys())"
    command = [sys.executable, "-c", PROGRAM.format(report), json.dumps(arguments(raw, output=str(tmp_path / "data")))]
    result = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True)
    assert result.stdout == "set()\n"
