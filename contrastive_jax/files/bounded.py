"""Copies of the files of buckets on a local disk, up to a size limit: what was used least recently makes room."""

import contextlib
import fcntl
import glob
import hashlib
import os
import pathlib
import re
import shutil

from absl import logging
from etils import epath

from contrastive_jax.files import cache_folder, transfer

# The names of copies, whole or not: what else lies in their folder is not ours.
COPY = re.compile(r"[0-9a-f]{16}(\.partial)?")


def bounded_copy(path: epath.PathLike, pattern: str, cache: epath.PathLike, limit: int) -> list[str]:
    """Copies files of a bucket to the local disk, as many as there is room for.

    The copies lie in a cache that the processes of a machine share. Copies of other data leave it, the least recently used
    first, unless a process uses them. A file that does not fit is left where it is, for as long as the copies of the others
    last: which records come next is drawn anew in each epoch, so that exchanging files would gain nothing.

    Args:
      path: a folder on a bucket.
      pattern: which files, a glob below it.
      cache: the folder of the copies; "": the user's cache, in contrastive_jax/buckets.
      limit: the most bytes of copies in it. A copy under another limit, or under none, may hold other files, and is another.

    Returns:
      The files, sorted by name: the path of the copy, or the name on the bucket of a file that does not fit.
    """
    client, root = transfer.bucket_client(path), transfer.bucket_name(path)
    infos = sorted(client.glob(f"{glob.escape(root)}/{pattern}", detail=True).items())
    state = [(name, info["size"], info.get("generation") or info.get("ETag")) for name, info in infos]
    cache_root = pathlib.Path(cache or cache_folder() / "buckets").expanduser()
    folder = cache_root / hashlib.sha256(repr((os.fspath(path), state, limit)).encode()).hexdigest()[:16]
    with transfer.lock_file(cache_root / "limit.lock", f"{cache_root} is being filled by another process"):
        transfer.hold(folder)
        if not folder.exists():
            room = make_room(folder, limit, sum(size for _, size, _ in state))
            sizes = {}
            for name, size, _ in state:
                if size <= room:
                    sizes[name], room = size, room - size
            if sizes:
                transfer.download(client, sizes, os.fspath(path), folder)
    scheme = os.fspath(path).partition("://")[0]
    paths = [str(folder / name) if (folder / name).exists() else f"{scheme}://{name}" for name, _, _ in state]
    copies = sum(not name.startswith(scheme) for name in paths)
    logging.info("%s: %d of %d files are copied to %s", path, copies, len(paths), cache_root)
    if copies:
        os.utime(folder)
    return paths


def make_room(folder: pathlib.Path, limit: int, needed: int) -> int:
    """Deletes copies beside `folder`, the least recently used first, until `needed` bytes fit under `limit`.

    Returns:
      The bytes that fit; fewer than `needed` if the limit is lower, or processes use other copies.
    """
    copies = [path for path in folder.parent.iterdir() if COPY.fullmatch(path.name) and path.is_dir()]
    others = {path: usage(path) for path in copies if path.stem != folder.name}
    for path in sorted(others, key=lambda path: others[path][0]):
        if limit - sum(size for _, size in others.values()) >= needed:
            break
        with contextlib.suppress(BlockingIOError), path.with_name(f"{path.stem}.used").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(FileNotFoundError):  # somebody else deletes it too
                # Under this name it is never taken for a whole copy, even if this process is killed.
                shutil.rmtree(path.rename(path.with_name(f"{path.stem}.partial")))
            del others[path]
    return limit - sum(size for _, size in others.values())


def usage(path: pathlib.Path) -> tuple[float, int]:
    """Returns when a copy was last used, in seconds since 1970, and its bytes, while others may delete or rename its files."""
    used, size = 0.0, 0
    with contextlib.suppress(FileNotFoundError):
        used = path.stat().st_mtime
    for parent, _, names in os.walk(path):  # passes over a folder that has gone
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                size += os.stat(os.path.join(parent, name)).st_size
    return used, size
