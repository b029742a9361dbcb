"""What the workers of Beam install: a wheel of this package that asks for the few libraries that preparing data needs.

The package itself asks for JAX, TensorFlow and more, gigabytes that no worker needs. The wheel asks for REQUIREMENTS alone, in
the very versions of this machine, so that workers tokenize as this machine would.
"""

import base64
import contextlib
import hashlib
import importlib.metadata
import pathlib
import tempfile
import zipfile
from collections.abc import Iterator, Sequence

# The distributions that the tasks of `prepare` import, apart from Beam itself, which the workers' image has.
REQUIREMENTS = (
    "absl-py",
    "array-record",
    "etils",
    "fsspec",
    "gcsfs",
    "huggingface-hub",
    "importlib_resources",
    "ml-collections",
    "numpy",
    "orjson",
    "protobuf",
    "pyarrow",
    "rensa",
    "s3fs",
    "sentencepiece",
    "tensorflow-datasets",
    "tokenizers",
    "zstandard",
)
# Options with which the user says how workers get the package, and runners whose workers have it anyway.
HOW_WORKERS_GET_IT = {
    "environment_config",
    "environment_options",
    "environment_type",
    "extra_package",
    "extra_packages",
    "sdk_container_image",
    "setup_file",
}
INSTALLED_BY_HAND = ("dask", "fnapi", "bundlebaseddirect", "testdirect", "switchingdirect")


def need_package(kind: str, names: set[str]) -> bool:
    """Returns whether workers need the wheel, for a kind of runner and the names of the given options."""
    return kind not in INSTALLED_BY_HAND and not names & HOW_WORKERS_GET_IT


@contextlib.contextmanager
def wheel() -> Iterator[pathlib.Path]:
    """Builds the wheel in a temporary folder; yields its path."""
    version = importlib.metadata.version("contrastive_jax")
    requirements = [f"{name}=={installed}" for name in REQUIREMENTS if (installed := installed_version(name))]
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / f"contrastive_jax-{version}-py3-none-any.whl"
        write_wheel(path, version, requirements)
        yield path


def installed_version(name: str) -> str:
    """Returns the version of a distribution on this machine, "" if it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def write_wheel(path: pathlib.Path, version: str, requirements: Sequence[str]) -> None:
    """Writes a wheel of this package's modules (PEP 427).

    Args:
      path: the file; its name is that of a wheel.
      version: of the package.
      requirements: what pip installs with it, ["numpy==2.4.1", ...].
    """
    root = pathlib.Path(__file__).parents[2]
    contents = {f"contrastive_jax/{file.relative_to(root)}": file.read_bytes() for file in sorted(root.rglob("*.py"))}
    information = f"contrastive_jax-{version}.dist-info"
    metadata = ["Metadata-Version: 2.1", "Name: contrastive_jax", f"Version: {version}"]
    metadata += [f"Requires-Dist: {requirement}" for requirement in requirements]
    contents[f"{information}/METADATA"] = ("\n".join(metadata) + "\n").encode()
    contents[f"{information}/WHEEL"] = (
        b"Wheel-Version: 1.0\nGenerator: contrastive_jax\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    )
    record = [f"{name},sha256={digest(content)},{len(content)}" for name, content in contents.items()]
    contents[f"{information}/RECORD"] = "\n".join([*record, f"{information}/RECORD,,"]).encode() + b"\n"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in contents.items():
            archive.writestr(name, content)


def digest(content: bytes) -> str:
    """Returns a SHA-256 as the file RECORD of a wheel has it."""
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
