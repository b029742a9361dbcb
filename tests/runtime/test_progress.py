"""The progress line says what is done, how fast, and how long it will take."""

import time

import pytest

from contrastive_jax.runtime import progress
from contrastive_jax.runtime.progress import Progress, clock


def test_a_duration_is_shown_in_hours_minutes_and_seconds() -> None:
    assert [clock(seconds) for seconds in (0, 59.9, 61, 3600, 100_000)] == [
        "0:00:00",
        "0:00:59",
        "0:01:01",
        "1:00:00",
        "27:46:40",
    ]


def test_a_line_has_total_rate_and_time_left() -> None:
    ticker = Progress("encoding", total=10_000, unit="texts")
    assert ticker.line(0.0) == "encoding: 0 of 10,000 texts, 0.0/s"  # no rate yet, so no time left
    ticker.advance(2048)
    assert ticker.line(4.0) == "encoding: 2,048 of 10,000 texts, 512.0/s, ETA 0:00:15"
    ticker.advance(note="loss 0.5")
    assert ticker.line(4.0) == "encoding: 2,049 of 10,000 texts, 512.2/s, ETA 0:00:15  loss 0.5"


def test_without_a_total_no_time_is_left() -> None:
    ticker = Progress("reading", unit="documents")
    ticker.advance(30)
    assert ticker.line(2.0) == "reading: 30 documents, 15.0/s"


def test_lines_come_every_few_seconds_and_a_last_one_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SECONDS", 0.05)
    lines: list[str] = []
    with Progress("encoding", total=2, unit="texts", say=lines.append) as ticker:
        ticker.advance()
        time.sleep(0.2)
        ticker.advance()
    assert 2 <= len(lines) <= 6
    assert all(line.startswith("encoding: 1 of 2 texts, ") for line in lines[:-1])
    assert lines[-1].startswith("encoding: 2 of 2 texts, ") and lines[-1].endswith(", ETA 0:00:00, done")
    count = len(lines)
    time.sleep(0.15)
    assert len(lines) == count


def test_work_that_fails_is_not_done() -> None:
    lines: list[str] = []
    with pytest.raises(KeyError), Progress("encoding", say=lines.append):
        raise KeyError("text")
    assert not lines


def test_work_may_describe_itself() -> None:
    lines: list[str] = []
    with Progress("", describe=lambda seconds: f"epoch 1 of 3 after {clock(seconds)}", say=lines.append):
        pass
    assert lines == ["epoch 1 of 3 after 0:00:00, done"]
