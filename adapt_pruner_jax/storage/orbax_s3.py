"""Lets Orbax write arrays to `s3://`, as it does to `gs://`.

Orbax knows what a bucket lacks, commits a checkpoint by an object in it, and
writes arrays by TensorStore, which has a driver for S3; only, it does not put
the two together (0.12.8). The functions that are replaced here do. Their names
are private: a version without them is refused.
"""

import functools
import os
from typing import Any

from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.storage.places import SCHEMES

_NAMES = {
  "gcs_utils": ("_GCS_PATH_PREFIX", "get_kvstore_for_gcs", "parse_gcs_path"),
  "tensorstore_utils": ("_use_gcs_driver", "_normalize_path"),
}


@functools.cache
def allow() -> None:
  """From now on, Orbax takes `s3://` paths as well.

  Raises:
    UserError: this version of Orbax is made in another way.
  """
  from orbax.checkpoint._src.path import gcs_utils
  from orbax.checkpoint._src.serialization import tensorstore_utils

  modules = {"gcs_utils": gcs_utils, "tensorstore_utils": tensorstore_utils}
  for module, names in _NAMES.items():
    for name in names:
      if not hasattr(modules[module], name):
        import orbax.checkpoint

        raise UserError(
          f"orbax-checkpoint {orbax.checkpoint.__version__} cannot be taught "
          "to write to s3://: pip install 'orbax-checkpoint==0.12.8', or give "
          "a gs:// bucket"
        )
  of_gcs = gcs_utils.get_kvstore_for_gcs

  def kvstore(path: str) -> dict[str, Any]:
    if not str(path).startswith("s3://"):
      return of_gcs(path)
    bucket, name = gcs_utils.parse_gcs_path(path, add_trailing_slash=False)
    return {"driver": "s3", "bucket": bucket, "path": name} | _settings()

  gcs_utils._GCS_PATH_PREFIX = SCHEMES
  gcs_utils.get_kvstore_for_gcs = kvstore
  tensorstore_utils._use_gcs_driver = lambda path: path.startswith(SCHEMES)
  tensorstore_utils._normalize_path = lambda path: os.path.normpath(
    path
  ).replace(":/", "://")


def _settings() -> dict[str, Any]:
  """What boto3 takes from the environment, and TensorStore wants to be told."""
  environ, found = os.environ, {}
  endpoint = environ.get("AWS_ENDPOINT_URL_S3") or environ.get(
    "AWS_ENDPOINT_URL"
  )
  region = environ.get("AWS_REGION") or environ.get("AWS_DEFAULT_REGION")
  if endpoint:
    found |= {"endpoint": endpoint, "aws_region": region or "us-east-1"}
  if "AWS_ACCESS_KEY_ID" in environ:  # else it complains of absent files
    found["aws_credentials"] = {"type": "environment"}
  return found
