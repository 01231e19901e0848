"""Makes and measures the models of claims.py; what is measured is kept."""

import dataclasses
import functools
import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adapt_pruner_jax.config import Data, Prune, Train
from adapt_pruner_jax.data import packing, sources
from adapt_pruner_jax.data.calibration import WindowData
from adapt_pruner_jax.data.token_store import Stream
from adapt_pruner_jax.data.tokenizer import load_tokenizer
from adapt_pruner_jax.distributed import sharding
from adapt_pruner_jax.evaluation import perplexity
from adapt_pruner_jax.formats.hf import load
from adapt_pruner_jax.models import model_config
from adapt_pruner_jax.pruning import methods, schedule, surgery, targets
from adapt_pruner_jax.pruning.task import PruneTask
from adapt_pruner_jax.runs import compare_methods, tiny_model
from adapt_pruner_jax.storage import json_files, publish
from adapt_pruner_jax.training import loop, optimizer
from adapt_pruner_jax.training.step import Step, make_step

SAMPLES, REFIT_SAMPLES, SAMPLE_LEN, BATCH = 64, 512, 64, 32
ROWS, ROW_LEN = 4, 256  # of a train step
EVAL_TOKENS = 20_480
TEMPERATURES = (1.0, 1.15, 1.3, 1.5, 1.75, 2.0)
BEST_TEMPERATURE = ("temperature", "best")  # a change of how it is measured
SCRATCH, DENSE = compare_methods.SCRATCH, compare_methods.DENSE


@dataclasses.dataclass(frozen=True)
class Cell:
  """One measurement; `change` is one setting unlike the method's."""

  base: str
  seed: int
  method: str
  ratio: float = 0.4
  stages: int = 1
  tokens: int = 0
  rate: float = 0.0
  change: tuple[str, Any] | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Base:
  """A dense model with its texts."""

  config: model_config.ModelConfig
  params: Any
  tokenizer: Any
  train_file: Path
  calibration: np.ndarray
  slices: dict[str, np.ndarray]  # tune, test, wikitext


class Bench:
  """Measures cells, and keeps what has been measured."""

  def __init__(self, out: Path, where: dict[str, Any], units: list[int]):
    self.out, self.where, self.units = out, where, units
    self.mesh = sharding.make_mesh(devices=jax.devices()[:1])
    self.file = out / "cells.jsonl"
    self.found = {}
    if self.file.exists():
      for line in self.file.read_text().splitlines():
        row = json.loads(line)
        change = row["cell"]["change"]
        cell = Cell(**row["cell"] | {"change": change and tuple(change)})
        self.found[cell] = row["result"]

  def get(self, cell: Cell) -> dict:
    """The result of a cell, measured now unless it is there."""
    if cell not in self.found:
      begun = time.monotonic()
      result = self.measure(cell)
      self.found[cell] = result
      row = {"cell": dataclasses.asdict(cell), "result": result}
      json_files.append_line(self.file, row)
      print(
        f"{time.monotonic() - begun:6.1f} s {cell}: test {result['test']:.3f}",
        flush=True,
      )
    return self.found[cell]

  def measure(self, cell: Cell) -> dict:
    base, temperatures = self.base(cell.base), (1.0,)
    if cell.change == BEST_TEMPERATURE:
      temperatures = TEMPERATURES
      cell = dataclasses.replace(cell, change=None)
    if cell.method == DENSE:
      config, params, facts = base.config, base.params, {}
    elif cell.method == SCRATCH:
      shape = self.get(Cell(cell.base, cell.seed, "paper", cell.ratio))
      width = {"K": shape["kv_groups"], "F": shape["ffn"]}
      config = surgery.with_widths(base.config, width)
      params = tiny_model.init_params(config, cell.seed, self.mesh)
      params, _ = self.fit(cell, config, params, None, 0, self.steps(cell))
      facts = {}
    elif cell.stages == 1:
      config, params, facts = self.pruned(
        dataclasses.replace(cell, tokens=0, rate=0.0)
      )
      if cell.tokens:
        params, _ = self.fit(cell, config, params, None, 0, self.steps(cell))
    else:
      config, params, facts = self.staged(cell)
    losses = {
      name: min(self.loss(config, params, ids, t) for t in temperatures)
      for name, ids in base.slices.items()
    }
    return (
      losses
      | facts
      | {
        "params": model_config.count_params(config),
        "kv_groups": list(config.kv_groups),
        "ffn": list(config.ffn_widths),
      }
    )

  def loss(
    self, config: Any, params: Any, ids: np.ndarray, temperature: float
  ) -> float:
    """Nats per token, with the logits over `temperature`."""
    norm = params["final_norm"] / temperature  # logits are linear in it
    params = params | {"final_norm": norm}
    _, total, number = perplexity.perplexity(
      config, params, ids, ROW_LEN, 8, self.mesh
    )
    return total / number

  @functools.lru_cache(maxsize=1)  # noqa: B019
  def pruned(self, cell: Cell) -> tuple:
    return self.staged(cell)

  def staged(self, cell: Cell) -> tuple:
    """(config, params, facts) after the stages, as `adapt.run` goes."""
    base = self.base(cell.base)
    full, pair = base.config, (base.config, base.params)
    settings, samples, carry = self.settings(cell)
    one = np.zeros(1, np.int64)  # document
    stream = Stream(base.calibration, one, trained=None, fingerprint="")
    windows = lambda count, seed: WindowData(
      [stream], [count], SAMPLE_LEN, seed
    )
    fresh = windows(samples, cell.seed)
    for_refit = windows(REFIT_SAMPLES, cell.seed + 1)
    kept, number, seconds, state = surgery.everything(full), 0, 0.0, None
    target = targets.resolve_target(full, settings)
    goals = schedule.stage_targets(
      model_config.count_params(full), target, cell.stages
    )
    ends = schedule.stage_ends(self.steps(cell), cell.stages, "linear")
    for goal, begin, end in zip(goals, [0, *ends[:-1]], ends, strict=True):
      begun = time.process_time()
      task = PruneTask(
        *pair,
        settings,
        lambda step, first=number: fresh.batch(first + step),
        goal,
        full=full,
        kept=kept,
        refit_samples=lambda step, first=number: for_refit.batch(first + step),
        batch=BATCH,
        mesh=self.mesh,
        seed=cell.seed,
      )
      made = methods.refit_after(task, methods.prune(task))
      number += len(made.trace)
      left = surgery.relative_to(kept, made.kept)
      seconds += time.process_time() - begun
      if carry and state is not None:
        _, state = surgery.gather(pair[0], state, left, self.mesh)
      else:
        state = None
      kept = made.kept
      params, state = self.fit(
        cell, made.config, made.params, state, begin, end
      )
      pair = made.config, params
    return *pair, {"prune_seconds": seconds, "prune_steps": number}

  def settings(self, cell: Cell) -> tuple[Prune, int, bool]:
    """Of the method; samples a step; whether moments are carried over."""
    shared = Prune(refit="final")
    if cell.method.startswith("curvature"):
      shared = Prune(refit="2", refit_all=True)  # as configs/accel.py
    settings = compare_methods.settings_of(cell.method, cell.ratio, shared)
    beside = {"samples": SAMPLES, "carry_moments": Train().carry_moments}
    name, value = cell.change or ("", None)
    if name in beside:
      beside[name] = value
    elif name:
      section, _, field = name.rpartition(".")
      holder = getattr(settings, section) if section else settings
      setattr(holder, field, value)
    return settings, *beside.values()

  def steps(self, cell: Cell) -> int:
    return cell.tokens // (ROWS * ROW_LEN)

  def fit(
    self, cell: Cell, config: Any, params: Any, state: Any, begin: int, end: int
  ) -> tuple:
    """(params, optimizer state) after the steps from `begin` to `end`."""
    if begin == end:
      return params, state
    self.schedule = optimizer.schedule(
      Train(learning_rate=cell.rate, min_learning_rate=cell.rate / 10),
      self.steps(cell),
    )
    params = jax.tree.map(jnp.copy, params)  # the step donates its argument
    training, _ = loop.recover(
      loop.start(
        (config, params),
        Train(),
        self.schedule,
        self.mesh,
        opt_state=state,
        step_fn=self.step_fn(config),
      ),
      self.rows(cell.base, cell.seed).batches(begin),
      begin,
      end,
      self.mesh,
    )
    return jax.block_until_ready((training.trained, training.opt_state))

  @functools.lru_cache(maxsize=1)  # noqa: B019
  def step_fn(self, config: model_config.ModelConfig) -> Step:
    """Compiled once a shape, whatever the schedule is."""
    return make_step(
      config, Train(), lambda step: self.schedule(step), self.mesh
    )

  @functools.lru_cache(maxsize=1)  # noqa: B019
  def rows(self, base: str, seed: int) -> packing.TrainData:
    found = self.base(base)
    source = Data(f"text:{found.train_file}", ROW_LEN, ROWS)
    return packing.train_data(
      source, found.tokenizer, found.config.vocab_size, seed
    )

  @functools.lru_cache(maxsize=1)  # noqa: B019
  def base(self, name: str) -> Base:
    """Opens a base; 85 % of its text is for calibration and training."""
    folder, text, heldout = self.where[name]
    config, params = load.load(str(folder))
    # As in the published numbers, windows are of text alone.
    tokenizer = load_tokenizer(folder, "none")
    whole = sources.read_text(text)
    cut = whole.rfind("\n", 0, int(len(whole) * 0.85))
    file = self.out / f"{name}.txt"
    publish.write_text(file, whole[:cut])
    ids = lambda text: np.array(tokenizer.encode(text), np.int32)
    slices = {
      "tune": whole[cut:],
      "test": sources.read_text(heldout),
      "wikitext": self.where["wikitext"].read_text(encoding="utf-8"),
    }
    return Base(
      config,
      params,
      tokenizer,
      file,
      ids(whole[:cut]),
      {n: ids(t[: 8 * EVAL_TOKENS])[:EVAL_TOKENS] for n, t in slices.items()},
    )
