"""Files and folders between the local disk and a bucket, at the emulators: whole or not at all, copied once, tried again."""

import concurrent.futures
import itertools
import os
import pathlib
import shutil
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
from cloud.emulators import listing, make_bucket
from cloud.proxy import Proxy
from conftest import write_dataset
from etils import epath

from contrastive_jax.config import UserError, default_config
from contrastive_jax.data import pipeline, prepared
from contrastive_jax.files import transfer


@pytest.fixture(autouse=True)
def cache(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """The cache of this test, and no pause between two attempts."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    return tmp_path / "cache"


def fill(folder: pathlib.Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name)


def test_a_folder_on_a_bucket_is_replaced_and_its_last_file_comes_last(bucket: str) -> None:
    target = epath.Path(bucket) / "out"
    with transfer.new_folder(target, last="last") as folder:
        fill(folder, "a", "sub/b", "last")
        assert list(listing(bucket)) == ["out/.incomplete"] and transfer.is_incomplete(target, "last")
    assert list(listing(bucket)) == ["out/a", "out/last", "out/sub/b"]
    with transfer.new_folder(target, last="last") as folder:
        fill(folder, "a", "c", "last")
        assert not transfer.is_incomplete(target, "last")  # the old one can still be read
    assert list(listing(bucket)) == ["out/a", "out/c", "out/last"]


def test_work_that_fails_leaves_a_bucket_as_it_was(bucket: str) -> None:
    with pytest.raises(ZeroDivisionError), transfer.new_folder(epath.Path(bucket) / "out", last="last") as folder:
        fill(folder, "a")
        raise ZeroDivisionError
    assert listing(bucket) == {}


def test_a_folder_whose_copy_breaks_off_is_known_and_replaced(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    target = epath.Path(bucket) / "out"
    with monkeypatch.context() as patch, pytest.raises(OSError, match="broken"):
        with transfer.new_folder(target, last="last") as folder:
            fill(folder, "a", "stale", "last")
            patch.setattr(transfer.bucket_client(target), "put_file", fail_from(2, transfer.bucket_client(target).put_file))
    assert len(listing(bucket)) == 2 and transfer.is_incomplete(target, "last")
    with transfer.new_folder(target, last="last") as folder:
        fill(folder, "b", "last")
    assert list(listing(bucket)) == ["out/b", "out/last"]


def fail_from(number: int, call: Callable, until: int = 10**6) -> Callable:
    """The function, which raises from its call of this number on, to that before `until`; calls are counted from 1."""
    calls, lock = [0], threading.Lock()

    def failing(*arguments: object) -> object:
        with lock:
            calls[0] += 1
            if number <= calls[0] < until:
                raise OSError("broken")
        return call(*arguments)

    return failing


def test_a_local_copy_belongs_to_one_state_of_the_bucket(bucket: str) -> None:
    folder = epath.Path(bucket) / "models" / "one"
    for name in ("a.json", "b.bin", "sub/a.json", "sub/deep/a.json"):
        (folder / name).write_text(name)
    copy = transfer.local_copy(folder, ["*.json", "*/*.json"])
    assert sorted(str(path.relative_to(copy)) for path in copy.rglob("*.*")) == ["a.json", "sub/a.json"]
    assert str(copy).endswith(f"{bucket.partition('://')[2]}/models/one")
    assert transfer.local_copy(folder, ["*.json", "*/*.json"]) == copy
    (folder / "a.json").write_text("changed")
    changed = transfer.local_copy(folder, ["*.json", "*/*.json"])
    assert (changed / "a.json").read_text() == "changed" and (copy / "a.json").read_text() == "a.json"
    with pytest.raises(UserError, match=r"models/two: no \*.json there; check the path"):
        transfer.local_copy(epath.Path(bucket) / "models" / "two", ["*.json"])


def test_processes_of_a_machine_share_one_copy(gs_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, downloads = epath.Path(gs_bucket) / "data", []
    (folder / "a").write_text("a")
    download = transfer.download
    monkeypatch.setattr(transfer, "download", lambda *arguments: downloads.append(1) or download(*arguments))
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        copies = set(pool.map(lambda _: transfer.local_copy(folder), range(4)))
    assert len(copies) == len(downloads) == 1


def test_a_broken_connection_is_tried_again(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = epath.Path(bucket) / "data"
    (folder / "a").write_text("a")
    client = transfer.bucket_client(folder)
    with monkeypatch.context() as patch:
        patch.setattr(client, "get_file", fail_from(1, client.get_file, until=3))
        assert (transfer.local_copy(folder) / "a").read_text() == "a"
        patch.setattr(client, "put_file", fail_from(1, client.put_file, until=3))
        with transfer.new_file(folder / "b") as path:
            path.write_text("b")
    assert listing(bucket) == {"data/a": 1, "data/b": 1}


def test_a_copy_that_the_disk_cannot_hold_is_refused(gs_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (epath.Path(gs_bucket) / "data" / "a").write_text("a")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 0))
    with pytest.raises(UserError, match=r"data: its 0.0 GB do not fit into .*buckets, which has 0.0 GB"):
        transfer.local_copy(epath.Path(gs_bucket) / "data")


def test_an_output_that_cannot_be_written_is_refused_before_the_work(bucket: str, tmp_path: pathlib.Path) -> None:
    transfer.check_output(epath.Path(bucket) / "new" / "a.html", ".html")
    assert listing(bucket) == {}
    with pytest.raises(FileNotFoundError):
        transfer.check_output(epath.Path(f"{bucket}-absent") / "a.html", ".html")
    for path in (epath.Path(bucket) / "a.txt", epath.Path(tmp_path) / "absent" / "a.html"):
        with pytest.raises(UserError, match="give a .html in a folder that exists"):
            transfer.check_output(path, ".html")


def test_a_prepared_dataset_reads_the_same_from_a_bucket(
    bucket: str, dataset: pathlib.Path, cache: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    root = epath.Path(bucket) / "data[1]"  # which is no glob
    transfer.upload_folder(dataset, root, last="manifest.json")
    local = prepared.open_split(dataset, "validation").read_records([3, 0, 59]).token_lists()
    for cache_dir in ("", str(tmp_path / "disk")):
        remote = prepared.open_split(root, "validation", cache_dir).read_records([3, 0, 59]).token_lists()
        assert local == remote
    copied = [path.name.partition("-0")[0] for path in tmp_path.rglob("*.array_record*")]
    assert copied == ["pile-validation.array_record"] * (2 if bucket.startswith("gs://") else 4)


def test_a_cache_with_a_limit_keeps_what_fits_and_what_is_in_use(
    gs_bucket: str, s3_bucket: str, dataset: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for root in (f"{gs_bucket}/one", f"{gs_bucket}/two", f"{s3_bucket}/one"):
        transfer.upload_folder(dataset, epath.Path(root), last="manifest.json")
    sizes = [path.stat().st_size for path in sorted(dataset.rglob("*train.array_record*"))]
    disk, gigabytes = tmp_path / "disk", (sizes[0] + sizes[1] / 2) / 1e9
    expected = prepared.open_split(dataset, "train").read_records(range(150)).token_lists()

    def copies(root: str) -> list[str]:
        """The numbers of the file shards of `root` on the disk, after its records were read."""
        records = prepared.open_split(root, "train", str(disk), gigabytes)
        assert records.read_records(range(150)).token_lists() == expected
        return [path.name[-14] for path in sorted(disk.rglob(f"{root.partition('://')[2]}/**/*.array_record*"))]

    monkeypatch.setattr(transfer, "HELD", {})
    assert copies(f"{gs_bucket}/one") == copies(f"{gs_bucket}/one") == ["0"]
    assert copies(f"{gs_bucket}/two") == []  # this process uses the other one
    for folder in list(transfer.HELD):
        os.close(transfer.HELD.pop(folder))
    assert copies(f"{gs_bucket}/two") == ["0"] and not list(disk.rglob("one"))
    with pytest.raises(
        UserError, match="cache_gb=.*one does not fit, and records on s3:// are read from copies alone; raise it"
    ):
        prepared.open_split(f"{s3_bucket}/one", "train", str(disk), gigabytes)


def test_a_copy_under_a_limit_is_not_taken_for_a_whole_one(
    gs_bucket: str, dataset: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, disk = f"{gs_bucket}/data[1]", tmp_path / "disk"
    transfer.upload_folder(dataset, epath.Path(root), last="manifest.json")
    size = min(path.stat().st_size for path in dataset.rglob("*train.array_record*"))
    monkeypatch.setattr(transfer, "HELD", {})
    lengths = prepared.open_split(dataset, "train").lengths()
    for gigabytes in (size / 1e9, 0.0, 1.0):
        np.testing.assert_array_equal(prepared.open_split(root, "train", str(disk), gigabytes).lengths(), lengths)
    assert sorted(len(list(folder.rglob("*.array_record*"))) for folder in disk.iterdir() if folder.is_dir()) == [1, 2, 2]
    with pytest.raises(UserError, match=r"cache_gb=2.5: gs://.* not copied .* without config.data.cache_dir; set it"):
        prepared.open_split(root, "train", "", 2.5)


def test_a_local_copy_that_is_used_again_is_younger(gs_bucket: str) -> None:
    (epath.Path(gs_bucket) / "data" / "a").write_text("a")
    copy = transfer.local_copy(f"{gs_bucket}/data").parents[1]
    os.utime(copy, (1, 1))
    assert transfer.local_copy(f"{gs_bucket}/data").parents[1] == copy and copy.stat().st_mtime > 1


def test_a_missing_file_shard_of_a_bucket_is_said_at_once(bucket: str, dataset: pathlib.Path, tmp_path: pathlib.Path) -> None:
    shutil.copytree(dataset, tmp_path / "data")
    for path in (tmp_path / "data" / "pile").rglob("*train*"):
        path.unlink()
    transfer.upload_folder(tmp_path / "data", epath.Path(bucket) / "data", last="manifest.json")
    began = time.monotonic()
    with pytest.raises(UserError, match=r"data: no pile/\*/\*-train"):
        prepared.open_split(f"{bucket}/data", "train")
    with pytest.raises(UserError, match="typo: no manifest.json there"):
        prepared.open_split(f"{bucket}/typo", "train")
    assert time.monotonic() - began < 5


def test_a_step_costs_few_requests_to_the_bucket(gcs: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One per chunk of records: at most one per 64 pairs after the first step, also for one of four processes."""
    folder = write_dataset(tmp_path / "data", {"train": [20] * 8000}, domains=["a"])
    root = epath.Path(make_bucket("gs", gcs)) / "data"
    transfer.upload_folder(folder, root, last="manifest.json")
    config = default_config().data
    config.update(batch_size=128, length=12, min_span=5, max_span=10, shuffle_records=4000)
    expected = list(itertools.islice(pipeline.batches(prepared.open_split(folder, "train"), config, 0), 41))
    with Proxy(gcs) as proxy:
        monkeypatch.setenv("CLOUD_STORAGE_EMULATOR_ENDPOINT", proxy.address)  # of array_record
        for pairs in (np.arange(128), np.arange(32, 64)):
            proxy.requests.clear()
            batches = pipeline.batches(prepared.open_split(root, "train"), config, 0, pairs)
            batch, first = next(batches), len(proxy.requests)
            for step in range(40):
                batch = next(batches)
                np.testing.assert_array_equal(batch.tokens, expected[step + 1].tokens[pairs])
            assert 0 < len(proxy.requests) - first <= 40 * len(pairs) / 64
