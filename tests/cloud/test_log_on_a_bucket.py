"""The metrics, TensorBoard's events and profiles of a run whose workdir is on a bucket."""

import json
import pathlib
import signal

import pytest
from cloud.emulators import listing
from conftest import command, finish, start, wait_for
from etils import epath
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from contrastive_jax.training import metrics
from contrastive_jax.training.profiling import Profiler


def lines_of(workdir: epath.Path) -> list[dict]:
    path = workdir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def curve_of(workdir: epath.Path, copy: pathlib.Path) -> list[int]:
    """The steps in TensorBoard's events, after a copy to the local disk."""
    steps = []
    for path in sorted(workdir.glob("events.out.tfevents.*")):
        copy.write_bytes(path.read_bytes())
        steps += [event.step for event in EventFileLoader(str(copy)).Load() if event.HasField("summary")]
    return steps


def flush_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "FLUSH_SECONDS", 0.0)
    monkeypatch.setattr(metrics, "FLUSH_SHARE", 1e9)


def test_a3_lines_and_curves_are_on_the_bucket_after_a_flush(
    bucket: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workdir = epath.Path(bucket) / "run"
    writer = metrics.Writer(workdir, first_step=0)
    for step in (1, 2, 3):
        writer.write(step, {"loss": 1.0 * step})
    assert listing(bucket) == {}  # not at each line: an object is written whole
    writer.flush()
    assert [line["step"] for line in lines_of(workdir)] == [1, 2, 3]
    assert curve_of(workdir, tmp_path / "events") == [1, 2, 3]
    flush_at_once(monkeypatch)
    writer.flush()
    writer.write(4, {"loss": 4.0})
    assert [line["step"] for line in lines_of(workdir)] == [1, 2, 3, 4]
    # The next process resumes at step 2.
    writer.close()
    again = metrics.Writer(workdir, first_step=2)
    assert again.last_line == {"step": 2, "loss": 2.0}
    again.write(3, {"loss": 33.0})
    again.close()
    assert [(line["step"], line["loss"]) for line in lines_of(workdir)] == [(1, 1), (2, 2), (3, 33)]
    assert all(name.startswith(("run/metrics.jsonl", "run/events.out.tfevents.")) for name in listing(bucket))


def test_a3_a_flush_that_fails_is_tried_again(
    gs_bucket: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    workdir = epath.Path(gs_bucket) / "run"
    flush_at_once(monkeypatch)
    writer, write = metrics.Writer(workdir, first_step=0), type(workdir).write_bytes

    def refuse(path: epath.Path, content: bytes) -> int:
        raise OSError("503 Service Unavailable")

    monkeypatch.setattr(type(workdir), "write_bytes", refuse)
    writer.write(1, {"loss": 1.0})
    assert "the metrics could not be written (OSError: 503 Service Unavailable); trying again" in caplog.text
    with pytest.raises(OSError, match="503"):
        writer.flush()  # at a checkpoint and at the end it is an error
    monkeypatch.setattr(type(workdir), "write_bytes", write)
    writer.write(2, {"loss": 2.0})
    assert [line["step"] for line in lines_of(workdir)] == [1, 2]
    writer.close()


def test_a3_a_profile_goes_to_the_bucket(bucket: str) -> None:
    with Profiler(epath.Path(bucket) / "run", (1, 1), first=0, end=2) as profiler:
        with profiler.step(1, wait_for=lambda: None):
            pass
    names = listing(bucket)
    assert all(name.startswith("run/plugins/profile/") for name in names)
    assert len([name for name in names if name.endswith(".xplane.pb")]) == 1


def test_a3_a_killed_run_loses_no_line_before_its_last_flush(gs_bucket: str, dataset: pathlib.Path) -> None:
    workdir = epath.Path(gs_bucket) / "run"
    options = ["--config.checkpoint_every=50", "--config.log_every=1", "--config.memory.kind="]
    run = start(command(dataset, workdir, "--config.steps=100000", *options, name="bag"))
    try:
        wait_for(lambda: any(name.startswith("run/checkpoints/100/") for name in listing(gs_bucket)))  # 50 is complete
    finally:
        run.send_signal(signal.SIGKILL)
    run.communicate()
    flushed = lines_of(workdir)
    assert [line["step"] for line in flushed] == list(range(1, len(flushed) + 1))
    end = len(flushed) + 20
    output = finish(start(command(dataset, workdir, "--config.steps=100000", f"--stop_at_step={end}", *options, name="bag")))[0]
    saved = int(output.split(f"resuming from {workdir}/checkpoints/")[1].split()[0])
    assert 50 <= saved <= len(flushed)  # the lines before a checkpoint are there before it
    lines = lines_of(workdir)
    assert [line["step"] for line in lines] == list(range(1, end + 1))
    assert lines[:saved] == flushed[:saved]
    assert len(list(workdir.glob("events.out.tfevents.*"))) == 2
