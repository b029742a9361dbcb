"""Lets Orbax keep checkpoints on s3://.

Orbax 0.12 knows gs:// and local disks, and takes s3://BUCKET for a local name. What it does for gs:// is right for S3 too: a
file marks a whole checkpoint, since nothing can be renamed at once. Four names, private to Orbax, decide what counts as gs://
and where its arrays go; `enable` refuses a version that does not have them, and a test saves and restores at an S3 server.
"""

import os
from typing import Any

from orbax.checkpoint._src.path import gcs_utils
from orbax.checkpoint._src.serialization import tensorstore_utils

from contrastive_jax.config import UserError

PREFIXES = ("gs://", "s3://")


def enable() -> None:
    """Teaches Orbax s3://, for this process; what it does for other names stays as it was.

    Raises:
      UserError: this version of Orbax is built in another way.
    """
    for module, name in (
        (gcs_utils, "_GCS_PATH_PREFIX"),
        (gcs_utils, "get_kvstore_for_gcs"),
        (tensorstore_utils, "_use_gcs_driver"),
        (tensorstore_utils, "_normalize_path"),
    ):
        if not hasattr(module, name):
            raise UserError(
                f"this version of orbax-checkpoint cannot keep checkpoints on s3:// (it has no {name}); "
                "install orbax-checkpoint==0.12.8, or give a workdir on gs:// or on a local disk"
            )
    if gcs_utils._GCS_PATH_PREFIX == PREFIXES:
        return
    gcs_store = gcs_utils.get_kvstore_for_gcs

    def store_of(path: str) -> dict[str, Any]:
        return s3_store(path) if path.startswith("s3://") else gcs_store(path)

    gcs_utils._GCS_PATH_PREFIX = PREFIXES
    gcs_utils.get_kvstore_for_gcs = store_of
    tensorstore_utils._use_gcs_driver = lambda directory: directory.startswith(PREFIXES)
    tensorstore_utils._normalize_path = normalise


def normalise(path: str) -> str:
    """Returns a path without superfluous slashes, but for the two of its scheme."""
    scheme, mark, rest = path.rpartition("://")
    return f"{scheme}{mark}{os.path.normpath(rest)}"


def s3_store(path: str) -> dict[str, Any]:
    """Returns TensorStore's specification of a folder s3://BUCKET/NAME.

    TensorStore takes the credentials from the environment, but not the address of the server and the region.
    """
    bucket, _, name = path.removeprefix("s3://").partition("/")
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    given = {"endpoint": endpoint, "aws_region": region}
    return {"driver": "s3", "bucket": bucket, "path": name} | {key: value for key, value in given.items() if value}
