"""Several pruning methods at equal budgets on one checkpoint, in one table.

Every method gets the same calibration windows and the same parameter target;
if asked for, what it leaves is then trained on the same tokens in the same
order. A row is kept as soon as it is finished, so the same command goes on
after a kill; more methods or ratios add rows to those that are there.
"""

import dataclasses
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from adapt_pruner_jax.config import Config, Prune, Train
from adapt_pruner_jax.distributed import agreement
from adapt_pruner_jax.distributed.stopping import Stopping, stop_signals
from adapt_pruner_jax.errors import StoppedError, UserError
from adapt_pruner_jax.evaluation import perplexity
from adapt_pruner_jax.models import flops, model_config
from adapt_pruner_jax.models.axes import Params
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.pruning import budgets, surgery, targets
from adapt_pruner_jax.pruning.task import Step
from adapt_pruner_jax.reporting.log import Log
from adapt_pruner_jax.runs import (
  compare_methods,
  compare_table,
  latency_budget,
  prune_once,
  text_checks,
)
from adapt_pruner_jax.runs.fingerprints import versions, what_is_asked
from adapt_pruner_jax.runs.inputs import Inputs, load_model, open_inputs
from adapt_pruner_jax.runs.measure import measure as measure_text
from adapt_pruner_jax.runs.measure import measure_answers, measure_tasks
from adapt_pruner_jax.runs.recipe import claim, is_anew
from adapt_pruner_jax.runs.state import require_same
from adapt_pruner_jax.runs.summary import hardware
from adapt_pruner_jax.storage import json_files, lock
from adapt_pruner_jax.training import loop, lora, optimizer

# The recipe's rate is made for a trained model; a random one would hardly move.
SCRATCH_RATE = 1e-3

Pair = tuple[ModelConfig, Params]


def compare(
  config: Config,
  path: Path,
  methods: str,
  ratios: str,
  *,
  recover_tokens: int = 0,
  from_scratch: bool = False,
  overwrite: bool = False,
) -> dict:
  """Compares methods in a work directory; returns the content of compare.json.

  Writes compare.json, compare.md, compare.svg and compare.png. A method that
  cannot do a ratio gets a row with an `error`, and the table goes on.

  Args:
    config: the recipe; its own target, method, allotment and stages are not
      read.
    methods: names with commas between, see `compare_methods.parse_names`.
    ratios: shares of all parameters to remove, with commas between.
    recover_tokens: train each result on so many, as `config.train` says.
    from_scratch: also train the shapes that `adapt` leaves from random weights,
      on as many tokens.
    overwrite: replace another comparison, or this one if it is finished.

  Raises:
    UserError: bad input; or a ratio that no method could do, after the table.
    StoppedError: asked to stop; the finished rows are saved.
  """
  asked = what_is_asked(
    *(config, path),
    methods=methods,
    ratios=ratios,
    recover_tokens=recover_tokens,
    from_scratch=from_scratch,
    overwrite=overwrite,
  )
  agreement.require_same(asked, "at the start")
  shares = compare_methods.parse_ratios(ratios)
  jobs = compare_methods.jobs(
    config, methods, shares, recover_tokens, from_scratch
  )
  shared = compare_methods.shared_recipe(config, recover_tokens)
  with (
    lock.lock(path),
    Log(path, **dataclasses.asdict(config.log)) as log,
    stop_signals() as stopping,
  ):
    done = {
      (row["method"], row["ratio"]) for row in compare_table.stored_rows(path)
    }
    anew = is_anew(shared, path, overwrite, done >= {*jobs})
    inputs = open_inputs(shared, path, log, stopping)
    require_same(inputs)
    claim(inputs, anew)
    found = {
      "model": config.model.path,
      "params": model_config.count_params(inputs.full),
      "recover_tokens": recover_tokens,
      "budget": config.prune.budget,
      "unit": budgets.unit(config.prune),
      "command": compare_table.command(
        config, path, methods, ratios, recover_tokens, from_scratch
      ),
      "versions": versions(),
      "hardware": hardware(),
      "windows_start": _windows_start(inputs),
      "rows": compare_table.stored_rows(path),
    }
    run_jobs(jobs, found, inputs, stopping)
    compare_table.write(found, path)
    compare_table.tell(found, path, log)
  _check_results(found, shares, path)
  return found


def run_jobs(
  jobs: list[tuple[str, float]], found: dict, inputs: Inputs, stopping: Stopping
) -> None:
  """Adds the rows that are missing to `found["rows"]`, and saves each.

  Args:
    jobs: (method, ratio) of the rows, from `compare_methods.jobs`.
    found: the content of compare.json.
    stopping: from `stop_signals`.

  Raises:
    UserError: the original model cannot be measured.
    StoppedError: asked to stop; the finished rows are saved.
  """
  dense = None
  rows = {(r["method"], r["ratio"]): r for r in found["rows"]}
  order = [*jobs, *(key for key in rows if key not in jobs)]
  order.sort(key=lambda key: key[1])  # by ratio, otherwise as they were named

  def stop_if_asked() -> None:
    if stopping.now():
      raise StoppedError(f"stopped; the same command continues {inputs.path}")

  for number, (name, ratio) in enumerate(jobs, start=1):
    stop_if_asked()
    if (name, ratio) in rows:
      continue
    title = f"{number} of {len(jobs)}: {name}"
    counted = budgets.UNIT[inputs.recipe.prune.budget]
    inputs.log.say(f"{title}, {ratio:.0%} of the {counted} removed")
    if dense is None:
      dense = load_model(inputs)
    row = {"method": name, "ratio": ratio}
    try:
      row |= do_job(name, ratio, rows, dense, inputs, title, stop_if_asked)
    except UserError as error:
      if name == compare_methods.DENSE:  # then so would all the others
        raise
      inputs.log.say(f"{title}: {error}")
      row["error"] = str(error)
    rows[name, ratio] = row
    found["rows"] = [rows[key] for key in order if key in rows]
    if agreement.is_writer():
      json_files.write_json(inputs.path / compare_table.JSON, found)


def do_job(
  name: str,
  ratio: float,
  rows: dict,
  dense: Pair,
  inputs: Inputs,
  title: str,
  stop_if_asked: Any,
) -> dict:
  """The fields of one row, but for its name and ratio.

  Args:
    name, ratio: of the row.
    rows: those that are done, by (name, ratio).
    dense: the original model.
    title: of the phases on the console.
    stop_if_asked: raises between steps if the comparison was asked to stop.

  Raises:
    UserError: the method cannot do it.
  """
  if name == compare_methods.DENSE:
    return _facts(dense[0], inputs) | measure(*dense, inputs)
  begun = time.monotonic()
  settings = inputs.recipe.train
  if name == compare_methods.SCRATCH:
    pair, row = random_model(rows["adapt", ratio], dense[0], inputs), {}
    settings = dataclasses.replace(
      settings,
      learning_rate=SCRATCH_RATE,
      min_learning_rate=SCRATCH_RATE / 10,
      lora_rank=0,
    )
  else:
    recipe = compare_methods.settings_of(name, ratio, inputs.recipe.prune)
    pair, row = prune(recipe, dense, inputs, title, stop_if_asked)
  seconds = time.monotonic() - begun
  if inputs.total_steps:
    if name != compare_methods.SCRATCH:
      row["pruned"] = measure(*pair, inputs)
    begun = time.monotonic()
    pair = recover(pair, settings, dense, inputs, title, stop_if_asked)
    seconds += time.monotonic() - begun
    per_step = inputs.recipe.data.step_tokens
    row["train_tokens"] = inputs.total_steps * per_step
  row |= _facts(pair[0], inputs) | {"seconds": round(seconds, 3)}
  row |= latency_budget.of_row(inputs.recipe.prune, dense, pair)
  return row | measure(*pair, inputs)


@dataclasses.dataclass(frozen=True)
class Counted:
  """Calibration data that notes how many tokens were drawn."""

  data: Any
  tokens: dict[tuple, int]  # of each step; a step may be drawn again

  def batch(self, step: int) -> Any:
    """The samples of a step, noted."""
    drawn_NT = self.data.batch(step)
    self.tokens[id(self.data), step] = drawn_NT.size
    return drawn_NT


def prune(
  settings: Prune,
  dense: Pair,
  inputs: Inputs,
  title: str,
  stop_if_asked: Any,
) -> tuple[Pair, dict]:
  """Prunes and, if asked for, refits.

  Args:
    settings: the method and its target.
    dense, inputs, title, stop_if_asked: as `do_job`'s.

  Returns:
    The pair, and {"target_params", "calibration_tokens"}.
  """
  beside = inputs.beside if settings.budget == "bytes" else 0
  target = targets.resolve_target(inputs.full, settings, beside=beside)
  text_checks.check_channels(
    settings,
    inputs.recipe,
    inputs.full,
    inputs.calibration,
    inputs.refit_data,
    inputs.log.say,
  )
  used = {}
  counted = dataclasses.replace(
    inputs,
    calibration=Counted(inputs.calibration, used),
    refit_data=Counted(inputs.refit_data, used),
  )
  size = budgets.count(inputs.full, settings)
  unit = budgets.UNIT[settings.budget]
  with inputs.log.phase(title, size - target, unit) as phase:

    def note(record: dict, step: Step) -> None:
      left = record["params"]
      if settings.budget != "params":
        width = surgery.widths(step.masks)
        left = budgets.of_widths(inputs.full, width, settings)
      done = size - left
      phase.update(done, params=record["params"], target=target)
      stop_if_asked()

    pruned = prune_once.prune(dense, counted, settings, target=target, log=note)
  aim = budgets.value(target + beside, settings)
  name = "target_params" if settings.budget == "params" else "budget_target"
  facts = {name: aim, "calibration_tokens": sum(used.values())}
  return jax.block_until_ready((pruned.config, pruned.params)), facts


def recover(
  pair: Pair,
  settings: Train,
  dense: Pair,
  inputs: Inputs,
  title: str,
  stop_if_asked: Any,
) -> Pair:
  """Trains a pair on `inputs.recipe.train.tokens`, from the first on.

  Args:
    pair: the model; its params are spared.
    settings: how to train.
    dense: the original, which may be the teacher.
    inputs, title, stop_if_asked: as `do_job`'s.
  """
  config, params = pair
  mesh, steps = inputs.mesh, inputs.total_steps
  settings = dataclasses.replace(settings, teacher_cache=0)  # it is here
  if not settings.lora_rank:
    params = jax.tree.map(jnp.copy, params)  # the train step donates them
  training = loop.start(
    (config, params),
    settings,
    optimizer.schedule(settings, steps),
    mesh,
    teacher=dense if settings.distill_alpha else None,
    seed=inputs.recipe.seed,
    tokens=steps * inputs.recipe.data.step_tokens,
  )
  per_step = inputs.recipe.data.step_tokens
  cost = flops.training_flops(config, inputs.recipe.data.seq_len)
  with inputs.log.phase(
    f"{title}, recovery", steps * per_step, "tokens", cost
  ) as phase:

    def note(step: int, values: dict[str, float]) -> None:
      phase.update((step + 1) * per_step, loss=values["loss"])
      stop_if_asked()

    training, _ = loop.recover(
      training,
      inputs.rows.batches(0),
      0,
      steps,
      mesh,
      log=note,
      skip_nonfinite=settings.skip_nonfinite,
    )
  trained = training.trained
  if settings.lora_rank:
    trained = lora.merge_lora(params, trained, settings.lora_alpha)
  return jax.block_until_ready((config, trained))


def random_model(row: dict, full: ModelConfig, inputs: Inputs) -> Pair:
  """Random weights in the shape that `row` has.

  Raises:
    UserError: it has none, because its method failed.
  """
  if "error" in row:
    raise UserError(f"adapt leaves no shape to train: {row['error']}")
  width = {"K": row["kv_groups"], "F": row["ffn"]}
  config = surgery.with_widths(full, width)
  return config, loop.random_params(config, inputs.mesh, inputs.recipe.seed)


def measure(config: ModelConfig, params: Params, inputs: Inputs) -> dict:
  """`perplexity` and `loss` (nats a token), and of tasks the scores."""
  found = {}
  if inputs.eval_tokens is not None:
    found |= measure_text(config, params, inputs)
  found |= measure_answers(config, params, inputs)
  if inputs.recipe.eval.tasks:
    found["evaluation"] = measure_tasks(config, params, inputs)
  return found


def _windows_start(inputs: Inputs) -> str:
  """What the table says about the windows of its perplexities."""
  if inputs.eval_tokens is None:
    return ""
  return perplexity.windows_start(inputs.tokenizer, "--config.data.bos")


def _facts(config: ModelConfig, inputs: Inputs) -> dict:
  settings = inputs.recipe.prune
  extra = inputs.beside if settings.budget == "bytes" else 0
  size, whole = (
    budgets.count(c, settings) + extra for c in (config, inputs.full)
  )
  return {
    "params": model_config.count_params(config),
    "removed": 1 - size / whole,
    "budget": budgets.value(size, settings),
    "kv_groups": list(config.kv_groups),
    "ffn": list(config.ffn_widths),
  }


def _check_results(found: dict, ratios: list[float], path: Path) -> None:
  """Raises a UserError for ratios that no method could do."""
  done = {row["ratio"] for row in found["rows"] if "error" not in row}
  failed = [f"{ratio:.0%}" for ratio in ratios if ratio not in done]
  if failed:
    raise UserError(
      f"no method could remove {', '.join(failed)}; {path / 'compare.md'} "
      "says why"
    )
