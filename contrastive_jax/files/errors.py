"""Says in one line why storage failed, and whether the user can mend it.

The clients of gs:// and s3:// raise some twenty kinds of errors, and try for minutes before they do. `check_reachable` asks a
bucket once, within a bound, before the work; `explain` puts what is raised later into one line.
"""

import logging as std_logging
import os
import re
import socket
import threading
import urllib.parse
from collections.abc import Iterator, Sequence

from absl import logging

from contrastive_jax.config import UserError
from contrastive_jax.files import MachineError, on_bucket
from contrastive_jax.files.transfer import bucket_client, bucket_name

ANSWER_SECONDS = 15
CLIENTS = ("gcsfs", "google.", "aiohttp", "botocore", "aiobotocore", "requests", "s3fs")  # modules whose errors are of storage
FORBIDDEN = re.compile(r"\b(401|403)\b|forbidden|access ?denied|PERMISSION_DENIED|UNAUTHENTICATED|credential|Anonymous", re.I)
MISSING = re.compile(r"\b404\b|NOT_FOUND|NoSuchBucket|no such bucket|bucket does not exist", re.I)
UNREACHED = re.compile(
    r"\b(429|50\d)\b|UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|"
    r"could ?not connect|cannot connect|connection|timed? ?out|resolve",
    re.I,
)
# Addresses, which may contain such numbers and words; names of buckets without their scheme are known from the arguments.
ADDRESS = re.compile(r"\b(https?|gs|s3)://\S+")
# In arguments: --name=gs://..., several with commas, hf:gs://...; and what would become a local folder called "gs:".
NAMED = re.compile(r"(?:^|[=,]|hf:)((?:gs|s3)://[^,]*)")
MISSPELT = re.compile(r"(?:^|[=,]|hf:)((?:gs|s3):/(?!/[^/])[^,]*|(?:gcs|s3a)://[^,]*)")
EXTRAS = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}


class DisappearedError(MachineError):
    """A file, or the bucket itself, is no longer there."""


class RepeatedRequests(std_logging.Filter):
    """Says in the log that a client repeats requests, at the first, second, fourth, eighth ... of them; see `log_repeated`."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def filter(self, record: std_logging.LogRecord) -> bool:
        """Counts a record about a repeated request; lets warnings pass, but no errors: their exceptions are raised too."""
        text = record.getMessage()
        if re.search("retrying after|Retryable error|Retry needed", text):
            self.count += 1
            if self.count & (self.count - 1) == 0:
                logging.warning(
                    "%s repeats a request, no. %d so far: %s", record.name, self.count, " ".join(text.split())[:200]
                )
        return record.levelno == std_logging.WARNING


def log_repeated() -> None:
    """Lets the clients of buckets say in the log that they repeat requests; they wait longer before each."""
    for name in ("gcsfs", "s3fs", "botocore.retryhandler", "aiobotocore.retryhandler"):
        logger = std_logging.getLogger(name)
        logger.setLevel(std_logging.DEBUG)
        logger.addFilter(RepeatedRequests())


def check_names(arguments: Sequence[str]) -> list[str]:
    """Checks each bucket that a command line names; returns their names.

    Raises:
      UserError, MachineError: a name is misspelt, or from `check_reachable`.
    """
    for argument in arguments:
        if found := MISSPELT.search(argument):
            raise UserError(f"{found[1]}: write gs://BUCKET/NAME or s3://BUCKET/NAME")
    names = [name for argument in arguments for name in NAMED.findall(argument)]
    for bucket in dict.fromkeys(names):
        check_reachable(bucket)
    return names


def mend(name: str) -> str:
    """Returns what gives a process the right to use a bucket."""
    if name.startswith("s3"):
        return "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY (or AWS_PROFILE) and the bucket's policy"
    return "log in (gcloud auth application-default login) or give the machine's service account the role Storage Object Admin"


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yields an exception and those that led to it."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def without_names(text: str, names: Sequence[str]) -> str:
    """Returns a message without addresses and names in buckets: "checkpoints/500" in one is no status of HTTP."""
    for name in names:
        text = re.sub(rf"\b{re.escape(bucket_name(name).split('/')[0])}/\S*", "", text)
    return ADDRESS.sub("", text)


def explain(error: BaseException, names: Sequence[str]) -> UserError | None:
    """Returns the one line for an error of storage: a UserError to mend, or a MachineError; None: it is another kind of error.

    Args:
      error: what was raised.
      names: the names of buckets that the command was given; the error may belong to any of them.
    """
    names = [name for name in names if on_bucket(name)]
    for cause in causes(error):
        text = " ".join(f"{cause}".split()) or type(cause).__name__
        bucket = next((name for name in names if bucket_name(name).split("/")[0] in text), "")
        of_client = type(cause).__module__.startswith(CLIENTS)
        if not names or not (bucket or of_client or re.search("gs://|s3://|storage/v1", text)):
            continue
        where, said, text = bucket or names[0], without_names(text, names)[:200], text[:200]
        if isinstance(cause, PermissionError) or FORBIDDEN.search(said):
            return UserError(f"{where}: no permission ({text}); {mend(where)}")
        if isinstance(cause, FileNotFoundError) or MISSING.search(said):
            return DisappearedError(f"{where}: has disappeared ({text}); what was saved before stays as it is")
        if of_client or isinstance(cause, OSError) or UNREACHED.search(said):
            return MachineError(f"{where}: the storage failed ({text}); start again, what was saved stays as it is")
    return None


def check_reachable(name: str) -> None:
    """Asks the bucket of a name once whether it is there and may be read.

    Args:
      name: gs://BUCKET/... or s3://BUCKET/...; a file or folder of that name need not exist.

    Raises:
      UserError: there is no such bucket, no permission, or no client installed.
      MachineError: no answer within ANSWER_SECONDS.
    """
    scheme = name.partition("://")[0]
    try:
        client = bucket_client(name)
    except (ImportError, ValueError) as error:  # fsspec wraps the ImportError of a client in either
        package, extra = EXTRAS[scheme]
        raise UserError(f"{name}: {package} is not installed; pip install 'contrastive_jax[{extra}]'") from error
    bucket, outcome = bucket_name(name).split("/")[0], list[BaseException]()
    if not bucket:
        raise UserError(f"{name}: no bucket; write {scheme}://BUCKET/NAME")

    def ask() -> None:
        try:
            client.info(bucket_name(name))
        except BaseException as error:  # whatever the client raises is explained below
            outcome.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(ANSWER_SECONDS)
    if thread.is_alive():
        raise MachineError(f"{name}: no answer within {ANSWER_SECONDS} s ({why_unreached(scheme)}); check the network")
    if not outcome:
        return
    reason = outcome[0]
    if isinstance(reason, FileNotFoundError):
        if bucket_exists(name):
            return  # nothing of this name yet: the command knows whether it needs it
        raise UserError(f"{name}: there is no bucket {bucket}; check the name, or make it") from reason
    explained = explain(reason, [name])
    if isinstance(explained, MachineError):
        raise MachineError(f"{name}: cannot be reached ({' '.join(str(reason).split())[:200]}); check the network") from reason
    raise explained or reason


def bucket_exists(name: str) -> bool:
    """Returns whether the bucket of a name exists; some object in it may be listed, or it is empty."""
    client, bucket = bucket_client(name), bucket_name(name).split("/")[0]
    try:
        client.ls(bucket)
    except FileNotFoundError:
        return False
    return True


def why_unreached(scheme: str) -> str:
    """Returns what happens at the address of the storage, tried without its client."""
    default = "https://storage.googleapis.com" if scheme == "gs" else "https://s3.amazonaws.com"
    address = os.environ.get("STORAGE_EMULATOR_HOST" if scheme == "gs" else "AWS_ENDPOINT_URL") or default
    url = urllib.parse.urlsplit(address)
    host, port = url.hostname or "", url.port or (80 if url.scheme == "http" else 443)
    try:
        socket.create_connection((host, port), timeout=5).close()
    except OSError as error:
        return f"{host}:{port}: {error.strerror or error}"
    return f"{host}:{port} is reached, but is silent"
