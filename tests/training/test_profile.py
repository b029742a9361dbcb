"""--profile_steps writes a trace in which the parts of a step are named."""

import pathlib
import re

import pytest
from absl import logging
from conftest import command, finish, peers, start
from etils import epath

from contrastive_jax.config import UserError
from contrastive_jax.training import profiling
from contrastive_jax.training.profiling import Profiler

SCOPES = ("encode", "attention", "mlp", "loss", "update")


def traces(workdir: pathlib.Path) -> list[pathlib.Path]:
    return sorted(workdir.glob("plugins/profile/*/*.xplane.pb"))


def test_a_profile_names_the_parts_of_a_step(dataset: pathlib.Path, tmp_path: pathlib.Path) -> None:
    output = finish(start(command(dataset, tmp_path, "--profile_steps=2:3")))[0]
    assert f"profile of steps 2 to 3: {tmp_path}/plugins/profile" in output
    (trace,) = traces(tmp_path)
    content = trace.read_bytes()
    assert [name for name in SCOPES if re.search(rb"[/(]%b[/)]" % name.encode(), content) is None] == []
    assert b"jit(train_step)/" in content and b"step_num" in content


def test_steps_are_two_numbers_in_order() -> None:
    assert profiling.parse_steps(None) is None
    assert profiling.parse_steps("10:12") == (10, 12)
    for text in ("", "3", "3:", ":3", "0:3", "4:3", "-1:3", "a:b", "1:2:3", "1.0:2", "²:3"):
        with pytest.raises(UserError, match=r"^--profile_steps=.*: give FROM:TO"):
            profiling.parse_steps(text)


@pytest.mark.parametrize(
    ("steps", "traced", "message"),
    [
        ((3, 4), "3 to 4", ""),
        ((1, 3), "3 to 3", "--profile_steps=1:3: this run does steps 3 to 6; the profile is of the steps in both"),
        ((5, 99), "5 to 6", "--profile_steps=5:99: this run does steps 3 to 6; the profile is of the steps in both"),
        ((1, 2), "", "--profile_steps=1:2: this run does steps 3 to 6; no profile is written"),
        ((7, 9), "", "--profile_steps=7:9: this run does steps 3 to 6; no profile is written"),
    ],
)
def test_only_steps_of_this_run_are_traced(
    steps: tuple[int, int], traced: str, message: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings, notes = list[str](), list[str]()
    monkeypatch.setattr(logging, "warning", lambda text, *values: warnings.append(text % values))
    monkeypatch.setattr(logging, "info", lambda text, *values: notes.append(text % values))
    with Profiler(epath.Path(tmp_path), steps, first=2, end=6) as profiler:
        for number in range(3, 7):
            with profiler.step(number, wait_for=lambda: None):
                pass
    assert warnings == [message] * bool(message)
    assert notes == ([f"profile of steps {traced}: {tmp_path}/plugins/profile"] if traced else [])
    assert len(traces(tmp_path)) == bool(traced)


def test_a_trace_ends_with_a_run_that_stops_within_it(tmp_path: pathlib.Path) -> None:
    with Profiler(epath.Path(tmp_path / "preempted"), (1, 4), first=0, end=4) as profiler:
        for number in (1, 2):
            with profiler.step(number, wait_for=lambda: None):
                pass
    assert len(traces(tmp_path / "preempted")) == 1
    with pytest.raises(KeyError), Profiler(epath.Path(tmp_path / "failed"), (1, 4), first=0, end=4) as profiler:
        with profiler.step(1, wait_for=lambda: None):
            raise KeyError
    assert len(traces(tmp_path / "failed")) == 1


def test_a_running_process_is_asked_for_a_trace_by_a_file(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request, notes = tmp_path / "request", list[str]()
    monkeypatch.setattr(logging, "info", lambda text, *values: notes.append(text % values))
    monkeypatch.setenv(profiling.REQUEST_VARIABLE, str(request))
    with Profiler(epath.Path(tmp_path), None, first=0, end=9) as profiler:
        for number in range(1, 9):
            if number == 4:
                request.write_text("2")
            with profiler.step(number, wait_for=lambda: None):
                pass
    assert notes == [f"profile of steps 4 to 5: {tmp_path}/plugins/profile"]
    assert len(traces(tmp_path)) == 1 and not request.exists()


@pytest.mark.slow
def test_of_several_processes_the_first_is_traced(dataset: pathlib.Path, tmp_path: pathlib.Path) -> None:
    outputs = finish(*peers(dataset, tmp_path, "--profile_steps=2:9", devices=1))
    assert ["profile of steps 2 to 4" in output for output in outputs] == [True, False]
    assert all("--profile_steps=2:9: this run does steps 1 to 4" in output for output in outputs)
    assert len(traces(tmp_path)) == 1
