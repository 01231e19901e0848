"""YAML of lm-eval's tasks out of somebody's folder: none of it may run code.

lm-eval runs Python that a task file names (`!function utils.process`), loads
metrics that are Python from the hub, and renders Jinja without its sandbox.
Unless a folder is trusted, files that do the first two are refused, and
templates are rendered in the sandbox.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jinja2.sandbox import SandboxedEnvironment
from lm_eval import utils
from lm_eval.api.registry import METRIC_REGISTRY

from adapt_pruner_jax.errors import UserError, first_line


def check(names: Sequence[str], index: Mapping[str, Any], folder: Path) -> None:
  """Raises a UserError if what is asked would run code out of `folder`.

  From then on this process renders templates in Jinja's sandbox, if any of
  what is asked is from there.

  Args:
    names: tasks, groups and tags.
    index: lm-eval's entries by name, `TaskManager.task_index`.
  """
  root = folder.resolve()
  found = [f for f in files(names, index) if f.resolve().is_relative_to(root)]
  for file in found:
    _check_file(file, root, [])
  if found:
    sandbox_templates()


def files(names: Sequence[str], index: Mapping[str, Any]) -> list[Path]:
  """The YAML files of these names, and of what is in their groups and tags."""
  found: dict[Path, None] = {}
  left, seen = list(names), set()
  while left:
    name = left.pop()
    if name in seen or name not in index:
      continue
    seen.add(name)
    entry = index[name]
    if entry.yaml_path is not None:
      found[entry.yaml_path] = None
    # A tag has its tasks where a task has its tags.
    left += entry.tags if entry.kind.name == "TAG" else ()
    left += _members((entry.cfg or {}).get("task"))
  return list(found)


def sandbox_templates() -> None:
  """Renders lm-eval's templates in Jinja's sandbox, in all of this process."""
  old = utils.env
  if isinstance(old, SandboxedEnvironment):
    return
  utils.env = SandboxedEnvironment(
    undefined=old.undefined, keep_trailing_newline=old.keep_trailing_newline
  )
  utils.env.filters |= old.filters


def unsafe(error: Exception, folder: Path | None) -> UserError:
  """The error for a template that the sandbox stopped."""
  return _refused(f"a template of the YAML in {folder}", first_line(error))


def _members(task: Any) -> Iterator[str]:
  """Names in a group's list, those of groups within it included."""
  for item in task if isinstance(task, list) else ():
    if isinstance(item, str):
      yield item
    elif isinstance(item, dict):
      yield from (item[k] for k in ("task", "group") if _is_name(item.get(k)))
      yield from _members(item.get("task"))


def _is_name(value: Any) -> bool:
  return isinstance(value, str)


class _Tagged(Exception):
  pass


class _Loader(yaml.SafeLoader):
  """Plain YAML; a tag such as !function is an error."""


def _tagged(loader: yaml.Loader, suffix: str, node: yaml.Node) -> None:
  del loader
  raise _Tagged(f"line {node.start_mark.line + 1} has !{suffix}")


_Loader.add_multi_constructor("!", _tagged)


def _check_file(file: Path, root: Path, above: list[Path]) -> None:
  """A file, and those that it includes."""
  path = file.resolve()
  if path in above:
    return  # a cycle, which lm-eval refuses
  if not path.is_relative_to(root):
    raise _refused(f"{above[-1]}", f"it includes {file}, outside of {root}")
  try:
    content = yaml.load(path.read_bytes(), Loader=_Loader)
  except _Tagged as error:
    raise _refused(str(file), f"{error}, which runs Python") from error
  except (OSError, yaml.YAMLError) as error:
    raise UserError(f"{file} cannot be read: {first_line(error)}") from error
  _check_values(content, file)
  included = content.get("include", []) if isinstance(content, dict) else []
  for name in included if isinstance(included, list) else [included]:
    _check_file(path.parent / str(name), root, [*above, path])


def _check_values(content: Any, file: Path) -> None:
  """Raises a UserError for what runs Python without a tag."""
  if isinstance(content, list):
    for item in content:
      _check_values(item, file)
  if not isinstance(content, dict):
    return
  if content.get("class") is not None:
    raise _refused(str(file), "its task is a Python class")
  if content.get("hf_evaluate"):
    raise _refused(str(file), "hf_evaluate loads a metric that is Python")
  for metric in content.get("metric_list") or []:
    name = metric.get("metric") if isinstance(metric, dict) else None
    # lm-eval asks the hub for what it does not know.
    if name is not None and name not in METRIC_REGISTRY:
      raise _refused(str(file), f"metric {name!r} is Python from elsewhere")
  for item in content.values():
    _check_values(item, file)


def _refused(what: str, why: str) -> UserError:
  return UserError(
    f"{what} would run code ({why}): read it, and add --trust_tasks_dir if you "
    "trust it (eval.trust_tasks_dir=True in a recipe)"
  )
