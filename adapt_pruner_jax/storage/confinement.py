"""Files of a model directory are taken from inside it only.

A directory that someone else made may hold a link to any file of this machine,
which would be read and copied into an export.
"""

from pathlib import Path

from adapt_pruner_jax.errors import UserError


def confined(file: Path, folder: Path) -> Path:
  """`file`, which lies in `folder`, if its content lies there too.

  The HuggingFace hub's cache has links in `models--X/snapshots/Y` to files in
  `models--X/blobs`; these belong to the model.

  Raises:
    UserError: it is a link to another place.
  """
  inside, found = folder.resolve(), file.resolve()
  allowed = [inside]
  repository = inside.parent.parent
  if inside.parent.name == "snapshots" and "--" in repository.name:
    allowed.append(repository / "blobs")
  if not any(found.is_relative_to(place) for place in allowed):
    raise UserError(
      f"{file} is a link to {found}, outside of its directory, and is not "
      f"read: put the file itself there (cp --remove-destination {found} "
      f"{file})"
    )
  return file
