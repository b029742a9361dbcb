"""Log lines are written in a thread beside the steps; nothing is lost, and the speeds are honest."""

import datetime
import functools
import json
import pathlib
import threading
import time
import types

import jax.numpy as jnp
import pytest
from conftest import recipe, shrink
from ml_collections import ConfigDict

import contrastive_jax
from contrastive_jax.training import guard, log_line, metrics, speed
from contrastive_jax.training.background import LIMIT, Background


def nothing() -> None:
    pass


def test_work_is_done_in_order_and_waiting_work_is_bounded() -> None:
    done, go = list[int](), threading.Event()
    background = Background(when_idle=nothing)
    background.submit(go.wait)
    submitted = list[int]()

    def submit_all() -> None:
        for i in range(LIMIT + 2):
            background.submit(functools.partial(done.append, i))
            submitted.append(i)

    submitting = threading.Thread(target=submit_all)
    submitting.start()
    time.sleep(0.3)
    assert len(submitted) <= LIMIT and not done
    go.set()
    submitting.join()
    background.wait()
    assert done == list(range(LIMIT + 2))
    background.close()


def test_an_error_of_the_thread_is_raised_in_the_main_thread() -> None:
    def fail() -> None:
        raise OSError("no space left")

    background, done = Background(when_idle=nothing), list[int]()
    background.submit(fail)
    with pytest.raises(OSError, match="no space left"):
        background.wait()
    with pytest.raises(OSError, match="no space left"):
        background.submit(lambda: done.append(1))
    background.close()
    assert not done


def test_idle_time_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("contrastive_jax.training.background.IDLE_SECONDS", 0.05)
    called = threading.Event()
    background = Background(when_idle=called.set)
    assert called.wait(5)
    background.close()


def test_speeds_with_and_without_what_is_lost() -> None:
    # 100 s of start, a first step of 20 s, then steps of 1 s with 5 s of evaluation and checkpoint after each tenth.
    run = speed.Speed(batch_size=8, steps=100, began=1000.0, last_line={})
    run.start(1, seconds=20.0, now=1120.0)
    run.advance(1, now=1120.0, lost=0.0)
    assert run.scalars(tokens=64)["pairs_per_second"] == pytest.approx(8 / 20)  # nothing else is known yet
    run.advance(11, now=1130.0, lost=0.0)
    assert run.scalars(tokens=64)["pairs_per_second_overall"] == pytest.approx(8)
    run.advance(21, now=1145.0, lost=5.0)
    expected = {"pairs_per_second": 8, "tokens_per_second": 64, "pairs_per_second_overall": 8 * 20 / 25, "step_seconds": 20}
    assert run.scalars(tokens=64) == pytest.approx(expected | {"goodput": 20 / 145})
    assert run.seconds_left() == pytest.approx(79 * 25 / 20)
    # A second process, 55 s later: it starts for 100 s, does its first step in 20 s, and ten more.
    line = run.scalars(tokens=64) | {"time": speed.time_of(1145.0)}
    again = speed.Speed(batch_size=8, steps=100, began=1200.0, last_line=line)
    again.start(22, seconds=20.0, now=1320.0)
    again.advance(32, now=1330.0, lost=0.0)
    assert again.scalars(tokens=64)["goodput"] == pytest.approx(30 / 330)


def test_a_line_whose_last_step_was_skipped_has_no_statistics() -> None:
    """Its embeddings may not be finite; the step counts as skipped all the same."""
    lines: list[tuple] = []
    config, run = recipe("debug"), types.SimpleNamespace(schedule=lambda step: 0.1)
    writer = types.SimpleNamespace(write=lambda step, scalars, **texts: lines.append((step, scalars)))
    running = speed.Speed(batch_size=8, steps=100, began=time.time() - 2, last_line={})
    running.start(1, seconds=1.0, now=time.time() - 1)
    line_writer = log_line.LineWriter(config, run, writer, running)

    def metrics_of(skipped: int) -> dict:
        values = {"loss": 2.0, "tokens": 9.0, "gradient_norm": 1.0, "parameter_norm": 1.0, "skipped": skipped}
        return {name: jnp.asarray(value) for name, value in values.items()} | {"batch_digest": jnp.zeros(4, jnp.uint32)}

    for step, last in ((2, 0), (4, 1)):
        sample = jnp.full((6, 2, 3), jnp.nan) if last else jnp.eye(12, 3).reshape(6, 2, 3)
        line_writer.write(step, [metrics_of(0), metrics_of(last)], sample, 0.0)
    (_, first), (_, second) = lines
    assert first["skipped"] == 0 and "uniformity" in first
    assert second["skipped"] == 1 and second["loss"] == 2 and "uniformity" not in second


def test_a_process_knows_when_it_began() -> None:
    age = time.time() - speed.process_began()
    assert 0 < age < 24 * 3600
    time.sleep(0.2)
    assert time.time() - speed.process_began() - age == pytest.approx(0.2, abs=0.1)


def fit(config: ConfigDict, workdir: pathlib.Path, stop_at: int | None = None) -> list[dict]:
    contrastive_jax.train(config, workdir, stop_at)
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_statistics_are_made_beside_the_steps_and_no_line_is_lost(
    dataset: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each line's statistics take as long as several steps; all lines are there all the same, also at a stop between two."""
    threads, measure = set(), metrics.embedding_metrics

    def slow(z: object) -> dict[str, float]:
        threads.add(threading.current_thread().name)
        time.sleep(0.2)
        return measure(z)

    monkeypatch.setattr(metrics, "embedding_metrics", slow)
    config = shrink(recipe("bag"), dataset)
    config.update(steps=12, log_every=2, checkpoint_every=3)
    lines = fit(config, tmp_path, stop_at=7)
    assert [line["step"] for line in lines] == [2, 4, 6]
    lines = fit(config, tmp_path)
    assert [line["step"] for line in lines] == [2, 4, 6, 8, 10, 12]
    assert threads == {"background"}
    times = [datetime.datetime.fromisoformat(line["time"]) for line in lines]
    assert times == sorted(times)
    for line in lines:
        assert 0 < line["pairs_per_second"] and 0 < line["pairs_per_second_overall"] and 0 < line["goodput"] < 1
    seconds = [line["step_seconds"] for line in lines]
    assert seconds == sorted(seconds) and lines[-1]["goodput"] < 0.9


def test_the_verdict_of_the_guard_comes_before_a_checkpoint(
    dataset: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that collapses at the last line before a checkpoint is stopped there, however late its statistics are."""
    measure = metrics.embedding_metrics

    def slow(z: object) -> dict[str, float]:
        time.sleep(0.3)
        return measure(z) | {"embedding_std": 0.0}

    monkeypatch.setattr(metrics, "embedding_metrics", slow)
    config = shrink(recipe("bag"), dataset)
    config.update(steps=8, log_every=2, checkpoint_every=6)
    config.guard.update(warmup_steps=2, patience=2)
    with pytest.raises(guard.StoppedError, match="step 6: embedding std 0"):
        fit(config, tmp_path)
    assert not list((tmp_path / "checkpoints").glob("[0-9]*"))
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [2, 4, 6]


def test_what_cannot_be_written_ends_the_run(
    dataset: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(writer: metrics.Writer, step: int, scalars: object, **texts: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(metrics.Writer, "write", full)
    config = shrink(recipe("bag"), dataset)
    config.update(steps=50, log_every=1)
    with pytest.raises(OSError, match="No space left"):
        fit(config, tmp_path)
    assert not list((tmp_path / "checkpoints").glob("[0-9]*"))
