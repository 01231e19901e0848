"""How tasks are asked: the choices that lm-eval's command line has."""

import dataclasses
import os
from pathlib import Path

from adapt_pruner_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Questions:
  """Where the questions of tasks come from, and how they are put."""

  tasks_dir: str = ""  # folder of local questions, see `lm_eval_tasks`
  trust_tasks_dir: bool = False  # its YAML may run Python, see `lm_eval_trust`
  limit: int = 0  # questions a task; 0 = all
  # Examples shown; None = as the preset or the task says. A task that says 0
  # stays without.
  num_fewshot: int | None = None
  apply_chat_template: bool = False  # a question is what a user says in a chat
  system_instruction: str = (
    ""  # in front of each question, or the system's turn
  )
  # Each example is a turn of the user and one of the assistant; None = as
  # `apply_chat_template`. False: all is what one user says.
  fewshot_as_multiturn: bool | None = None

  @property
  def multiturn(self) -> bool:
    """Whether examples are turns of the chat."""
    given = self.fewshot_as_multiturn
    return self.apply_chat_template if given is None else given

  @property
  def folder(self) -> Path | None:
    """The directory of local questions; None = there is none.

    Raises:
      UserError: it is named and not there.
    """
    if not self.tasks_dir:
      return None
    folder = Path(os.path.expanduser(self.tasks_dir))
    if not folder.is_dir():
      raise UserError(f"--tasks_dir={self.tasks_dir}: no such directory")
    return folder

  def check(self) -> None:
    """Raises a UserError for values that make no sense."""
    if self.limit < 0:
      raise UserError(f"--limit={self.limit} must be at least 0")
    if self.num_fewshot is not None and self.num_fewshot < 0:
      raise UserError(f"--num_fewshot={self.num_fewshot} must be at least 0")
    if self.fewshot_as_multiturn and not self.apply_chat_template:
      raise UserError(
        "--fewshot_as_multiturn makes turns of a chat: it needs "
        "--apply_chat_template"
      )


USUAL = Questions()
