"""Runs and measures the rows of budgets.py; what is measured is kept."""

import dataclasses
import functools
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from real_model_bench import CALIBRATION_END, TEST_BEGIN, TUNE_END, commit
from real_model_questions import right
from real_model_texts import MARK, c4, read, reported, token_losses

from adapt_pruner_jax.config import Config, Prune
from adapt_pruner_jax.data.calibration import pruning_data
from adapt_pruner_jax.data.tokenizer import load_tokenizer
from adapt_pruner_jax.distributed import sharding
from adapt_pruner_jax.evaluation import lm_eval_run
from adapt_pruner_jax.evaluation.questions import Questions
from adapt_pruner_jax.formats import opening
from adapt_pruner_jax.formats.gguf import writer
from adapt_pruner_jax.models import model_config
from adapt_pruner_jax.pruning import (
  allotment,
  budgets,
  methods,
  surgery,
  targets,
)
from adapt_pruner_jax.pruning.task import PruneTask
from adapt_pruner_jax.runs import latency_budget
from adapt_pruner_jax.storage import json_files, publish
from configs import oneshot

FILE_BYTES = 105e6  # of a q8_0 gguf
LATENCY = 0.3  # share of the decode time to remove, for at least a quarter
CONTEXT = 2048  # tokens that a timed one sees
TOKENS = 16_384  # of a small vocabulary
HOURS = 0.5
SLICES, SLICE = 8, 2_400  # of each text, and its characters
ENDINGS = 32  # slices of the ends of books
PADDED = 128  # slices are padded to multiples of so many tokens
TABLE = "latency.json"
DENSE = "dense"
# One recipe of all pruned rows: scored once on 8k tokens, refitted on as many,
# by least squares, which a CPU does in minutes.
RECIPE = {
  "prune.ranking.step_size": 0.5,
  "prune.refit": "final",
  "prune.refit_all": True,
  "prune.refit_passes": 0,
  "calibration.samples": 64,
  "calibration.refit_samples": 64,
  "calibration.seq_len": 128,
  "calibration.batch": 8,
}
FILE = {"prune.budget": "bytes", "prune.budget_export": "q8_0"}
FILE |= {"prune.budget_value": FILE_BYTES}
VOCAB = {"vocab.keep_tokens": TOKENS}
SPEED = {"prune.budget": "latency", "prune.budget_context": CONTEXT}
SPEED |= {"prune.ratio": LATENCY}
SHARE = {"prune.allotment": "uniform", "prune.trim": False}
# A window a step, as the default refit; the dense model teaches.
TRAINING = {"data.seq_len": 512, "data.batch": 1, "train.remat": "none"}
TRAINING |= {"train.learning_rate": 1.5e-4, "train.min_learning_rate": 1.5e-5}
VOCAB_TRAINED = VOCAB | TRAINING | {"train.tokens": 61_440}
QUALITY = {"prune.budget": "quality", "prune.budget_value": 0.2}
QUALITY |= {"prune.ranking.step_size": 0.05}
# Rows without questions.
UNASKED = ("flops", "cache", "quality", "latency_36")
NOVELS = "novels"  # reads the beginnings of books, not C4
BEGINNING = 0.85  # of a book
# What a command says beside the recipe; a number's place is filled when the
# row before it is known.
ROWS: dict[str, dict] = {
  DENSE: {},
  "file": FILE,
  "file_params": {"prune.ratio": None},
  "latency": SPEED,
  "latency_params": {"prune.ratio": None},
  "latency_one_width": SPEED | {"prune.allotment": "one_width"},
  "latency_share": SPEED | SHARE,
  "latency_36": SPEED | {"prune.ratio": 0.36},
  "file_vocab": FILE | VOCAB,
  "vocab": VOCAB,
  "vocab_trained": VOCAB_TRAINED,
  "vocab_novels": VOCAB_TRAINED | {NOVELS: True},
  "hours": TRAINING
  | {"prune.ratio": 0.2, "train.hours": HOURS, "train.distill_alpha": 1.0},
  "flops": {
    "prune.budget": "flops",
    "prune.budget_context": CONTEXT,
    "prune.ratio": 0.2,
  },
  "cache": {
    "prune.budget": "kv_bytes",
    "prune.budget_context": CONTEXT,
    "prune.ratio": 0.25,
  },
  "quality": QUALITY,
}


class Bench:
  """Measures rows, and keeps what has been measured."""

  def __init__(
    self, model: Path, data: Path, workdir: Path, out: Path, questions: int
  ):
    self.model, self.data, self.workdir, self.out = model, data, workdir, out
    self.questions = questions
    self.mesh = sharding.make_mesh(devices=jax.devices()[:1])
    self.found = {
      row["row"]: row["result"] for row in json_files.read_lines(out)
    }
    workdir.mkdir(parents=True, exist_ok=True)
    self.calibration = workdir / "calibration.txt"
    publish.write_text(self.calibration, c4(data, 0, CALIBRATION_END))
    self.tuning = workdir / "tuning.txt"
    publish.write_text(self.tuning, c4(data, CALIBRATION_END, TUNE_END))
    self.novels = workdir / "novels.txt"
    books = read(data, "books.txt").split(MARK)
    cuts = [int(len(book) * BEGINNING) for book in books]
    begun = (b[:n] for b, n in zip(books, cuts, strict=True))
    publish.write_text(self.novels, "".join(begun))
    ended = (b[n:] for b, n in zip(books, cuts, strict=True))
    self.endings = spread("".join(ended), ENDINGS)

  def get(self, name: str) -> dict:
    """The result of a row, measured now unless it is there."""
    if name not in self.found:
      begun = time.monotonic()
      result = self.row(name)
      self.found[name] = result
      row = {"row": name, "commit": commit(), "result": result}
      json_files.append_line(self.out, row)
      print(f"{time.monotonic() - begun:6.0f} s {name}", flush=True)
    return self.found[name]

  def row(self, name: str) -> dict:
    """Runs the command of a row, and measures what it has made."""
    if name == DENSE:
      return self.measured(self.model)
    folder, given = self.workdir / name, dict(ROWS[name])
    if given.get("prune.budget") == "latency":
      given["prune.budget_table"] = self.table
    if None in given.values():
      given["prune.ratio"] = self.equal_ratio(name.removesuffix("_params"))
    command, seconds = self.run(folder, RECIPE | given)
    summary = json_files.read_json(folder / "summary.json")
    wanted = ("budget", "budget_target", "budget_before", "budget_after")
    wanted += ("params_after", "seconds", "latency_budget", "train_tokens")
    facts = {n: summary[n] for n in wanted if n in summary}
    facts |= {"command": command, "wall_seconds": round(seconds, 1)}
    asked = name not in UNASKED
    facts |= self.sizes(name, folder)
    return facts | self.measured(folder / "model", asked)

  def sizes(self, name: str, folder: Path) -> dict:
    """What a row to a parameter target has of the other budget; of a vocabulary
    for novels, what it costs on their ends."""
    if name == "vocab_novels":
      models = self.model, folder / "model"
      losses = [
        [nats(self.open(f), load_tokenizer(f, "none"), t) for t in self.endings]
        for f in models
      ]
      sizes = [len(text.encode()) for text in self.endings]
      return {"endings": {"dense": losses[0], "cut": losses[1], "bytes": sizes}}
    if name == "file_params":
      out = folder / "model.gguf"
      writer_command = ["convert", f"--model={folder / 'model'}"]
      writer_command += ["--format=gguf", "--dtype=q8_0", f"--out={out}"]
      self.call([*writer_command, "--overwrite"])
      return {"gguf_bytes": out.stat().st_size}
    if name == "latency_params":
      settings = self.settings("latency")
      pair = self.open(folder / "model")
      timed = latency_budget.compare(settings, self.dense, pair, ())
      return {"latency_budget": timed}
    return {}

  # ---- Commands --------------------------------------------------------------

  def run(self, folder: Path, given: dict) -> tuple[str, float]:
    """`adapt-pruner run`; the command as a user types it, and its seconds."""
    fields = {"model.path": self.model, **given}
    text = self.novels if fields.pop(NOVELS, False) else self.calibration
    fields["calibration.source"] = f"text:{text}"
    if "train.hours" in given or "train.tokens" in given:
      fields["data.source"] = f"text:{text}"
    if given.get("prune.budget") == "quality":
      fields["calibration.tuning"] = f"text:{self.tuning}"
    words = ["run", "--config=configs/oneshot.py", f"--workdir={folder}"]
    words += [f"--config.{name}={value}" for name, value in fields.items()]
    begun = time.monotonic()
    self.call(words)
    shown = " ".join(["adapt-pruner", *words])
    for path, short in (
      (self.calibration, "FILE"),
      (self.novels, "NOVELS"),
      (self.tuning, "HELDOUT"),
      (self.model, "DIR"),
      (self.workdir, "runs"),
    ):
      shown = shown.replace(str(path), short)
    return shown, time.monotonic() - begun

  def call(self, words: list[str]) -> None:
    command = [sys.executable, "-m", "adapt_pruner_jax", *words]
    print(" ".join(command), flush=True)
    subprocess.run(command, check=True, cwd=Path(__file__).parents[1])

  @functools.cached_property
  def table(self) -> Path:
    """Of what a decoded token takes on this machine."""
    file = self.workdir / TABLE
    if not file.exists():
      words = [f"--context={CONTEXT}", "--repeats=11", f"--out={file}"]
      self.call(["profile", f"--model={self.model}", *words])
    return file

  # ---- Equal budgets ---------------------------------------------------------

  def settings(self, name: str) -> Prune:
    """`prune` of a row's recipe."""
    return self.recipe(name).prune

  def recipe(self, name: str) -> Config:
    config = oneshot.get_config()
    for field, value in (RECIPE | ROWS[name]).items():
      *path, last = field.split(".")
      setattr(functools.reduce(getattr, path, config), last, value)
    config.calibration.source = f"text:{self.calibration}"
    if name == "latency":
      config.prune.budget_table = str(self.table)
    return config

  def equal_ratio(self, name: str) -> float:
    """The share of the parameters without which a row's budget is met too."""
    full, settings = self.dense[0], self.settings(name)
    extra = 0
    if name == "file":
      shapes = model_config.abstract_params(full, jnp.dtype("float32"))
      extra = writer.header_bytes(full, shapes, self.model, "q8_0")
    most = targets.resolve_target(full, settings, beside=extra)
    plain = Prune(ranking=settings.ranking)

    def fits(ratio: float) -> bool:
      config = self.by_parameters(dataclasses.replace(plain, ratio=ratio))
      return budgets.count(config, settings) <= most

    low, high = 0.0, 0.8
    for _ in range(20):
      middle = (low + high) / 2
      low, high = (low, middle) if fits(middle) else (middle, high)
    return math.ceil(high * 1e5) / 1e5

  def by_parameters(self, settings: Prune) -> model_config.ModelConfig:
    """The sizes that a step of this ranking leaves."""
    full = self.dense[0]
    target = targets.resolve_target(full, settings)
    masks = surgery.to_masks(surgery.everything(full), full)
    counts = allotment.choose(
      full,
      self.scores,
      masks,
      targets.prunable_modules(full, settings),
      target,
      target,
      settings.ranking.cap,
      settings,
    )
    widths = surgery.widths(masks)
    return full.with_units(
      {u: tuple(int(n) for n in widths[u] - counts[u]) for u in widths}
    )

  @functools.cached_property
  def scores(self) -> dict:
    """Of all units of the dense model, as a run measures them."""
    file = self.workdir / "scores.json"
    if not file.exists():
      steps, recipe = [], self.recipe("file_params")
      recipe.prune.refit = "none"
      texts = pruning_data(
        recipe.calibration,
        recipe.prune,
        load_tokenizer(self.model, "auto"),
        self.dense[0].vocab_size,
        recipe.seed,
        self.workdir / "cache",
      )
      target = dataclasses.replace(recipe.prune, ratio=0.1)
      methods.prune(
        PruneTask(
          *self.dense,
          recipe.prune,
          texts.steps.batch,
          targets.resolve_target(self.dense[0], target),
          batch=recipe.calibration.batch,
          mesh=self.mesh,
          log=lambda record, step: steps.append(step),
        )
      )
      found = {u: s.tolist() for u, s in steps[0].scores.items()}
      publish.write_text(file, json.dumps(found))
    return {u: np.array(s) for u, s in json_files.read_json(file).items()}

  @functools.cached_property
  def dense(self) -> tuple:
    return self.open(self.model)

  def open(self, folder: Path) -> tuple:
    return opening.open_model(str(folder), "float32", "", self.mesh)[:2]

  # ---- Measurements ----------------------------------------------------------

  def measured(self, folder: Path, asked: bool = True) -> dict:
    """Nats of slices of the texts, and which questions are answered right."""
    pair = self.open(folder)
    tokenizer = load_tokenizer(folder, "none")
    found = {
      name: [nats(pair, tokenizer, text) for text in texts]
      for name, texts in self.slices.items()
    }
    answers = {}
    if asked:
      how = Questions(tasks_dir=str(self.data / "eval"), limit=self.questions)
      lm = lm_eval_run.open_lm(*pair, tokenizer, mesh=self.mesh)
      answers = right(lm, ["commonsense"], how)
    return answers | {
      "nats": found,
      "tokens": {
        name: [len(tokenizer.encode(text)) for text in texts]
        for name, texts in self.slices.items()
      },
      "bytes": {
        name: [len(text.encode()) for text in texts]
        for name, texts in self.slices.items()
      },
    }

  @functools.cached_property
  def slices(self) -> dict[str, list[str]]:
    """Of each text, evenly spread over it; the same bytes for any tokens."""
    whole = reported(self.data, TEST_BEGIN)
    return {name: spread(content) for name, content in whole.items()}


def spread(text: str, number: int = SLICES) -> list[str]:
  """Slices that begin with a word."""
  text = text.replace(MARK, "")
  found = []
  for start in np.linspace(0, len(text) - 2 * SLICE, number).astype(int):
    begin = text.index(" ", start) + 1
    while not text[begin].isalnum():
      begin += 1
    found.append(text[begin : begin + SLICE])
  return found


def nats(pair: tuple, tokenizer: object, text: str) -> float:
  """Of all of a text, behind the end of a line, which every vocabulary has."""
  ids = tokenizer.encode("\n" + text)
  assert len(tokenizer.encode("\n")) == 1
  row_T = np.zeros(-(-len(ids) // PADDED) * PADDED + 1, np.int32)
  row_T[: len(ids)] = ids
  losses_T = token_losses(*pair, row_T)
  return round(float(losses_T[: len(ids) - 1].sum(dtype=np.float64)), 4)
