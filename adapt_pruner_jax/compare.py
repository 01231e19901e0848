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

from adapt_pruner_jax import (
  adapt,
  comparison,
  methods,
  model,
  optim,
  prune,
  sharding,
  train,
  workdir,
)
from adapt_pruner_jax.adapt import Setting
from adapt_pruner_jax.axes import Params
from adapt_pruner_jax.config import Config, Prune, check
from adapt_pruner_jax.errors import UserError, nearest
from adapt_pruner_jax.log import Log
from adapt_pruner_jax.model import ModelConfig

# Names beside those of `methods.METHODS`, as settings of prune.*.
VARIANTS = {
  "uniform": {"method": "adapt", "amplitude": 0.0},
  # The published selection; the target is met exactly all the same.
  "paper": {"method": "adapt", "gqa_fold": "reference", "trim": True},
}
NAMES = (*methods.METHODS, *VARIANTS)
REFIT = "+refit"  # after a name: what is left is refitted at the end
ALL = (*NAMES, "adapt" + REFIT, "curvature" + REFIT)
DENSE, SCRATCH = "dense", "from_scratch"
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
    methods: names with commas between, see `parse_names`.
    ratios: shares of all parameters to remove, with commas between.
    recover_tokens: train each result on so many, as `config.train` says.
    from_scratch: also train the shapes that `adapt` leaves from random weights,
      on as many tokens.

  Raises:
    UserError: bad input; or a ratio that no method could do, after the table.
    StoppedError: asked to stop; the finished rows are saved.
  """
  jobs = [(DENSE, 0.0)]
  names = parse_names(methods)
  for ratio in parse_ratios(ratios):
    jobs += [(name, ratio) for name in names]
    jobs += [(SCRATCH, ratio)] * from_scratch
  check_input(config, names, jobs, recover_tokens, from_scratch)
  shared = shared_recipe(config, recover_tokens)
  with (
    workdir.lock(path),
    Log(path, **dataclasses.asdict(config.log)) as log,
    adapt.stop_signals() as stopping,
  ):
    adapt.claim(shared, path)
    setting = adapt.prepare(shared, path, log)
    found = {
      "model": config.model.path,
      "params": model.count_params(setting.full),
      "recover_tokens": recover_tokens,
      "command": comparison.command(
        config, path, methods, ratios, recover_tokens, from_scratch
      ),
      "versions": adapt.versions(),
      "hardware": adapt.hardware(),
      "rows": stored_rows(path),
    }
    run_jobs(jobs, found, setting, stopping)
    comparison.write(found, path)
    comparison.tell(found, path, log)
  failed = [r for r in parse_ratios(ratios) if not _succeeded(found, r)]
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
    if not workdir.all_agree(not stopping["asked"]):
      raise adapt.StoppedError(
        f"stopped; the same command continues {setting.path}"
      )

  for number, (name, ratio) in enumerate(jobs, start=1):
    stop_if_asked()
    if (name, ratio) in rows:
      continue
    title = f"{number} of {len(jobs)}: {name}"
    setting.log.say(f"{title}, {ratio:.0%} of the parameters removed")
    if dense is None:
      dense = adapt.load_model(setting)
    row = {"method": name, "ratio": ratio}
    try:
      row |= do_job(name, ratio, rows, dense, setting, title, stop_if_asked)
    except UserError as error:
      setting.log.say(f"{title}: {error}")
      row["error"] = str(error)
    rows[name, ratio] = row
    found["rows"] = [rows[key] for key in order if key in rows]
    if workdir.is_writer():
      workdir.write_json(setting.path / comparison.JSON, found)


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
  if name == DENSE:
    return _facts(*dense, setting) | measure(*dense, setting)
  begun = time.monotonic()
  settings = setting.config.train
  if name == SCRATCH:
    pair, row = random_model(rows["adapt", ratio], dense[0], setting), {}
    settings = dataclasses.replace(
      settings,
      learning_rate=SCRATCH_RATE,
      min_learning_rate=SCRATCH_RATE / 10,
      lora_rank=0,
    )
  else:
    recipe = settings_of(name, ratio, setting.config.prune)
    pair, row = prune_once(recipe, dense, setting, title, stop_if_asked)
  seconds = time.monotonic() - begun
  if setting.total_steps:
    if name != SCRATCH:
      row["pruned"] = measure(*pair, setting)
    begun = time.monotonic()
    pair = recover(pair, settings, dense, setting, title, stop_if_asked)
    seconds += time.monotonic() - begun
    per_step = setting.config.data.batch * setting.config.data.seq_len
    row["train_tokens"] = setting.total_steps * per_step
  row |= _facts(*pair, setting) | {"seconds": round(seconds, 3)}
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
  target = prune.resolve_target(setting.full, settings)
  sizes = {}  # tokens of each step

  def samples(step: int) -> Any:
    tokens_NT = setting.calibration.batch(step)
    sizes[step] = tokens_NT.size
    return tokens_NT

  size = model.count_params(setting.full)
  with setting.log.phase(title, size - target, "parameters") as phase:

    def note(record: dict, _: prune.Step) -> None:
      done = size - record["params"]
      phase.update(done, params=record["params"], target=target)
      stop_if_asked()

    pruned = methods.METHODS[settings.method](
      *dense,
      settings,
      samples,
      target=target,
      batch=config.calibration.batch,
      mesh=setting.mesh,
      seed=config.seed,
      log=note,
    )
  refit_NT = setting.refit_data.batch(len(pruned.trace))
  params, refits = methods.refit_after(
    dense,
    pruned,
    pruned.kept,
    settings,
    refit_NT,
    config.calibration.batch,
    setting.mesh,
  )
  used = sum(sizes.values()) + (refit_NT.size if refits else 0)
  pair = jax.block_until_ready((pruned.config, params))
  return pair, {"target_params": target, "calibration_tokens": used}


def recover(
  pair: Pair,
  settings: Any,
  dense: Pair,
  setting: Setting,
  title: str,
  stop_if_asked: Any,
) -> Pair:
  """Trains a pair on `setting.config.train.tokens`, from the first on."""
  config, params = pair
  mesh, steps = setting.mesh, setting.total_steps
  schedule = optim.schedule(
    settings.schedule,
    settings.learning_rate,
    settings.min_learning_rate,
    steps,
  )
  base = None
  trained = jax.tree.map(jnp.copy, params)  # the train step eats its argument
  if settings.lora_rank:
    base = params
    key = jax.random.key(setting.config.seed)
    trained = train.init_lora(config, settings.lora_rank, key, mesh)
  teacher = dense if settings.distill_alpha else None
  step_fn = train.make_step(
    config, settings, schedule, mesh, base=base, teacher=teacher
  )
  per_step = setting.config.data.batch * setting.config.data.seq_len
  flops = 6.0 * model.count_params(config)
  with setting.log.phase(
    f"{title}, recovery", steps * per_step, "tokens", flops
  ) as phase:

    def note(step: int, values: dict[str, float]) -> None:
      phase.update((step + 1) * per_step, loss=values["loss"])
      stop_if_asked()

    trained, _, _ = train.recover(
      step_fn,
      trained,
      train.init_optimizer(trained, settings, mesh),
      setting.rows.batches(0),
      0,
      steps,
      mesh,
      log=note,
      skip_nonfinite=settings.skip_nonfinite,
    )
  if base is not None:
    trained = train.merge_lora(base, trained, settings.lora_alpha)
  return jax.block_until_ready((config, trained))


def random_model(row: dict, full: ModelConfig, setting: Setting) -> Pair:
  """Random weights in the shape that `row` has.

  Raises:
    UserError: it has none, because its method failed.
  """
  if "error" in row:
    raise UserError(f"adapt leaves no shape to train: {row['error']}")
  width = {"K": row["kv_groups"], "F": row["ffn"]}
  config = prune.with_widths(full, width)
  placed = sharding.param_shardings(
    model.abstract_params(config, jnp.float32), setting.mesh
  )
  init = jax.jit(partial(model.init_params, config), out_shardings=placed)
  return config, init(jax.random.key(setting.config.seed))


def measure(config: ModelConfig, params: Params, setting: Setting) -> dict:
  """`perplexity` and `loss` (nats a token), and `tasks`, as asked for."""
  found = {}
  if setting.eval_tokens is not None:
    found |= adapt.measure(config, params, setting)
  if setting.config.eval.tasks:
    from adapt_pruner_jax import harness

    found["tasks"] = harness.evaluate_tasks(
      config,
      params,
      setting.tokenizer,
      setting.config.eval.tasks.split(","),
      tasks_dir=setting.config.eval.tasks_dir or None,
      batch=setting.config.eval.batch,
      mesh=setting.mesh,
    )
  return found


def _facts(config: ModelConfig, _: Params, setting: Setting) -> dict:
  size = model.count_params(config)
  return {
    "params": size,
    "removed": 1 - size / model.count_params(setting.full),
    "kv_groups": list(config.K),
    "ffn": list(config.F),
  }


def _succeeded(found: dict, ratio: float) -> bool:
  return any(r["ratio"] == ratio and "error" not in r for r in found["rows"])


# ---- What is asked for -------------------------------------------------------


def parse_names(text: str) -> list[str]:
  """Reads --methods: names with commas between, or "all".

  A name is one of `config.CHOICES["prune.method"]`, `uniform` (amplitude 0) or
  `paper` (heads counted as the authors' code does), with `+refit` behind it or
  not.

  Raises:
    UserError: an unknown name, or one that is given twice.
  """
  if text == "all":
    return list(ALL)
  names = [name.strip() for name in text.split(",") if name.strip()]
  for name in names:
    if name.removesuffix(REFIT) not in NAMES:
      raise UserError(
        f"--methods={text}: no method {name}{nearest(name, ALL)}; there are "
        f"{', '.join(NAMES)}, each also with {REFIT}, and all"
      )
  if not names or len({*names}) < len(names):
    raise UserError(
      f"--methods={text}: give names once each, with commas between, or all"
    )
  return names


def parse_ratios(text: str) -> list[float]:
  """Reads --ratios: shares of all parameters to remove, rising.

  Raises:
    UserError: not numbers between 0 and 1.
  """
  try:
    ratios = sorted({float(part) for part in text.split(",")})
  except ValueError:
    ratios = []
  if not ratios or not all(0 < ratio < 1 for ratio in ratios):
    raise UserError(
      f"--ratios={text}: give shares to remove, above 0 and below 1, with "
      "commas between, such as 0.2,0.4,0.6"
    )
  return ratios


def settings_of(name: str, ratio: float, base: Prune) -> Prune:
  """The settings that a method's name stands for, at a ratio."""
  plain = name.removesuffix(REFIT)
  return dataclasses.replace(
    base,
    **VARIANTS.get(plain, {"method": plain}),
    ratio=ratio,
    refit="none" if plain == name else "final",
  )


def shared_recipe(config: Config, recover_tokens: int) -> Config:
  """What all rows share; the work directory's config.json."""
  return dataclasses.replace(
    config,
    prune=dataclasses.replace(
      config.prune,
      method="adapt",
      ratio=0.0,
      target_params=0,
      max_steps=0,
      stages=1,
      refit="final",  # so that its calibration is opened
    ),
    train=dataclasses.replace(config.train, tokens=recover_tokens),
    oneshot_control=False,
  )


def check_input(
  config: Config,
  names: list[str],
  jobs: list[tuple[str, float]],
  recover_tokens: int,
  from_scratch: bool,
) -> None:
  """Raises a UserError for what no comparison can be made of."""
  if not (config.eval.text or config.eval.tasks):
    raise UserError(
      "nothing to compare by: give --config.eval.text=FILE for perplexity, "
      "--config.eval.tasks=arc_easy,... for accuracy, or both"
    )
  if from_scratch and not recover_tokens:
    raise UserError("--from_scratch needs --recover_tokens=N to train on")
  if from_scratch and "adapt" not in names:
    raise UserError(
      "--from_scratch trains the shapes that adapt leaves: add adapt to "
      "--methods"
    )
  shared = shared_recipe(config, recover_tokens)
  for name, ratio in jobs:
    if name not in (DENSE, SCRATCH):
      settings = settings_of(name, ratio, shared.prune)
      check(dataclasses.replace(shared, prune=settings))


def stored_rows(path: Path) -> list[dict]:
  """The rows that an earlier call has finished."""
  file = path / comparison.JSON
  rows = workdir.read_json(file)["rows"] if file.exists() else []
  workdir.all_agree(True)  # all have read before one writes
  return rows
