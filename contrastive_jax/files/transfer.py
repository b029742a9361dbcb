"""Moves files and whole folders between the local disk and buckets, for what cannot be written or read in place.

`new_file` and `new_folder` let a program write on a local disk what then appears, whole, at a local path or on a bucket.
`local_copy` gives it a folder on a bucket as a local one. Callers need not know whether a path is local.
"""

import concurrent.futures
import contextlib
import errno
import fcntl
import glob
import hashlib
import os
import pathlib
import shutil
import socket
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from absl import logging
from etils import epath

from contrastive_jax.config import UserError
from contrastive_jax.files import cache_folder, on_bucket
from contrastive_jax.runtime.progress import Progress

INCOMPLETE = ".incomplete"  # in a folder on a bucket whose files are not all there yet
TRANSFERS = 8  # files that are copied at once
ATTEMPTS = 5  # to copy one file, with a pause of 1, 2, 4 ... seconds between them
FINAL = {errno.ENOENT, errno.EACCES, errno.ENOSPC, errno.EDQUOT, errno.EROFS}  # errors that another attempt would not mend

HELD: dict[pathlib.Path, int] = {}  # the copies that this process uses, with the file that is locked for each


def bucket_client(path: epath.PathLike) -> Any:
    """Returns the file system of fsspec through which etils reads the bucket of a path."""
    return epath.backend.fsspec_backend.fs(path)


def bucket_name(path: epath.PathLike) -> str:
    """Returns the name of a path as the clients list it, BUCKET/NAME."""
    return os.fspath(path).partition("://")[2].rstrip("/")


def check_output(path: epath.Path, suffix: str = "") -> None:
    """Checks that a file can be written, before the long work whose result it will hold.

    Args:
      path: the value of --output.
      suffix: how its name must end.

    Raises:
      UserError: it is a folder, lies in a folder that does not exist, or has another suffix.
      OSError: the bucket takes no file there.
    """
    remote = on_bucket(path)
    if path.suffix != (suffix or path.suffix) or path.is_dir() or not (remote or path.parent.is_dir()):
        raise UserError(f"--output={path}: give a {suffix or 'file'} in a folder that exists")
    if remote:
        probe = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}"
        probe.write_bytes(b"")
        with contextlib.suppress(PermissionError):  # some accounts may write, but not delete
            probe.unlink()


@contextlib.contextmanager
def new_file(path: epath.Path) -> Iterator[pathlib.Path]:
    """Yields a local path for a large file; the file is at `path`, whole, when the block ends without an exception."""
    if on_bucket(path):
        with tempfile.TemporaryDirectory(prefix="contrastive_jax-") as folder:
            yield (local := pathlib.Path(folder, path.name))
            attempt(lambda: bucket_client(path).put_file(str(local), str(path)), str(path))
    else:
        partial = pathlib.Path(path.parent, f"{path.name}.partial")
        try:
            yield partial
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(target: epath.Path, last: str) -> Iterator[pathlib.Path]:
    """Yields an empty local folder; `target` has its content, whole, when the block ends without an exception.

    A local folder is filled beside `target`, whose name it then gets. On a bucket, where no folder can be renamed, the file
    `last` is written last: a reader looks for it. Until then `target` has a file INCOMPLETE, which is written first, so that a
    bucket that takes no files is known before the work. What was in `target` before is replaced.

    Args:
      target: the folder.
      last: the name of a file in it.
    """
    if not on_bucket(target):
        for leftover in sorted(target.parent.glob(f"{target.name}.incomplete-*")):
            logging.warning("%s belongs to another process; remove it if that was killed", leftover)
        work = target.parent / f"{target.name}.incomplete-{uuid.uuid4().hex[:8]}"
        work.mkdir(parents=True)
        try:
            yield pathlib.Path(work)
            move_into_place(work, target)
        finally:
            work.rmtree(missing_ok=True)
        return
    marker = target / INCOMPLETE
    marker.write_text(f"process {os.getpid()} of {socket.gethostname()}\n")
    with tempfile.TemporaryDirectory(prefix="contrastive_jax-") as folder:
        try:
            yield pathlib.Path(folder)
        except BaseException:
            with contextlib.suppress(Exception):  # the first error counts
                marker.unlink()
            raise
        upload_folder(pathlib.Path(folder), target, last)
    marker.unlink()


def is_incomplete(target: epath.Path, last: str) -> bool:
    """Returns whether a folder on a bucket is what a `new_folder` that was killed left behind."""
    return on_bucket(target) and (target / INCOMPLETE).exists() and not (target / last).exists()


def writer_of(target: epath.Path) -> str:
    """Returns who began to write an incomplete folder, "process 123 of HOST"."""
    return (target / INCOMPLETE).read_text().strip()


def move_into_place(work: epath.Path, target: epath.Path) -> None:
    """Renames a local folder to its final name; an old one is moved aside first and removed last."""
    if target.exists():
        old = work.parent / f"{work.name}.old"
        target.rename(old)
        work.rename(target)
        old.rmtree()
    else:
        work.rename(target)


def upload_folder(folder: pathlib.Path, target: epath.Path, last: str) -> None:
    """Replaces a folder on a bucket by a local one; the file `last` leaves first and comes last."""
    client = bucket_client(target)
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}
    root = bucket_name(target)
    before = [name.removeprefix(f"{root}/") for name in client.find(root)]
    if last in before:
        client.rm_file(f"{root}/{last}")

    def upload(name: str) -> int:
        attempt(lambda: client.put_file(str(folder / name), f"{root}/{name}"), f"{target}/{name}")
        return sizes[name]

    with Progress(f"writing {target}", sum(sizes.values()), "bytes", quiet_if_short=True) as progress:
        in_parallel(upload, [name for name in sizes if name != last], progress.advance)
        in_parallel(lambda name: client.rm_file(f"{root}/{name}") or 0, sorted({*before} - {*sizes, last, INCOMPLETE}))
        progress.advance(upload(last))


def move_folder(source: epath.Path, target: epath.Path, last: str) -> None:
    """Gives a folder a new name; a folder that has this name is deleted first.

    A bucket cannot rename a folder: it copies each object, and the old ones are deleted when all copies are there.

    Args:
      source: the folder.
      target: its new name, on the same disk or bucket.
      last: the name of the file in it that marks a whole folder: copied last, deleted first.
    """
    target.rmtree(missing_ok=True)
    if not on_bucket(source):
        target.parent.mkdir(parents=True, exist_ok=True)
        source.rename(target)
        return
    client, old, new = bucket_client(source), bucket_name(source), bucket_name(target)
    names = [name.removeprefix(f"{old}/") for name in client.find(old)]

    def copy(name: str) -> int:
        attempt(lambda: client.cp_file(f"{old}/{name}", f"{new}/{name}"), f"{target}/{name}")
        return 0

    in_parallel(copy, [name for name in names if name != last])
    in_parallel(copy, [name for name in names if name == last])
    (source / last).unlink(missing_ok=True)
    source.rmtree(missing_ok=True)


def local_copy(path: epath.PathLike, patterns: Sequence[str] = (), cache: epath.PathLike = "") -> pathlib.Path:
    """Returns a folder on a bucket as a local one, for libraries that read local files alone; a local folder as it is.

    The copy lies in a cache that the processes of a machine share: one of them copies, the others wait for it. A copy belongs
    to one state of the bucket: after a file there has changed, a new copy is made.

    Args:
      path: the folder.
      patterns: which files of a bucket to copy, as globs below `path`; none: all.
      cache: the folder of the copies; "": the user's cache, in contrastive_jax/buckets.

    Raises:
      UserError: the bucket has no such files, or the disk has no room for them.
    """
    if not on_bucket(path):
        return pathlib.Path(path)
    client, cache_root = bucket_client(path), pathlib.Path(cache or cache_folder() / "buckets").expanduser()
    root = bucket_name(path)
    literal = glob.escape(root)
    found = [client.glob(f"{literal}/{pattern}", detail=True) for pattern in patterns] or [client.find(root, detail=True)]
    infos = {name: info for part in found for name, info in part.items() if info["type"] == "file" and name != root}
    if not infos:
        raise UserError(f"{path}: no {' and no '.join(patterns) or 'files'} there; check the path")
    state = [(name, info["size"], info.get("generation") or info.get("ETag")) for name, info in sorted(infos.items())]
    folder = cache_root / hashlib.sha256(repr((os.fspath(path), state)).encode()).hexdigest()[:16]
    hold(folder)
    if not folder.exists():
        with lock_file(folder.with_name(f"{folder.name}.lock"), f"{path} is being copied by another process"):
            if not folder.exists():
                download(client, {name: info["size"] for name, info in infos.items()}, os.fspath(path), folder)
    os.utime(folder)  # `bounded.make_room` deletes first what was used least recently
    return folder / root


def hold(folder: pathlib.Path) -> None:
    """Keeps a copy from being deleted by `bounded.make_room` as long as this process lives."""
    if folder not in HELD:
        folder.parent.mkdir(parents=True, exist_ok=True)
        HELD[folder] = os.open(folder.with_name(f"{folder.name}.used"), os.O_RDWR | os.O_CREAT)
        fcntl.flock(HELD[folder], fcntl.LOCK_SH)


def download(client: Any, sizes: dict[str, int], path: str, folder: pathlib.Path) -> None:
    """Copies files of a bucket into a folder that appears when it is whole; what a killed process has copied is kept.

    Args:
      client: of the bucket.
      sizes: the bytes of each file by its name, BUCKET/NAME.
      path: what is copied, for the messages.
      folder: the folder to make; files lie in it under their names.

    Raises:
      UserError: the disk has no room.
    """
    partial = folder.with_name(f"{folder.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    missing = [name for name in sizes if not (partial / name).exists()]
    needed, free = sum(sizes[name] for name in missing), shutil.disk_usage(partial).free
    if needed > free:
        raise UserError(f"{path}: its {needed / 1e9:,.1f} GB do not fit into {folder.parent}, which has {free / 1e9:,.1f} GB")

    def fetch(name: str) -> int:
        target = partial / name
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{target.name}.part")
        attempt(lambda: client.get_file(name, str(part)), name)
        if part.stat().st_size != sizes[name]:
            raise OSError(f"{name}: has changed while it was copied; start again")
        part.rename(target)
        return sizes[name]

    logging.info("copying %s, %.1f MB, to %s", path, needed / 1e6, folder)
    with Progress(f"copying {path}", needed, "bytes", quiet_if_short=True) as progress:
        in_parallel(fetch, missing, progress.advance)
    partial.rename(folder)


def in_parallel(
    transfer: Callable[[str], int], names: Sequence[str], advance: Callable[[int], None] = lambda size: None
) -> None:
    """Calls `transfer` for each name in a few threads, and `advance` with what each call returns: bytes."""
    with concurrent.futures.ThreadPoolExecutor(TRANSFERS) as pool:
        for size in pool.map(transfer, names):
            advance(size)


def attempt(transfer: Callable[[], Any], name: str) -> Any:
    """Copies a file, several times if need be: the clients do not begin a copy again whose connection broke in its middle.

    Args:
      transfer: copies it.
      name: of the file, for the log.

    Returns:
      What `transfer` returns.
    """
    for pause in (2**number for number in range(ATTEMPTS - 1)):
        try:
            return transfer()
        except Exception as error:  # the clients raise many kinds
            if getattr(error, "errno", None) in FINAL or isinstance(error, FileNotFoundError | PermissionError):
                raise
            logging.warning("%s: %s; trying again in %d s", name, str(error)[:200] or type(error).__name__, pause)
            time.sleep(pause)
    return transfer()


@contextlib.contextmanager
def lock_file(path: pathlib.Path, waiting: str) -> Iterator[None]:
    """Holds a lock that only one process of this machine has at a time; `waiting` is logged if another has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logging.info("%s; waiting", waiting)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
