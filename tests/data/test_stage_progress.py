"""The progress line of prepare."""

import pytest

from contrastive_jax.data.preparation import stage_progress
from contrastive_jax.data.preparation.arguments import Arguments
from contrastive_jax.data.preparation.stage_progress import StageProgress, stage_names


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that a progress sees; a test changes them."""
    now = [0.0]
    monkeypatch.setattr(stage_progress.time, "monotonic", lambda: now[0])
    return now


def test_the_time_left_counts_all_stages(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage_progress, "COSTS", {"cut": 0.0, "hash": 0.25, "token": 1.0})
    progress = StageProgress(stage_names(Arguments()), 100 * 10**6)
    assert progress.line(0) == "starting"
    progress.begin("cut", 20)
    progress.set_text_bytes(200 * 10**6)
    progress.begin("hash", 200 * 10**6)
    progress.advance(40 * 10**6)
    clock[0] = 10.0  # for a twenty-fifth of the work: 10 of 250 units
    assert progress.line(10) == "hash (stage 2 of 6): 40 of 200 MB, 4.0 MB/s, ETA 0:04:00"
    progress.correct(40 * 10**6)  # a file has more text than was estimated: 300 units in all
    progress.advance(200 * 10**6)
    clock[0] = 60.0
    progress.begin("tokenizer", note="training on 10.0 MB")
    clock[0] = 90.0  # no measure of the other stages
    assert progress.line(90) == "tokenizer (stage 3 of 6): training on 10.0 MB, ETA 0:04:00"


def test_what_an_earlier_run_has_done_is_no_measure_of_speed(clock: list[float]) -> None:
    progress = StageProgress(stage_names(Arguments(near_duplicates=0.6)), 100 * 10**6)
    for stage in ("cut", "hash"):
        progress.begin(stage, 100 * 10**6, 100 * 10**6)
    progress.begin("token", 100 * 10**6, 60 * 10**6)
    assert progress.line(0) == "token (stage 6 of 7): 60 of 100 MB, 0.0 MB/s"
    progress.advance(20 * 10**6)
    clock[0] = 5.0
    assert progress.line(5) == "token (stage 6 of 7): 80 of 100 MB, 4.0 MB/s, ETA 0:00:05"
    progress.begin("finish")
    assert progress.line(5) == "finish (stage 7 of 7): 40 MB in 0:00:05, 8.0 MB/s in all"
