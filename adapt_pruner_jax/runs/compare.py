"""Several pruning methods at equal budgets on one checkpoint, in one table.

Every method gets the same calibration windows and the same parameter target;
if asked for, what it leaves is then trained on the same tokens in the same
order. A row is kept as soon as it is finished, so the same command goes on
after a kill; more methods or ratios add rows to those that are there.
"""

import dataclasses
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from adapt_pruner_jax.config import Config, Prune, Train
from adapt_pruner_jax.distributed import agreement, sharding
from adapt_pruner_jax.distributed.stopping import StoppedError, stop_signals
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.models import decoder, flops, model_config
from adapt_pruner_jax.models.axes import Params
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.pruning import surgery, targets, task
from adapt_pruner_jax.pruning.methods import METHODS, check, refit_after
from adapt_pruner_jax.reporting.log import Log
from adapt_pruner_jax.runs import compare_methods, compare_table
from adapt_pruner_jax.runs.inputs import Setting, load_model, prepare
from adapt_pruner_jax.runs.measure import measure as measure_text
from adapt_pruner_jax.runs.measure import measure_tasks
from adapt_pruner_jax.runs.recipe import check_recipe, claim
from adapt_pruner_jax.runs.summary import hardware, versions
from adapt_pruner_jax.storage import json_files, lock
from adapt_pruner_jax.training import loop, lora, optimizer
from adapt_pruner_jax.training.step import init_optimizer, make_step

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
) -> dict:
  """Compares methods in a work directory; returns the content of compare.json.

  Writes compare.json, compare.md, compare.svg and compare.png. A method that
  cannot do a ratio gets a row with an `error`, and the table goes on.

  Args:
    config: the recipe; its own target, method and stages are not read.
    methods: names with commas between, see `compare_methods.parse_names`.
    ratios: shares of all parameters to remove, with commas between.
    recover_tokens: train each result on so many, as `config.train` says.
    from_scratch: also train the shapes that `adapt` leaves from random weights,
      on as many tokens.

  Raises:
    UserError: bad input; or a ratio that no method could do, after the table.
    StoppedError: asked to stop; the finished rows are saved.
  """
  jobs = [(compare_methods.DENSE, 0.0)]
  names = compare_methods.parse_names(methods)
  shares = compare_methods.parse_ratios(ratios)
  for ratio in shares:
    jobs += [(name, ratio) for name in names]
    jobs += [(compare_methods.SCRATCH, ratio)] * from_scratch
  compare_methods.check_input(config, names, jobs, recover_tokens, from_scratch)
  shared = compare_methods.shared_recipe(config, recover_tokens)
  with (
    lock.lock(path),
    Log(path, **dataclasses.asdict(config.log)) as log,
    stop_signals() as stopping,
  ):
    check_recipe(shared, path)
    setting = prepare(shared, path, log)
    claim(shared, path)
    found = {
      "model": config.model.path,
      "params": model_config.count_params(setting.full),
      "recover_tokens": recover_tokens,
      "command": compare_table.command(
        config, path, methods, ratios, recover_tokens, from_scratch
      ),
      "versions": versions(),
      "hardware": hardware(),
      "rows": stored_rows(path),
    }
    run_jobs(jobs, found, setting, stopping)
    compare_table.write(found, path)
    compare_table.tell(found, path, log)
  failed = [ratio for ratio in shares if not _succeeded(found, ratio)]
  if failed:
    raise UserError(
      f"no method could remove {', '.join(f'{r:.0%}' for r in failed)}; "
      f"{path / 'compare.md'} says why"
    )
  return found


def run_jobs(
  jobs: list[tuple[str, float]], found: dict, setting: Setting, stopping: dict
) -> None:
  """Adds the rows that are missing to `found["rows"]`, and saves each."""
  dense = None
  rows = {(r["method"], r["ratio"]): r for r in found["rows"]}
  order = [*jobs, *(key for key in rows if key not in jobs)]
  order.sort(key=lambda key: key[1])  # by ratio, otherwise as they were named

  def stop_if_asked() -> None:
    if not agreement.all_agree(not stopping["asked"]):
      raise StoppedError(f"stopped; the same command continues {setting.path}")

  for number, (name, ratio) in enumerate(jobs, start=1):
    stop_if_asked()
    if (name, ratio) in rows:
      continue
    title = f"{number} of {len(jobs)}: {name}"
    setting.log.say(f"{title}, {ratio:.0%} of the parameters removed")
    if dense is None:
      dense = load_model(setting)
    row = {"method": name, "ratio": ratio}
    try:
      row |= do_job(name, ratio, rows, dense, setting, title, stop_if_asked)
    except UserError as error:
      if name == compare_methods.DENSE:  # then so would all the others
        raise
      setting.log.say(f"{title}: {error}")
      row["error"] = str(error)
    rows[name, ratio] = row
    found["rows"] = [rows[key] for key in order if key in rows]
    if agreement.is_writer():
      json_files.write_json(setting.path / compare_table.JSON, found)


def do_job(
  name: str,
  ratio: float,
  rows: dict,
  dense: Pair,
  setting: Setting,
  title: str,
  stop_if_asked: Any,
) -> dict:
  """The fields of one row, but for its name and ratio.

  Raises:
    UserError: the method cannot do it.
  """
  if name == compare_methods.DENSE:
    return _facts(dense[0], setting) | measure(*dense, setting)
  begun = time.monotonic()
  settings = setting.config.train
  if name == compare_methods.SCRATCH:
    pair, row = random_model(rows["adapt", ratio], dense[0], setting), {}
    settings = dataclasses.replace(
      settings,
      learning_rate=SCRATCH_RATE,
      min_learning_rate=SCRATCH_RATE / 10,
      lora_rank=0,
    )
  else:
    recipe = compare_methods.settings_of(name, ratio, setting.config.prune)
    pair, row = prune_once(recipe, dense, setting, title, stop_if_asked)
  seconds = time.monotonic() - begun
  if setting.total_steps:
    if name != compare_methods.SCRATCH:
      row["pruned"] = measure(*pair, setting)
    begun = time.monotonic()
    pair = recover(pair, settings, dense, setting, title, stop_if_asked)
    seconds += time.monotonic() - begun
    per_step = setting.config.data.step_tokens
    row["train_tokens"] = setting.total_steps * per_step
  row |= _facts(pair[0], setting) | {"seconds": round(seconds, 3)}
  return row | measure(*pair, setting)


def prune_once(
  settings: Prune,
  dense: Pair,
  setting: Setting,
  title: str,
  stop_if_asked: Any,
) -> tuple[Pair, dict]:
  """Prunes and, if asked for, refits.

  Returns:
    The pair, and {"target_params", "calibration_tokens"}.
  """
  config = setting.config
  check(setting.full, settings)
  target = targets.resolve_target(setting.full, settings)
  sizes = {}  # tokens of each step

  def samples(step: int) -> Any:
    drawn_NT = setting.calibration.batch(step)
    sizes[step] = drawn_NT.size
    return drawn_NT

  size = model_config.count_params(setting.full)
  with setting.log.phase(title, size - target, "parameters") as phase:

    def note(record: dict, _: task.Step) -> None:
      done = size - record["params"]
      phase.update(done, params=record["params"], target=target)
      stop_if_asked()

    pruned = METHODS[settings.method](
      *dense,
      settings,
      samples,
      target=target,
      batch=config.calibration.batch,
      mesh=setting.mesh,
      seed=config.seed,
      log=note,
    )
  pair, used = (pruned.config, pruned.params), sum(sizes.values())
  if settings.refit != "none":
    tokens_NT = setting.refit_data.batch(len(pruned.trace))
    used += tokens_NT.size
    params, _ = refit_after(
      dense,
      pruned,
      pruned.kept,
      settings,
      lambda: tokens_NT,
      config.calibration.batch,
      setting.mesh,
    )
    pair = pruned.config, params
  facts = {"target_params": target, "calibration_tokens": used}
  return jax.block_until_ready(pair), facts


def recover(
  pair: Pair,
  settings: Train,
  dense: Pair,
  setting: Setting,
  title: str,
  stop_if_asked: Any,
) -> Pair:
  """Trains a pair on `setting.config.train.tokens`, from the first on."""
  config, params = pair
  mesh, steps = setting.mesh, setting.total_steps
  schedule = optimizer.schedule(settings, steps)
  if not settings.lora_rank:
    base = None
    trained = jax.tree.map(jnp.copy, params)  # the train step eats its argument
  else:
    base = params
    key = jax.random.key(setting.config.seed)
    trained = lora.init_lora(config, settings.lora_rank, key, mesh)
  teacher = dense if settings.distill_alpha else None
  step_fn = make_step(
    config, settings, schedule, mesh, base=base, teacher=teacher
  )
  per_step = setting.config.data.step_tokens
  cost = flops.training_flops(config, setting.config.data.seq_len)
  with setting.log.phase(
    f"{title}, recovery", steps * per_step, "tokens", cost
  ) as phase:

    def note(step: int, values: dict[str, float]) -> None:
      phase.update((step + 1) * per_step, loss=values["loss"])
      stop_if_asked()

    trained, _, _ = loop.recover(
      step_fn,
      trained,
      init_optimizer(trained, settings, mesh),
      setting.rows.batches(0),
      0,
      steps,
      mesh,
      log=note,
      skip_nonfinite=settings.skip_nonfinite,
    )
  if base is not None:
    trained = lora.merge_lora(base, trained, settings.lora_alpha)
  return jax.block_until_ready((config, trained))


def random_model(row: dict, full: ModelConfig, setting: Setting) -> Pair:
  """Random weights in the shape that `row` has.

  Raises:
    UserError: it has none, because its method failed.
  """
  if "error" in row:
    raise UserError(f"adapt leaves no shape to train: {row['error']}")
  width = {"K": row["kv_groups"], "F": row["ffn"]}
  config = surgery.with_widths(full, width)
  placed = sharding.param_shardings(
    model_config.abstract_params(config, jnp.float32), setting.mesh
  )
  init = jax.jit(partial(decoder.init_params, config), out_shardings=placed)
  return config, init(jax.random.key(setting.config.seed))


def measure(config: ModelConfig, params: Params, setting: Setting) -> dict:
  """`perplexity` and `loss` (nats a token), and of tasks the scores."""
  found = {}
  if setting.eval_tokens is not None:
    found |= measure_text(config, params, setting)
  if setting.config.eval.tasks:
    found["evaluation"] = measure_tasks(config, params, setting)
  return found


def _facts(config: ModelConfig, setting: Setting) -> dict:
  size = model_config.count_params(config)
  return {
    "params": size,
    "removed": 1 - size / model_config.count_params(setting.full),
    "kv_groups": list(config.kv_groups),
    "ffn": list(config.ffn_widths),
  }


def _succeeded(found: dict, ratio: float) -> bool:
  return any(r["ratio"] == ratio and "error" not in r for r in found["rows"])


def stored_rows(path: Path) -> list[dict]:
  """The rows that an earlier call has finished; failed ones are tried again."""
  file = path / compare_table.JSON
  rows = json_files.read_json(file)["rows"] if file.exists() else []
  agreement.all_agree(True)  # all have read before one writes
  return [row for row in rows if "error" not in row]
