"""The dense model's own answers to prompts: written once, and kept.

A file of them is JSON lines in the order of the prompts: `messages` with the
answer as the last turn, for people, and for recovery and `answer_agreement` the
very tokens, `prompt_tokens` and `answer_tokens`; `ended` tells whether the
answer came to its end or was cut.

Prompts of like length are answered together. Each such group is published as
it is done, so that a killed process goes on with the next one.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from jax.sharding import Mesh

from adapt_pruner_jax.data.prompts import Prompt, read_prompts
from adapt_pruner_jax.data.sources import Answering, Source
from adapt_pruner_jax.data.tokenizer import Tokenizer
from adapt_pruner_jax.distributed import agreement
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.evaluation import generate
from adapt_pruner_jax.evaluation.phases import Phases, silent
from adapt_pruner_jax.formats.hf import generation_config
from adapt_pruner_jax.models.axes import Params
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.storage import digest, json_files, publish

VERSION = 1
ENOUGH = 64  # answers of which one must end, or the rest is not asked for


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
  """Holds prompts that can be answered, and where the answers are kept."""

  source: Source
  prompts: Sequence[Prompt]
  tokenizer: Tokenizer
  eos_ids: tuple[int, ...]
  file: Path

  @property
  def how(self) -> Answering:
    return self.source.answering

  @property
  def groups(self) -> list[np.ndarray]:
    """Which prompts are answered together: those of like length."""
    lengths = [len(prompt.tokens) for prompt in self.prompts]
    order = np.argsort(lengths, kind="stable")
    return np.split(order, range(self.how.batch, len(order), self.how.batch))


def request(
  source: Source,
  config: ModelConfig,
  model_dir: Path,
  tokenizer: Tokenizer,
  model: Sequence[str],
  folder: Path,
) -> Request:
  """Checks that a model can answer the prompts of a `self` source.

  Args:
    config: of the dense model.
    model_dir: its directory, which names its end tokens.
    model: what tells it from others, as its fingerprint and dtype.
    folder: where answers are kept.

  Raises:
    UserError: as `read_prompts`, the model names no end token, or a prompt with
      its answer does not fit its context.
  """
  prompts = read_prompts(source, tokenizer)
  eos = generation_config.end_tokens(model_dir, config, tokenizer)
  if not eos:
    raise UserError(
      f"{source}: {model_dir} names no end token (eos_token_id in "
      "generation_config.json or config.json), so its answers would not end"
    )
  how = source.answering
  ids = [prompt.tokens for prompt in prompts]
  try:
    generate.check_request(config, ids, how.max_new_tokens, _sampling(how))
  except UserError as error:
    raise UserError(f"{source}: {error}") from error
  key = digest.of_json(
    [VERSION, *model, tokenizer.fingerprint, dataclasses.asdict(how), eos, ids]
  )
  name = f"answers-{key[:16]}.jsonl"
  return Request(source, prompts, tokenizer, eos, folder / name)


def is_written(asked: Request) -> bool:
  """Whether all answers are kept already, as process 0 sees it."""
  return bool(agreement.from_writer(np.array(_whole(asked))))


def write(
  asked: Request,
  config: ModelConfig,
  params: Params,
  mesh: Mesh | None = None,
  phase: Phases = silent,
  stop_if_asked: Callable[[], None] = lambda: None,
) -> None:
  """Has the dense model answer, and writes `asked.file`.

  Args:
    asked: the same in every process; process 0 writes.
    config, params: the dense model.
    phase: shows how many prompts are answered.
    stop_if_asked: called between groups; what it raises ends the work, which
      the next call continues.

  Raises:
    UserError: no answer comes to its end, of the first ENOUGH or of all, or it
      cannot be written.
  """
  parts = asked.file.with_suffix(".parts")
  names = [parts / f"part-{i:05}.jsonl" for i in range(len(asked.groups))]
  agreement.on_writer(lambda: parts.mkdir(parents=True, exist_ok=True))
  done = agreement.from_writer(np.array([name.exists() for name in names]))
  number = 0
  with phase(
    "answers of the dense model", len(asked.prompts), "prompts"
  ) as bar:
    for i, group in enumerate(asked.groups):
      if not done[i]:
        stop_if_asked()
        rows = _answered(asked, i, config, params, mesh)
        if agreement.is_writer():
          json_files.rewrite_lines(names[i], rows)
      number += len(group)
      bar.update(number)
      if number - len(group) < ENOUGH <= number:
        agreement.on_writer(partial(_check_ends, asked, names, number))
  agreement.on_writer(lambda: _join(asked, names))


def read(asked: Request) -> list[dict]:
  """The rows of `asked.file`."""
  return json_files.read_lines(asked.file)


def cut_note(asked: Request) -> str:
  """Says how many answers there are, and how many were cut."""
  rows = read(asked)
  cut = sum(not row["ended"] for row in rows)
  said = f"{asked.source}: {len(rows):,} answers of the dense model"
  if cut:
    said += (
      f", {cut:,} of them cut at max_new_tokens={asked.how.max_new_tokens}"
    )
  return said


def _sampling(how: Answering) -> generate.Sampling:
  return generate.Sampling(temperature=how.temperature, top_p=how.top_p)


def _answered(
  asked: Request,
  number: int,
  config: ModelConfig,
  params: Params,
  mesh: Mesh | None,
) -> list[dict]:
  """The rows of one group."""
  how, group = asked.how, asked.groups[number]
  ids = [asked.prompts[i].tokens for i in group]
  # As many rows as in the other groups, which share what is compiled.
  filled = min(how.batch, len(asked.prompts)) - len(ids)
  found = generate.generate(
    *(config, params, ids + ids[:1] * filled, how.max_new_tokens),
    *(_sampling(how), (how.seed + number) % 2**32, asked.eos_ids, mesh),
  )
  rows = []
  for index, answer in zip(group, found, strict=False):
    prompt = asked.prompts[index]
    text = asked.tokenizer.backend.decode(answer, skip_special_tokens=True)
    said = {"role": "assistant", "content": text.strip()}
    rows.append(
      {
        "prompt": int(index),
        "messages": [*prompt.messages, said],
        "prompt_tokens": prompt.tokens,
        "answer_tokens": answer,
        "ended": answer[-1] in asked.eos_ids,
      }
    )
  return rows


def _join(asked: Request, parts: Sequence[Path]) -> None:
  """Publishes the parts as one file, in the order of the prompts."""
  rows = [row for part in parts for row in json_files.read_lines(part)]
  rows.sort(key=lambda row: row.pop("prompt"))
  _check_ends(asked, parts, len(rows))
  json_files.rewrite_lines(asked.file, rows)
  publish.remove(parts[0].parent)


def _check_ends(asked: Request, parts: Sequence[Path], number: int) -> None:
  """Raises a UserError if none of the first `number` answers ends."""
  written = (part for part in parts if part.exists())
  rows = (row for part in written for row in json_files.read_lines(part))
  if not any(row["ended"] for row in rows):
    raise UserError(
      f"{asked.source}: the dense model does not stop: none of its "
      f"{number:,} answers ends within max_new_tokens="
      f"{asked.how.max_new_tokens}; give a larger max_new_tokens, or a model "
      "that is trained to answer"
    )


def _whole(asked: Request) -> bool:
  if not agreement.is_writer() or not asked.file.exists():
    return False
  try:
    return len(read(asked)) == len(asked.prompts)
  except UserError:  # damaged: written again
    return False
