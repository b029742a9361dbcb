"""One line, soon, for what goes wrong with a bucket; runs that go on, or end without a loss, when it does in mid-run."""

import os
import pathlib
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from cloud.emulators import ROOT, free_port, gcs_environment, listing, make_bucket, s3_environment
from cloud.proxy import Proxy
from conftest import command, wait_for

from contrastive_jax.config import UserError
from contrastive_jax.files import errors


def environment(scheme: str, address: str) -> dict[str, str]:
    return os.environ | (gcs_environment(address) if scheme == "gs" else s3_environment(address))


def last_line(arguments: list[str], scheme: str, address: str) -> tuple[str, int]:
    """The last line and the exit status of a command, which ends within 30 seconds of the time that it needs to start."""
    began = time.monotonic()
    ended = subprocess.run(arguments, cwd=ROOT, env=environment(scheme, address), capture_output=True, text=True, timeout=120)
    assert "Traceback" not in ended.stderr, ended.stderr
    assert time.monotonic() - began < 60
    return ended.stderr.strip().splitlines()[-1], ended.returncode


def verify(workdir: str) -> list[str]:
    return [sys.executable, "-m", "contrastive_jax", "verify", f"--workdir={workdir}"]


@pytest.mark.parametrize("scheme", ["gs", pytest.param("s3", marks=pytest.mark.slow)])
def test_no_bucket_no_permission_and_no_network_are_one_line(scheme: str, request: Any) -> None:
    emulator = request.getfixturevalue("gcs" if scheme == "gs" else "s3")
    workdir = f"{make_bucket(scheme, emulator)}/run"
    line, status = last_line(verify(f"{scheme}://no-such-bucket/run"), scheme, emulator)
    assert status == 2 and line.startswith(f"error: {scheme}://no-such-bucket/run: there is no bucket no-such-bucket"), line
    with Proxy(emulator, refuse=1, statuses=(403,)) as proxy:
        line, status = last_line(verify(workdir), scheme, proxy.address)
    assert status == 2 and line.startswith(f"error: {workdir}: no permission"), line
    line, status = last_line(verify(workdir), scheme, f"http://127.0.0.1:{free_port()}")
    assert status == 1 and line.startswith(f"error: {workdir}: ") and "check the network" in line, line
    line, status = last_line(verify(workdir), scheme, emulator)
    assert status == 2 and workdir in line and "no bucket" not in line, line  # a typo in the folder


def test_a_silent_address_is_given_up(monkeypatch: pytest.MonkeyPatch, gcs: str) -> None:
    monkeypatch.setattr(errors, "ANSWER_SECONDS", 2)
    with Proxy(gcs, delay=1, seconds=30) as proxy:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.address)
        with pytest.raises(
            UserError, match=r"gs://bucket/run: no answer within 2 s \(.* is reached, but is silent\)"
        ) as raised:
            errors.check_reachable("gs://bucket/run")
        assert raised.value.status == 1


def test_numbers_and_words_in_a_name_are_no_status() -> None:
    damage = ValueError('DATA_LOSS: Error reading "gs://my-connection-500/run/checkpoints/500/params/x": checksum mismatch')
    assert errors.explain(damage, ["gs://my-connection-500/run"]) is None
    for text in ("503 at gs://exp-403/x", "exp-403/x: 503", "503: https://storage/v1/b/exp-403/o/x"):
        explained = errors.explain(OSError(text), ["gs://exp-403/run"])
        assert explained is not None and explained.status == 1 and "the storage failed" in str(explained)
    explained = errors.explain(OSError("403 at gs://exp-503/x"), ["gs://exp-503/run"])
    assert explained is not None and explained.status == 2 and "no permission" in str(explained)


@pytest.mark.parametrize("argument", ["--workdir=gs:/bucket/run", "--model=s3:///run", "--data=a,gcs://bucket/a", "gs://"])
def test_misspelt_names_never_become_local_folders(argument: str) -> None:
    with pytest.raises(UserError, match="write gs://BUCKET/NAME or s3://BUCKET/NAME"):
        errors.check_names([argument])


def trained(arguments: list[str], address: str, act: Callable[[str], None] = lambda line: None) -> tuple[str, int]:
    """Runs a training, and calls `act` with each line of its log; returns the log and the exit status."""
    lines = []
    with subprocess.Popen(
        arguments, cwd=ROOT, env=environment("gs", address), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout
        timer = threading.Timer(240, process.kill)
        timer.start()
        for line in process.stdout:
            lines.append(line)
            act(line)
        timer.cancel()
    return "".join(lines), process.returncode


@pytest.mark.slow
def test_a_training_goes_on_through_refused_requests_and_says_so(gcs: str, gs_bucket: str, dataset: pathlib.Path) -> None:
    flags = command(dataset, ROOT, "--config.checkpoint_every=2")
    arguments = [f"--workdir={gs_bucket}/run" if "--workdir" in flag else flag for flag in flags]
    with Proxy(gcs, seed=1, refuse=0.05) as proxy:
        log, status = trained(arguments, proxy.address)
        assert status == 0, log[-3000:]
        assert proxy.seen["refused"] > 0
    assert re.search("repeats a request|were refused by the bucket, and repeated|trying again", log), log[-3000:]
    assert {"run/checkpoints/2/commit_success.txt", "run/checkpoints/4/commit_success.txt"} <= set(listing(gs_bucket))
    assert not re.search(r"^Traceback", log, re.M)


def test_a_bucket_that_disappears_in_mid_run_ends_it_without_a_loss(gcs: str, gs_bucket: str, dataset: pathlib.Path) -> None:
    with Proxy(gcs) as proxy:

        def disappear(line: str) -> None:
            if "checkpoint 2 is complete" in line:
                wait_for(lambda: "run/checkpoints/2/commit_success.txt" in listing(gs_bucket))
                proxy.faults.change({"refuse": "1", "statuses": "404"})

        flags = ["--config.checkpoint_every=2", "--config.steps=100000"]
        arguments = [f"--workdir={gs_bucket}/run" if "--workdir" in flag else flag for flag in command(dataset, ROOT, *flags)]
        log, status = trained(arguments, proxy.address, disappear)
    assert status == 1, log[-3000:]
    assert log.strip().splitlines()[-1].startswith("error: "), log[-3000:]
    assert gs_bucket in log.strip().splitlines()[-1]
    assert "run/checkpoints/2/commit_success.txt" in listing(gs_bucket)
