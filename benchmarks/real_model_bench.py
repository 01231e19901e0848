"""Makes and measures the models of real_model.py; what is measured is kept."""

import dataclasses
import functools
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from cpu_clock import CpuClock
from real_model_answers import answered, prompts
from real_model_questions import right
from real_model_texts import c4, cut, read, reported, token_losses

from adapt_pruner_jax.config import Config, Data, Prune
from adapt_pruner_jax.data import packing
from adapt_pruner_jax.data.calibration import pruning_data
from adapt_pruner_jax.data.tokenizer import load_tokenizer
from adapt_pruner_jax.distributed import sharding
from adapt_pruner_jax.evaluation import answer_agreement, lm_eval_run
from adapt_pruner_jax.evaluation.questions import Questions
from adapt_pruner_jax.formats import convert, opening
from adapt_pruner_jax.models import model_config
from adapt_pruner_jax.pruning import methods, schedule, surgery, targets
from adapt_pruner_jax.pruning.task import PruneTask
from adapt_pruner_jax.runs import compare_methods, tiny_model
from adapt_pruner_jax.storage import checkpoints, digest, json_files, publish
from adapt_pruner_jax.training import loop, optimizer
from configs import oneshot

DENSE, SCRATCH = compare_methods.DENSE, compare_methods.SCRATCH
DEFAULT = "default"  # configs/oneshot.py
WARM = "default_t2"  # the same at temperature 2, as it was until 2026-11-30
OURS = (DEFAULT, WARM)
WINDOW = 1024  # tokens of an evaluation's window
WINDOWS = 8  # of a text
LONG_WINDOWS = 4  # of the model's context
BUCKETS = 16  # of positions, each of as many
SMALL, LARGE = 8_192, 32_768  # calibration tokens a step
SEQ_LEN, BATCH = 128, 32  # of the other methods' calibration
ROWS, ROW_LEN = 2, 256  # of a train step
SAVED = 100  # train steps between checkpoints, where the tuning loss is taken
CALIBRATION_END, TUNE_END, TEST_BEGIN = 4_000_000, 4_200_000, 4_250_000
ANSWERS = "answers"
Pair = tuple[model_config.ModelConfig, Any]


class Cell(NamedTuple):
  """One measurement; the last six are of recovery training."""

  part: str
  method: str
  ratio: float = 0.0
  seed: int = 0
  tokens: int = 0  # of calibration, a step
  stages: int = 1
  train_tokens: int = 0
  alpha: float = 0.0  # of distillation
  rate: float = 0.0
  source: str = ""  # ANSWERS: what the dense model says, not the texts
  temperature: float = 2.0  # of distillation

  @property
  def untrained(self) -> "Cell":
    """The cell of `prune` that a training in one stage goes on from."""
    return Cell("prune", *self[1:5])


def read_cells(file: Path) -> dict[Cell, dict]:
  """Results; later lines of a cell replace earlier ones."""
  rows = json_files.read_lines(file)
  return {Cell(**row["cell"]): row["result"] for row in rows}


class Bench:
  """Measures cells, and keeps what has been measured."""

  def __init__(
    self,
    model: Path,
    data: Path,
    workdir: Path,
    out: Path,
    questions: int,
    mmlu: bool = False,
  ):
    self.model, self.data, self.workdir, self.out = model, data, workdir, out
    self.questions, self.mmlu = questions, mmlu
    self.commit = commit()  # of the code that was read, not of later
    self.mesh = sharding.make_mesh(devices=jax.devices()[:1])
    # As in the published numbers, windows are of text alone.
    self.tokenizer = load_tokenizer(model, "none")
    self.found = read_cells(out)
    workdir.mkdir(parents=True, exist_ok=True)
    self.calibration_file = workdir / "calibration.txt"
    publish.write_text(self.calibration_file, c4(self.data, 0, CALIBRATION_END))

  def get(self, cell: Cell) -> dict:
    """The result of a cell, measured now unless it is there."""
    if cell not in self.found:
      begun, cpu = time.monotonic(), time.process_time()
      result = getattr(self, cell.part)(cell)
      result["cell_cpu_seconds"] = round(time.process_time() - cpu, 1)
      self.found[cell] = result
      row = {"cell": cell._asdict(), "commit": self.commit, "result": result}
      json_files.append_line(self.out, row)
      for place in self.checkpoints(cell).parent.glob(f"{words(cell)}-*"):
        publish.remove(place)
      print(f"{time.monotonic() - begun:6.0f} s {cell}", flush=True)
    return self.found[cell]

  # ---- Parts -----------------------------------------------------------------

  def prune(self, cell: Cell) -> dict:
    """Prunes, keeps the model, and measures its loss."""
    if cell.method == DENSE:
      pair, facts = self.dense, {}
    else:
      pair, facts = self.staged(cell)
      self.keep(cell, pair)
    return self.facts(pair) | facts | {"texts": self.losses(pair)}

  def tasks(self, cell: Cell) -> dict:
    """Which questions a model gets right, as hexadecimal bits by task."""
    how = Questions(tasks_dir=str(self.data / "eval"), limit=self.questions)
    lm = lm_eval_run.open_lm(*self.kept(cell), self.tokenizer, mesh=self.mesh)
    return right(lm, ["commonsense"] + ["mmlu"] * self.mmlu, how)

  def length(self, cell: Cell) -> dict:
    """Mean loss of a window's parts, one after the other, by window."""
    pair = self.kept(cell)
    longest = pair[0].context // BUCKETS * BUCKETS
    windows = cut(
      self.tokenizer, read(self.data, "books.txt"), LONG_WINDOWS, longest + 1
    )
    found = []
    for row_T in windows:
      nll_T = token_losses(*pair, row_T)
      parts = nll_T[:longest].reshape(BUCKETS, -1).mean(1)
      found.append([round(float(part), 4) for part in parts])
    return {"context": longest, "losses": found}

  def answers(self, cell: Cell) -> dict:
    """How alike a model and the dense one answer prompts that are held out."""
    rows = json_files.read_lines(self.asked("heldout"))
    return answer_agreement.answer_agreement(
      self.dense, self.kept(cell), rows, ROWS, self.mesh
    )

  def recover(self, cell: Cell) -> dict:
    """Trains, keeps the model, and measures its loss."""
    pair, facts = self.trained(cell)
    self.keep(cell, pair)
    return self.facts(pair) | facts | {"texts": self.losses(pair)}

  def rates(self, cell: Cell) -> dict:
    """Trains for a moment; what is reported is not looked at."""
    return self.trained(cell)[1]

  def best_rate(self, cell: Cell, rates: Sequence[float]) -> float:
    """The best on the tuning text."""
    cells = [cell._replace(part="rates", rate=rate) for rate in rates]
    return min(cells, key=lambda cell: self.get(cell)["tune"]).rate

  # ---- Models ----------------------------------------------------------------

  @functools.cached_property
  def dense(self) -> Pair:
    return opening.open_model(str(self.model), "float32", "", self.mesh)[:2]

  def path(self, cell: Cell) -> Path:
    """Of the model that is kept."""
    return self.workdir / words(cell[1:] if cell.train_tokens else cell[1:5])

  def checkpoints(self, cell: Cell, begin: int = 0) -> Path:
    """Of a training that begins at a step."""
    return self.workdir / "training" / words((*cell, begin))

  def keep(self, cell: Cell, pair: Pair) -> None:
    form = "orbax" if pair[0].residual else "hf"
    convert.write(
      *pair, self.path(cell), form, source=self.model, overwrite=True
    )

  def kept(self, cell: Cell) -> Pair:
    """A model that `prune` or `recover` has made."""
    if cell.method == DENSE and not cell.train_tokens:
      return self.dense
    path = str(self.path(cell))
    return opening.open_model(path, "float32", "", self.mesh)[:2]

  def settings(self, cell: Cell) -> Config:
    """The recipe: ours of its own file, others as `compare` takes them."""
    recipe = oneshot.get_config()
    own = recipe.calibration
    own.source = f"text:{self.calibration_file}"
    if cell.method in compare_methods.NAMES:
      recipe.prune = compare_methods.settings_of(
        cell.method, cell.ratio, Prune()
      )
    if cell.method == WARM:
      recipe.prune.refit_temperature = 2.0
    if cell.method in OURS:
      recipe.prune.ratio = cell.ratio
      # Few steps of many tokens: as many in all as the paper's many of few,
      # which go over the stages.
      part = lambda of_all: of_all * cell.tokens // (SMALL * cell.stages)
      own.samples = part(own.samples)
      own.refit_samples = part(own.refit_samples)
    else:
      own.seq_len, own.batch = SEQ_LEN, BATCH
      own.samples = own.refit_samples = cell.tokens // SEQ_LEN
    recipe.train = dataclasses.replace(
      recipe.train,
      tokens=cell.train_tokens,
      learning_rate=cell.rate,
      min_learning_rate=cell.rate / 10,
      distill_alpha=cell.alpha,
      distill_temperature=cell.temperature,
    )
    source = recipe.calibration.source
    if cell.source:
      source = f"answers:{self.asked('train')}"
    recipe.data = Data(source, ROW_LEN, ROWS, "none")
    recipe.seed = cell.seed
    return recipe

  def trained(self, cell: Cell) -> tuple[Pair, dict]:
    """Trains what `prune` has kept, random weights, or by stages."""
    if cell.stages > 1:
      return self.staged(cell)
    source = cell.untrained
    if cell.method == SCRATCH:
      config, _ = self.kept(source._replace(method="paper"))
      params = tiny_model.init_params(config, cell.seed, self.mesh)
    else:
      config, params = self.kept(source)
    end = self.steps(cell)
    params, _, curve = self.fit(cell, config, params, None, 0, end)
    return (config, params), learned(curve)

  def staged(self, cell: Cell) -> tuple[Pair, dict]:
    """Prunes, refits and trains by stages, as `runs.run` does."""
    recipe, (full, _) = self.settings(cell), self.dense
    texts = pruning_data(
      recipe.calibration,
      recipe.prune,
      self.tokenizer,
      full.vocab_size,
      cell.seed,
      self.workdir / "cache",
    )
    pair, kept, state, number = self.dense, surgery.everything(full), None, 0
    target = targets.resolve_target(full, recipe.prune)
    goals = schedule.stage_targets(
      model_config.count_params(full), target, cell.stages
    )
    share = recipe.train.data_share
    ends = schedule.stage_ends(self.steps(cell), cell.stages, share)
    clock, curve = CpuClock(), []
    later = lambda data, first: lambda step: data.batch(first + step)
    again = max(recipe.prune.refit_passes - 1, 0)  # passes behind the first
    for stage, (goal, begin, end) in enumerate(
      zip(goals, [0, *ends[:-1]], ends, strict=True)
    ):
      passes = stage * again
      task = PruneTask(
        *pair,
        recipe.prune,
        later(texts.steps, number),
        goal,
        full=full,
        kept=kept,
        refit_samples=later(texts.refits, number + passes),
        batch=recipe.calibration.batch,
        mesh=self.mesh,
        seed=cell.seed,
      )
      with clock.counting():
        made = methods.refit_after(task, methods.prune(task))
        jax.block_until_ready(made.params)
      number += len(made.trace)
      if state is not None:
        left = surgery.relative_to(kept, made.kept)
        _, state = surgery.gather(pair[0], state, left, self.mesh)
      kept = made.kept
      params, state, points = self.fit(
        cell, made.config, made.params, state, begin, end
      )
      pair, curve = (made.config, params), curve + points
    return pair, learned(curve) | {
      "prune_seconds": round(clock.seconds, 1),
      "compile_seconds": round(clock.compiling, 1),
      "prune_steps": number,
      "calibration_tokens": calibration_tokens(recipe, number, cell.stages),
      "settings": digest.of_json(dataclasses.asdict(recipe.prune))[:12],
    }

  def steps(self, cell: Cell) -> int:
    return cell.train_tokens // (ROWS * ROW_LEN)

  def fit(
    self, cell: Cell, config: Any, params: Any, state: Any, begin: int, end: int
  ) -> tuple[Any, Any, list]:
    """Trains from step `begin` to `end`, or goes on where a kill cut it off.

    Returns:
      The params, the optimizer state, and [tokens trained on, tuning loss] of
      each checkpoint.
    """
    if begin == end:
      return params, state, []
    recipe = self.settings(cell)
    rows = packing.train_data(
      recipe.data,
      self.tokenizer,
      config.vocab_size,
      cell.seed,
      self.workdir / "cache",
    )
    params = jax.tree.map(jnp.copy, params)  # the step donates its argument
    training = loop.start(
      (config, params),
      recipe.train,
      optimizer.schedule(recipe.train, self.steps(cell)),
      self.mesh,
      opt_state=state,
      teacher=self.dense if cell.alpha else None,
    )
    step, curve = begin, []
    with checkpoints.Checkpoints(self.checkpoints(cell, begin), 1) as saved:
      abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
        tuple(training[1:]),
      )
      found = saved.restore(lambda meta: abstract)
      if found is not None:
        step, curve = found[0], found[1]["curve"]
        training = loop.Training(training.step_fn, *found[2])
      while step < end:
        until = min(step + SAVED, end)
        training, step = loop.recover(
          training, rows.batches(step), step, until, self.mesh
        )
        pair = config, training.trained
        loss = np.mean(self.text_losses(pair, self.windows["tune"]))
        curve.append([step * ROWS * ROW_LEN, round(float(loss), 4)])
        saved.save(step, {"curve": curve}, tuple(training[1:]))
    return training.trained, training.opt_state, curve

  def facts(self, pair: Pair) -> dict:
    return {
      "params": model_config.count_params(pair[0]),
      "kv_groups": list(pair[0].kv_groups),
      "ffn": list(pair[0].ffn_widths),
    }

  # ---- Texts -----------------------------------------------------------------

  @functools.cached_property
  def windows(self) -> dict[str, np.ndarray]:
    """Of each text, int32 [WINDOWS, WINDOW], evenly spread over it."""
    texts = {"tune": c4(self.data, CALIBRATION_END, TUNE_END)}
    texts |= reported(self.data, TEST_BEGIN)
    return {
      name: cut(self.tokenizer, text, WINDOWS, WINDOW)
      for name, text in texts.items()
    }

  def losses(self, pair: Pair) -> dict[str, list[float]]:
    """Mean nats a token of each window of the reported texts."""
    return {
      name: [round(loss, 5) for loss in self.text_losses(pair, rows)]
      for name, rows in self.windows.items()
      if name != "tune"
    }

  def asked(self, split: str) -> Path:
    """The dense model's answers to prompts made of the calibration text."""
    rows = prompts(self.data, CALIBRATION_END)
    file = self.workdir / "prompts.jsonl"
    json_files.rewrite_lines(file, rows)
    return answered(file, split, self.dense, self.model, self.tokenizer)

  def text_losses(self, pair: Pair, windows: np.ndarray) -> list[float]:
    return [float(token_losses(*pair, row_T).mean()) for row_T in windows]


def words(fields: Sequence) -> str:
  """A cell's fields, as a name."""
  return "-".join(str(field) for field in fields if field != "")


def learned(curve: list) -> dict:
  """What is said of a training: its curve, and the loss at its end."""
  return {"tune": curve[-1][1], "curve": curve} if curve else {}


def calibration_tokens(recipe: Config, steps: int, stages: int) -> int:
  """All that pruning and refits have read."""
  of, settings = recipe.calibration, recipe.prune
  if settings.method == "magnitude":
    return 0
  refits = 0 if settings.refit == "none" else max(settings.refit_passes, 1)
  windows = steps * of.samples + stages * refits * of.refit_samples
  return windows * of.seq_len


def commit() -> str:
  """Of the checkout that runs; with + if files differ from it."""
  found = subprocess.run(
    ["git", "describe", "--always", "--dirty=+", "--exclude=*"],
    cwd=Path(__file__).parent,
    capture_output=True,
    text=True,
  )
  return found.stdout.strip()
