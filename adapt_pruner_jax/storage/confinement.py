"""Files of a model directory are taken from inside it only.

A directory that someone else made may hold a link to any file of this machine,
which would be read and copied into an export.
"""

from pathlib import Path

from adapt_pruner_jax.errors import UserError

# In the hub's folder of files that repositories of its cache share; says that
# it is one (huggingface_hub 2).
SHARED = ".huggingface-shared-blobs"


def confined(file: Path, folder: Path) -> Path:
  """`file`, which lies in `folder`, if its content lies there too.

  In the HuggingFace hub's cache it is in `models--X/snapshots/Y`, with links to
  files in `models--X/blobs`, and from there on in `blobs` beside the
  repositories; these belong to the model.

  Raises:
    UserError: it is a link to another place.
  """
  inside, found = folder.resolve(), file.resolve()
  places = [inside, *_hub_blobs(inside)]
  if not any(found.is_relative_to(place) for place in places):
    raise UserError(
      f"{file} is a link to {found}, outside of its directory, and is not "
      f"read: put the file itself there (cp --remove-destination {found} "
      f"{file})"
    )
  return file


def _hub_blobs(inside: Path) -> list[Path]:
  """Where a snapshot of the hub's cache, or a folder in it, has its files."""
  for snapshot in (inside, *inside.parents):
    repository = snapshot.parent.parent
    if snapshot.parent.name == "snapshots" and "--" in repository.name:
      shared = repository.parent / "blobs"
      return [repository / "blobs"] + [shared] * (shared / SHARED).is_file()
  return []
