"""The proxy that disturbs storage on purpose, and what the clients make of it."""

import os
import subprocess
import sys
import urllib.request
from typing import Any

import pytest
from cloud.emulators import ROOT, ask, gcs_environment, listing, make_bucket, s3_environment
from cloud.proxy import Proxy

READER = """
import sys, contrastive_jax
from etils import epath
path = epath.Path(sys.argv[1]) / "runs/a.bin"
for number in range(12):
    path.write_bytes(bytes([number]) * 500_000)
    assert path.read_bytes() == bytes([number]) * 500_000
"""


def environment(scheme: str, address: str) -> dict[str, str]:
    return os.environ | (gcs_environment(address) if scheme == "gs" else s3_environment(address))


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_clients_repeat_what_is_refused_or_cut(scheme: str, request: Any) -> None:
    emulator = request.getfixturevalue("gcs" if scheme == "gs" else "s3")
    with Proxy(emulator, seed=3, refuse=0.15, cut=0.3, delay=0.2, seconds=0.1) as proxy:
        bucket = make_bucket(scheme, emulator)
        subprocess.run([sys.executable, "-c", READER, bucket], cwd=ROOT, env=environment(scheme, proxy.address), check=True)
        assert listing(bucket, emulator) == {"runs/a.bin": 500_000}
        assert proxy.seen["refused"] and proxy.seen["cut"], proxy.seen
        counts = proxy.counts()
        assert counts["write runs"] >= 12 and counts["read runs"] >= 12


def test_the_command_line_counts_and_changes_faults(gcs: str, gs_bucket: str) -> None:
    command = [sys.executable, "-m", "tests.cloud.proxy", f"--upstream={gcs}", "--refuse=1", "--statuses=429"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        address, name = process.stdout.readline().strip(), gs_bucket.removeprefix("gs://")
        with pytest.raises(urllib.request.HTTPError, match="429"):
            ask("GET", f"{address}/storage/v1/b/{name}/o?prefix=a/b/c/")
        assert ask("POST", f"{address}/_proxy/set?refuse=0&depth=1") == b'{"list a": 1, "refused": 1}'
        assert listing(gs_bucket, address) == {}
        assert ask("GET", f"{address}/_proxy/counts?counts=0") == b'{"list": 1, "list a/b": 1, "refused": 1}'
        assert ask("GET", f"{address}/_proxy/counts") == b"{}"
        process.kill()
