"""The input of prepare: globs with names and limits, local, on buckets and on the Hugging Face Hub; what cannot be read."""

import concurrent.futures
import gzip
import http.client
import json
import os
import pathlib
import re
import subprocess
import sys
import time
import urllib.parse

import pytest
from cloud.proxy import Proxy
from conftest import ROOT
from hub import Hub

from contrastive_jax.config import UserError
from contrastive_jax.data.raw import inputs, losses
from contrastive_jax.data.raw.inputs import Input
from contrastive_jax.data.raw.sources import Shard
from contrastive_jax.files import transfer


def write(folder: pathlib.Path, **sizes: int) -> None:
    """Files NAME.jsonl of so many bytes."""
    for name, size in sizes.items():
        (folder / f"{name}.jsonl").write_bytes(b"x" * size)


def named(shards: list[Shard]) -> list[str]:
    return [pathlib.Path(shard.name).name for shard in shards]


def test_globs(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, b=1, a=2, c=3)
    (tmp_path / "d.jsonl").mkdir()
    shards = inputs.file_shards([f"{tmp_path}/b*", f"{tmp_path}/*.jsonl"], "train", "input")
    assert named(shards) == ["b.jsonl", "a.jsonl", "c.jsonl"]
    assert [(shard.order, shard.split, shard.size) for shard in shards] == [(0, "train", 1), (1, "train", 2), (2, "train", 3)]
    assert shards[0].version == str((tmp_path / "b.jsonl").stat().st_mtime_ns)
    monkeypatch.chdir(tmp_path)
    assert [shard.name for shard in inputs.file_shards(["c.jsonl"], "", "input")] == ["c.jsonl"]
    with pytest.raises(UserError, match=r"--validation=nowhere-\*\.zst: no file matches"):
        inputs.file_shards(["nowhere-*.zst"], "validation", "validation")


MEANINGS = {
    "train/*.jsonl.zst": Input("", "train/*.jsonl.zst"),
    "web=train/*.jsonl.zst": Input("web", "train/*.jsonl.zst"),
    "web=gs://bucket/a*.parquet@2000000": Input("web", "gs://bucket/a*.parquet", 2_000_000),
    "a.jsonl@5GB": Input("", "a.jsonl", 0, 5 * 10**9),
    "a.jsonl@1.5MB": Input("", "a.jsonl", 0, 1_500_000),
    "hf://datasets/org/set@main/data/*.parquet": Input("", "hf://datasets/org/set@main/data/*.parquet"),
    "my set=hf://datasets/org/set@v1.0/*.jsonl@10": Input("my set", "hf://datasets/org/set@v1.0/*.jsonl", 10),
    "./lang=en/*.parquet": Input("", "./lang=en/*.parquet"),
    "/data/lang=en/*.parquet": Input("", "/data/lang=en/*.parquet"),
    "data/v=[1-3]/a.jsonl": Input("", "data/v=[1-3]/a.jsonl"),
    "a@b.jsonl": Input("", "a@b.jsonl"),
    "day@20240101/a.jsonl": Input("", "day@20240101/a.jsonl"),
}


@pytest.mark.parametrize("value", MEANINGS)
def test_an_input_has_a_name_and_a_limit(value: str) -> None:
    assert inputs.parse_input(value, "input") == MEANINGS[value]


def test_a_name_that_may_be_a_path_is_refused(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lang=en").mkdir()
    write(tmp_path / "lang=en", a=1)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"--input=lang=en/a\.jsonl: .* write \./lang=en/a\.jsonl"):
        inputs.file_shards(["lang=en/a.jsonl"], "", "input")
    assert len(inputs.file_shards(["./lang=en/a.jsonl"], "", "input")) == 1
    with pytest.raises(UserError, match=r"no file matches; .* write \./lang=de/a\.jsonl"):
        inputs.file_shards(["lang=de/a.jsonl"], "", "input")
    with pytest.raises(UserError, match="a whole number of lines"):
        inputs.file_shards(["./lang=en/a.jsonl@1.5"], "", "input")


@pytest.mark.parametrize("name", ["a.tar", "b.warc.gz", "README.md", "c.jsonl.lz4", "d.arrow", "e.zip"])
def test_b10_a_file_that_cannot_be_read_is_refused_at_once(tmp_path: pathlib.Path, name: str) -> None:
    write(tmp_path, a=1)
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match=rf"{re.escape(name)} cannot be read; narrow the glob"):
        inputs.file_shards([f"{tmp_path}/*"], "", "input")


def test_limits_are_shared_out_by_size(tmp_path: pathlib.Path) -> None:
    write(tmp_path, a=100, b=200, c=700, d=1)
    shards = inputs.file_shards([f"mine={tmp_path}/[abc]*@50", f"{tmp_path}/d*"], "", "input")
    assert [shard.max_lines for shard in shards] == [5, 10, 35, 0]
    assert [shard.domain for shard in shards] == ["mine", "mine", "mine", ""]
    shards = inputs.file_shards([f"{tmp_path}/[abc]*@1MB"], "", "input", limit=11)
    assert [(shard.max_bytes, shard.max_lines) for shard in shards] == [(100_000, 1), (200_000, 2), (700_000, 8)]
    assert len(inputs.file_shards([f"{tmp_path}/*"], "", "input", limit=1)) == 1


def outcome(lines: dict[str, int], bad: dict[str, int], lost: dict[str, int]) -> dict:
    """What a task of the stage "hash" leaves."""
    rejects = [("damaged file" if file in lost else "not JSON", file, "train", "x", number) for file, number in bad.items()]
    return {"lines": [*lines.items()], "rejects": rejects, "lost_bytes": [*lost.items()]}


def test_losses_are_shares_with_the_worst_file_first() -> None:
    files = [{"name": name, "size": 1000} for name in "abcd"]
    parts = [outcome({"a": 7_000_000, "b": 10}, {"a": 1200}, {}), outcome({"a": 12_001, "c": 101}, {"a": 4, "c": 1}, {})]
    entries = losses.losses_of(files, parts)
    assert [entry["file"] for entry in entries] == ["c", "a"]
    assert losses.describe(entries)[1] == "a: 1,204 of 7,012,001 lines (0.02 %) were passed over"
    damaged = losses.losses_of(files, [outcome({"a": 50, "b": 10}, {"a": 1, "b": 5}, {"a": 810})])
    assert [entry["file"] for entry in damaged] == ["a", "b"]
    assert losses.describe(damaged)[0].endswith("; 81 % of its bytes lie behind a damage")
    names = [f"{number}" for number in range(30)]
    one = dict.fromkeys(names, 1)
    many = losses.losses_of([{"name": name, "size": 1} for name in names], [outcome(one, one, {})])
    assert losses.describe(many)[-1] == "20 more files: 20 of 20 lines (100 %) were passed over"


FILES = 10_000


def test_b10_ten_thousand_files_are_listed_in_seconds(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(FILES):
        (tmp_path / f"{number:05d}.jsonl").touch()
    began = time.monotonic()
    assert len(inputs.file_shards([f"{tmp_path}/*.jsonl"], "", "input")) == FILES
    assert time.monotonic() - began < 3


def test_b10_a_glob_on_a_bucket_costs_one_listing(gcs: str, gs_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page of a listing has at most 1,000 objects; no request is made per object."""
    host, name, count = urllib.parse.urlsplit(gcs).netloc, gs_bucket.removeprefix("gs://"), 1500
    path = f"/upload/storage/v1/b/{name}/o?uploadType=media&name=raw/{{}}.jsonl"

    def upload(numbers: range) -> None:
        connection = http.client.HTTPConnection(host)
        for number in numbers:
            connection.request("POST", path.format(number), b"{}")
            connection.getresponse().read()
        connection.close()

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(upload, [range(start, count, 4) for start in range(4)]))
    client = transfer.bucket_client(gs_bucket)
    with Proxy(gcs) as proxy, monkeypatch.context() as patch:
        patch.setattr(client, "_endpoint", proxy.address)
        shards = inputs.file_shards([f"{gs_bucket}/raw/*.jsonl"], "", "input")
        requests = len(proxy.requests)
    assert len(shards) == count and all(shard.size == 2 and shard.version for shard in shards)
    assert 0 < requests <= 3


# The address of the Hub is in the environment before huggingface_hub is imported.
HUB_PROGRAM = """
import json
import huggingface_hub
from contrastive_jax.data.raw import inputs, parts, sources
shards = inputs.file_shards(["hf://datasets/allenai/c4/en/c4-train.*.json.gz"], "", "input")
assert all(shard.version and shard.size for shard in shards)
print(json.dumps([item[:2] for shard in shards for part in parts.cut(shard, 10) for item in sources.read(part)]))
for pattern, endpoint in ("hf://datasets/allenai/nosuch/*", None), ("hf://datasets/a/b/*", "http://127.0.0.1:1"):
    huggingface_hub.HfFileSystem.clear_instance_cache()
    if endpoint:
        huggingface_hub.HfFileSystem = lambda cls=huggingface_hub.HfFileSystem: cls(endpoint=endpoint)
    try:
        inputs.file_shards([pattern], "", "input")
    except Exception as error:
        print(error)
"""


def test_files_of_the_hub_are_listed_and_read(tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "allenai/c4/en"
    folder.mkdir(parents=True)
    for number in range(3):
        document = json.dumps({"text": f"document {number}", "timestamp": "", "url": "http://x"})
        (folder / f"c4-train.0000{number}-of-00003.json.gz").write_bytes(gzip.compress(document.encode()))
    with Hub(tmp_path) as hub:
        environment = os.environ | {"HF_ENDPOINT": hub.address}
        done = subprocess.run([sys.executable, "-c", HUB_PROGRAM], env=environment, cwd=ROOT, capture_output=True, check=True)
    read, missing, unreachable = done.stdout.decode().splitlines()
    assert json.loads(read) == [[f"document {number}", "c4"] for number in range(3)]
    assert re.fullmatch(r"hf://datasets/allenai/nosuch/\*: cannot be read \(.*\); check the name, and log in .*", missing)
    assert re.fullmatch(r"hf://datasets/a/b/\*: the Hugging Face Hub failed \(.*\); check the network", unreachable)
    assert sum("/tree/" in request for request in hub.requests) <= 4 and len(hub.requests) < 12
