"""The one use of lm-eval's inside: tasks built from a class of ours.

Its public way opens each dataset while it builds a task, from the network, and
knows no other class. `tests/evaluation/lm_eval_trust_test.py` says what an
lm-eval of another version would break here.
"""

from collections.abc import Mapping
from typing import Any

from lm_eval.api.group import Group
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.tasks._factory import TaskFactory


def build(
  name: str, index: Mapping[str, Any], task_class: type[ConfigurableTask]
) -> list[Task | Group]:
  """Builds a task, a group, or the tasks of a tag.

  Args:
    index: lm-eval's entries by name, `TaskManager.task_index`.
    task_class: of all tasks, but those that are written as a class of their
      own; these keep their own way to the data.
  """
  entry = index[name]
  own = entry.kind.name != "PY_TASK"
  overrides = {"class": task_class} if own else None
  found = TaskFactory().build(entry, overrides=overrides, registry=index)
  return found if isinstance(found, list) else [found]
