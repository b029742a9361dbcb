"""The engine that runs tasks in processes of this machine."""

import fcntl
import itertools
import math
import os
import pathlib
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest
from conftest import ROOT

from contrastive_jax.config import UserError
from contrastive_jax.data import tokenizer
from contrastive_jax.data.preparation import engine, stages, token_stage
from contrastive_jax.data.preparation.engine import LocalEngine, Schedule
from contrastive_jax.data.raw import sources, text_stream


def test_each_task_is_dealt_out_once_and_a_worker_goes_on_where_it_is() -> None:
    for count, workers in ((0, 2), (1, 3), (10, 1), (100, 7)):
        schedule, last, dealt = Schedule(count), [None] * workers, list[list[int]]()
        while len(dealt) < count + workers:
            worker = len(dealt) % workers
            last[worker] = schedule.take(last[worker])
            dealt.append([worker, last[worker]])
        tasks = [task for _, task in dealt if task is not None]
        assert sorted(tasks) == list(range(count))
        runs = [[task for worker, task in dealt if worker == w and task is not None] for w in range(workers)]
        breaks = sum(b != a + 1 for run in runs for a, b in itertools.pairwise(run))
        assert breaks <= 2 * workers


def test_outcomes_and_errors_come_back_from_workers() -> None:
    outcomes: list[float] = []
    with LocalEngine(2) as local:
        local.map(math.sqrt, range(10), outcomes.append)
        assert sorted(outcomes) == [math.sqrt(number) for number in range(10)]
        with pytest.raises(ValueError, match="math domain error") as error:
            local.map(math.sqrt, [-1, -2], outcomes.append)
        assert "in a worker:\nTraceback" in error.value.__notes__[0]
    with LocalEngine(2) as local, pytest.raises(UserError, match="^/nowhere/[ab]: no such file; give a") as mistake:
        local.map(tokenizer.load, ["/nowhere/a", "/nowhere/b"], outcomes.append)
    assert not hasattr(mistake.value, "__notes__")


def test_bytes_are_reported_to_the_engine_of_this_process() -> None:
    sizes: list[int] = []
    with LocalEngine(1, sizes.append) as local:
        local.map(engine.advance, [3, 4], lambda outcome: None)
    engine.advance(5)  # nobody asks any more
    assert sizes == [3, 4]


def test_a_long_line_is_read_by_one_process_at_a_time(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_stream, "LONG_LINE_BYTES", 100)
    (tmp_path / "a.jsonl").write_bytes(b"a\n" + b"b" * 200 + b"\nc\n")
    lock = stages.LongTexts(tmp_path / "lock")
    held, stream = [], text_stream.TextStream(f"{tmp_path}/a.jsonl")
    for line in stream.lines(1000, lock.acquire):
        with (tmp_path / "lock").open("wb") as other:
            try:
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
                held.append((line[:1], False))
            except BlockingIOError:
                held.append((line[:1], True))
        lock.release()
    stream.close()
    assert held == [(b"a", False), (b"b", True), (b"c", False)]


@pytest.mark.parametrize("in_reader", [True, False])
def test_after_an_error_the_lock_on_long_texts_is_free_and_the_task_may_run_again(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, in_reader: bool
) -> None:
    """Whether the storage fails within the text, or what is done with the text does."""
    monkeypatch.setattr(text_stream, "LONG_LINE_BYTES", 100)
    monkeypatch.setattr(text_stream, "_READ_BYTES", 1 << 10)
    lock = stages.LongTexts(tmp_path / "lock")
    reader = sources.Reader(lock.acquire)
    monkeypatch.setattr(stages, "long_texts", lambda: lock)
    monkeypatch.setattr(stages, "shared_reader", lambda: reader)
    line = b'{"text": "' + b"b" * 5000 + b'"}\n'
    (tmp_path / "a.jsonl").write_bytes(line * 3)
    file = (tmp_path / "a.jsonl").open("rb")
    shard = sources.Shard(str(tmp_path / "a.jsonl"), 0, "train")
    piece = stages.Piece(0, (sources.Part(shard, len(line), 3 * len(line), 2, 0, True),), 0, {"train": (0, 1)})

    def read(size: int) -> bytes:
        if file.tell() > 1.5 * len(line):
            raise TimeoutError
        return file.read(size)

    def take(piece: stages.Piece) -> None:
        for _ in stages.items_of(piece):
            raise TimeoutError

    broken = types.SimpleNamespace(read=read, seek=file.seek, close=lambda: None)
    with monkeypatch.context() as patch:
        if in_reader:
            patch.setattr(text_stream.listing, "open_binary", lambda name: broken)
        with pytest.raises(TimeoutError):
            take(piece)
    assert lock._file is None
    assert [place for place, _ in stages.items_of(piece)] == [0, 1]
    file.close()
    reader.close()


def test_a_long_text_is_tokenized_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_stage, "LONGEST_PIECE", 40)
    monkeypatch.setattr(token_stage, "BATCH_CHARACTERS", 100)
    texts = ["one two\nthree " * 50, "", "x" * 500, "short", "a line\n" * 30]
    for text in texts:
        pieces = list(token_stage.text_pieces(text))
        assert "".join(pieces) == text and max(map(len, pieces)) <= 40
    trained = tokenizer.train(["one two three a line short"] * 20, 282)
    encoded = token_stage.encode(trained, texts, np.dtype(np.uint16))
    assert [trained.decode(ids) for ids in encoded] == texts


ENDLESS = """
import time
from contrastive_jax.data.preparation.engine import LocalEngine
with LocalEngine(2) as local:
    local.map(time.sleep, [60, 60], print)
"""


def test_workers_end_when_their_main_process_is_killed() -> None:
    main = subprocess.Popen([sys.executable, "-c", ENDLESS], cwd=ROOT)
    children, deadline = pathlib.Path(f"/proc/{main.pid}/task/{main.pid}/children"), time.monotonic() + 20
    while len(workers := children.read_text().split()) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1)  # they import, and begin their tasks
    main.kill()
    main.wait()
    deadline = time.monotonic() + 2
    while (alive := [number for number in workers if is_running(number)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    for number in alive:
        os.kill(int(number), signal.SIGKILL)
    assert len(workers) == 2 and not alive


def is_running(number: str) -> bool:
    """Whether a process lives; one that has ended is a zombie until its new parent asks for its status."""
    try:
        return " Z " not in pathlib.Path(f"/proc/{number}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
