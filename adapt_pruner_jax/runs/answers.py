"""Sources that the dense model writes itself: checked, written, then read.

`self:PROMPTS.jsonl` in data.source and calibration.source becomes
`answers:FILE`, a file in the work directory; eval.answers becomes its rows.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from jax.sharding import Mesh

from adapt_pruner_jax.config import Config, get
from adapt_pruner_jax.data.sources import Source, parse_sources, to_spec
from adapt_pruner_jax.data.tokenizer import Tokenizer
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.evaluation import answers
from adapt_pruner_jax.models.axes import Params
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.reporting.log import Log
from adapt_pruner_jax.storage import publish

LEARNT = ("calibration.source", "data.source")
HELD_OUT = "eval.answers"


@dataclasses.dataclass(frozen=True, eq=False)
class Asked:
  """Holds what the dense model is asked, by the name of the field."""

  sources: dict[str, list[Source]]  # of fields with a `self` source
  requests: dict[Source, answers.Request]

  def spec(self, name: str, given: str) -> str:
    """The field's value with files of answers in place of prompts."""
    if name not in self.sources:
      return given
    return to_spec([self._written(source) for source in self.sources[name]])

  def in_place(self, recipe: Config) -> Config:
    """The recipe with files of answers in place of prompts."""
    calibration, data = recipe.calibration, recipe.data
    return dataclasses.replace(
      recipe,
      calibration=dataclasses.replace(
        calibration, source=self.spec("calibration.source", calibration.source)
      ),
      data=dataclasses.replace(
        data, source=self.spec("data.source", data.source)
      ),
    )

  def held_out(self) -> list[dict] | None:
    """The rows that `answer_agreement` compares on; None = not asked for."""
    if HELD_OUT not in self.sources:
      return None
    return answers.read(self.requests[self.sources[HELD_OUT][0]])

  def _written(self, source: Source) -> Source:
    if source.kind != "self":
      return source
    written = Source("answers", str(self.requests[source].file))
    return dataclasses.replace(written, loss=source.loss, weight=source.weight)


def check(
  recipe: Config,
  full: ModelConfig,
  model_dir: Path,
  tokenizer: Tokenizer | None,
  model: Callable[[], Sequence[str]],
  folder: Path,
) -> Asked:
  """Reads all prompts of a recipe; nothing is answered yet.

  Args:
    full: the dense model's configuration.
    model_dir: its directory.
    model: gives what tells its answers from those of others.
    folder: where answers are kept.

  Raises:
    UserError: prompts that cannot be answered, or held-out ones that are also
      learnt from.
  """
  sources = {}
  for name in (*LEARNT, HELD_OUT):
    if name == "data.source" and not recipe.train.tokens:
      continue
    spec = get(recipe, name)
    found = parse_sources(spec, name) if spec else []
    if name == HELD_OUT and spec and [s.kind for s in found] != ["self"]:
      raise UserError(
        f"--config.{name}={spec} must be self or self:PROMPTS.jsonl, prompts "
        "that the dense model answers"
      )
    if any(source.kind == "self" for source in found):
      sources[name] = found
  asked = [s for found in sources.values() for s in found if s.kind == "self"]
  requests = {}
  if asked:
    key = model()
    for source in asked:
      requests[source] = answers.request(
        source, full, model_dir, tokenizer, key, folder
      )
  result = Asked(sources, requests)
  for name in LEARNT:
    parse_sources(result.spec(name, "embedded"), name)  # FILE can be named
  _check_held_out(result)
  return result


def write(
  asked: Asked,
  load: Callable[[], tuple[ModelConfig, Params]],
  mesh: Mesh,
  log: Log,
  stop_if_asked: Callable[[], None],
) -> None:
  """Has the dense model answer what it has not answered yet.

  Raises:
    UserError: it does not stop, or a file cannot be written.
  """
  missing = [
    request
    for request in asked.requests.values()
    if not answers.is_written(request)
  ]
  if missing:
    config, params = load()
    for request in missing:
      if not answers.is_written(request):  # two fields with one source
        answers.write(request, config, params, mesh, log.phase, stop_if_asked)
  for request in asked.requests.values():
    publish.require_shared(request.file)
    log.say(answers.cut_note(request))


def _check_held_out(asked: Asked) -> None:
  """Raises a UserError for held-out prompts that are learnt from as well."""
  if HELD_OUT not in asked.sources:
    return
  (held_out,) = asked.sources[HELD_OUT]
  mine = {tuple(p.tokens) for p in asked.requests[held_out].prompts}
  for name in LEARNT:
    for source in asked.sources.get(name, []):
      if source.kind == "self":
        theirs = {tuple(p.tokens) for p in asked.requests[source].prompts}
        if both := len(mine & theirs):
          raise UserError(
            f"--config.{HELD_OUT} and --config.{name} have {both} prompts in "
            "common, so the answers would not be held out: give split=heldout "
            "in the one and split=train in the other, which is the default"
          )
