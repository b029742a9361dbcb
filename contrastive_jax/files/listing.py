"""Lists and opens files of any storage: local, gs://, s3://, and hf://, the Hugging Face Hub.

With `list_files("hf://datasets/allenai/c4/en/c4-train.*.json.gz")` the storage is asked for one listing, however many files
match.
"""

import contextlib
import glob
import os
import stat
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

from etils import epath

from contrastive_jax.config import UserError
from contrastive_jax.files import MachineError, on_bucket
from contrastive_jax.files.transfer import bucket_client


class ListedFile(NamedTuple):
    """A file, its size in bytes, and what changes when its content does: a generation, an ETag, or the time of its change."""

    name: str
    size: int
    version: str


def on_hub(name: str) -> bool:
    """Returns whether a name is on the Hugging Face Hub."""
    return name.startswith("hf://")


def client_of(name: str) -> Any:
    """Returns the file system of fsspec for a name on gs://, s3:// or hf://."""
    if not on_hub(name):
        return bucket_client(name)
    import huggingface_hub  # takes a second, and most inputs need none

    return huggingface_hub.HfFileSystem()


def list_files(pattern: str) -> list[ListedFile]:
    """Returns the files that match a glob, sorted by name; folders are left out."""
    if not on_bucket(pattern) and not on_hub(pattern):
        return sorted(local_files(pattern))
    scheme, _, rest = pattern.partition("://")
    with hub_errors(pattern):
        found = client_of(pattern).glob(rest, detail=True)
    listed = [(f"{scheme}://{name.removeprefix('hf://')}", info) for name, info in found.items() if info["type"] == "file"]
    return sorted(ListedFile(name, info["size"] or 0, version_of(info)) for name, info in listed)


def files_below(folder: epath.PathLike, pattern: str) -> list[ListedFile]:
    """Returns the files that match a glob below a folder; the name of the folder is no glob, even if it has brackets."""
    return list_files(f"{glob.escape(os.fspath(folder).rstrip('/'))}/{pattern}")


def local_files(pattern: str) -> list[ListedFile]:
    """Returns the local files that match a glob, or the one file that has this very name, brackets included."""
    files, pattern = [], os.path.expanduser(pattern)
    for name in [pattern] if os.path.isfile(pattern) else glob.glob(pattern, recursive=True):
        try:
            status = os.stat(name)
        except OSError as error:
            raise UserError(f"{name}: {error.strerror}; a link may lead nowhere") from error
        if not stat.S_ISDIR(status.st_mode):
            files.append(ListedFile(name, status.st_size, str(status.st_mtime_ns)))
    return files


def version_of(info: dict[str, Any]) -> str:
    """Returns the version of an object of a bucket or of the Hub from its listing."""
    return str(info.get("generation") or info.get("ETag") or info.get("blob_id") or info.get("LastModified") or "")


def open_binary(name: str) -> IO[bytes]:
    """Opens a file of any storage for reading."""
    if not on_hub(name):
        return epath.Path(name).open("rb")
    with hub_errors(name):
        return client_of(name).open(name, "rb")


@contextlib.contextmanager
def hub_errors(name: str) -> Iterator[None]:
    """Raises the one line for an error of the Hugging Face Hub: a UserError to mend, or a MachineError."""
    try:
        yield
    except Exception as error:
        if not on_hub(name) or isinstance(error, UserError):
            raise
        status = getattr(getattr(error, "response", None), "status_code", None)
        text = " ".join(str(error).split())[:200]
        if status in (401, 403, 404) or isinstance(error, FileNotFoundError):
            raise UserError(f"{name}: cannot be read ({text}); check the name, and log in with `hf auth login`") from error
        raise MachineError(f"{name}: the Hugging Face Hub failed ({text}); check the network") from error
