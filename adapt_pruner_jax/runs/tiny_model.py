"""The embedded default model: `model.path=tiny`. It needs no network.

A byte-level BPE tokenizer and a small LLaMA, trained on first use on the
reference manual that ships with Python and kept as a HuggingFace directory. It
is trained through `training` and `data`, like any other model.
"""

import dataclasses
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from adapt_pruner_jax.config import Data, Train
from adapt_pruner_jax.data import packing
from adapt_pruner_jax.data.sources import embedded_text
from adapt_pruner_jax.data.tokenizer import Tokenizer, load_tokenizer
from adapt_pruner_jax.distributed import sharding
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.evaluation import perplexity
from adapt_pruner_jax.models import axes, model_config
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.models.rope import Rope
from adapt_pruner_jax.storage import cache, digest, json_files, publish
from adapt_pruner_jax.training import loop, optimizer

FORMAT = 1  # of the cached directory
END = "<|endoftext|>"
MANIFEST = "tiny.json"  # inside the directory: checksums, losses
PROGRESS_SECONDS = 5
ADVICE = (
  "the tiny model is kept there: set ADAPT_PRUNER_CACHE to a directory that "
  "can be written"
)

Progress = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Recipe:
  """Tuned for the lowest held-out loss after 45 seconds on two cores."""

  V: int = 1024
  D: int = 128
  L: int = 6
  K: int = 4
  G: int = 2
  H: int = 16
  F: int = 344
  context: int = 128
  batch: int = 4
  steps: int = 450
  learning_rate: float = 2e-3
  min_learning_rate: float = 4e-5
  weight_decay: float = 0.1
  seed: int = 0


def base_model(
  cache_dir: str | os.PathLike | None = None,
  progress: Progress = print,
  recipe: Recipe = Recipe(),
) -> Path:
  """Path of the tiny model's directory, trained now unless it is cached.

  Args:
    cache_dir: default `$ADAPT_PRUNER_CACHE`, else `~/.cache/adapt_pruner_jax`.
    progress: called with a line of text every few seconds.

  Raises:
    UserError: the cache directory cannot be written.
  """
  folder = Path(cache_dir or cache.home())
  path = folder / f"tiny-{_key(recipe)}"
  if path.exists():
    if is_intact(path):
      return path
    progress(f"tiny: {path} is damaged and is made again")
    shutil.rmtree(path)
  try:
    folder.mkdir(parents=True, exist_ok=True)
    with (
      publish.directory(path, advice=ADVICE) as made,
      tempfile.TemporaryDirectory() as files,
    ):
      _make(made, Path(files), recipe, progress)
  except OSError as error:
    raise publish.unwritable(folder, error, ADVICE) from error
  except UserError:
    if not is_intact(path):  # else another process was faster
      raise
  return path


def is_intact(path: Path) -> bool:
  """Whether all files of a cached directory are there and as written."""
  try:
    files = json_files.read_json(path / MANIFEST)["sha256"]
    return files == _checksums(path)
  except (UserError, OSError, KeyError, TypeError):
    return False


def config_of(recipe: Recipe) -> ModelConfig:
  """The model of a recipe."""
  return ModelConfig(
    family="llama",
    vocab_size=recipe.V,
    hidden_size=recipe.D,
    queries_per_group=recipe.G,
    head_dim=recipe.H,
    kv_groups=(recipe.K,) * recipe.L,
    ffn_widths=(recipe.F,) * recipe.L,
    norm_eps=1e-5,
    rope=Rope(),
    context=recipe.context,
    tied=True,
    bos_id=0,
    eos_ids=(0,),
  )


def fit(
  recipe: Recipe,
  tokenizer: Tokenizer,
  progress: Progress,
  source: str = "embedded",
) -> tuple[ModelConfig, axes.Params]:
  """Trains a model of the recipe's shape on a source, see `sources`."""
  config = config_of(recipe)
  mesh = sharding.one_device()
  settings = Train(
    learning_rate=recipe.learning_rate,
    min_learning_rate=recipe.min_learning_rate,
    weight_decay=recipe.weight_decay,
  )
  schedule = optimizer.schedule(settings, recipe.steps)
  rows = packing.train_data(
    Data(source=source, seq_len=recipe.context, batch=recipe.batch),
    tokenizer,
    recipe.V,
    recipe.seed,
  )
  progress(
    f"training a LLaMA of {model_config.count_params(config):,} parameters on "
    f"{rows.num_tokens:,} tokens of {source}; compiling"
  )
  params = init_params(config, recipe.seed, mesh)
  training, _ = loop.recover(
    loop.start((config, params), settings, schedule, mesh),
    rows.batches(0),
    0,
    recipe.steps,
    mesh,
    log=_reporter(recipe.steps, progress),
  )
  return config, training.trained


def init_params(config: ModelConfig, seed: int, mesh: Mesh) -> axes.Params:
  """N(0, 0.02), less for what writes to the residual stream; norms one.

  Drawn on the host: compiling JAX's generators would take five seconds.
  """
  rng = np.random.default_rng(seed)
  deep = 1 / math.sqrt(2 * config.num_layers)  # GPT-2's scaling

  def draw(name: str, _: int | None, leaf: Any) -> np.ndarray:
    if name.endswith("norm"):
      return np.ones(leaf.shape, np.float32)
    scale = 0.02 * (deep if name in ("o", "down") else 1)
    return rng.normal(0, scale, leaf.shape).astype(np.float32)

  params = axes.map_named(
    draw, model_config.abstract_params(config, jnp.float32)
  )
  return jax.device_put(params, sharding.param_shardings(params, mesh))


def heldout_losses(
  config: ModelConfig,
  params: axes.Params,
  tokenizer: Tokenizer,
  mesh: Mesh,
) -> dict[str, float]:
  """Perplexity and loss on the held-out text, and what frequencies give."""
  heldout = packing.heldout_tokens(
    embedded_text("heldout"), tokenizer, config.vocab_size, "the held-out text"
  )
  found = perplexity.perplexity(
    config, params, heldout, config.context, 8, mesh
  )
  trained = np.array(tokenizer.encode(embedded_text("train")))
  counts = np.bincount(trained, minlength=config.vocab_size) + 1
  unigram = -np.log(counts / counts.sum())[heldout].mean()
  return {
    "perplexity": found[0],
    "loss": found[1] / found[2],
    "unigram_loss": float(unigram),
  }


def train_tokenizer(folder: Path, vocab_size: int, text: str = "") -> Tokenizer:
  """A byte-level BPE of a text, or the embedded one, as HuggingFace files."""
  import tokenizers
  from tokenizers import decoders, models, pre_tokenizers, trainers

  backend = tokenizers.Tokenizer(models.BPE())
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=[END],
    initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    show_progress=False,
  )
  backend.train_from_iterator([text or embedded_text("train")], trainer)
  folder.mkdir(parents=True, exist_ok=True)
  backend.save(str(folder / "tokenizer.json"))
  settings = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": END,
    "eos_token": END,
    "clean_up_tokenization_spaces": False,
  }
  json_files.write_json(folder / "tokenizer_config.json", settings)
  ids = {"bos_token_id": 0, "eos_token_id": 0}
  json_files.write_json(folder / "generation_config.json", ids)
  return load_tokenizer(folder)


def _make(path: Path, files: Path, recipe: Recipe, progress: Progress) -> None:
  """Fills the directory `path`; `files` is for the tokenizer."""
  from adapt_pruner_jax.formats.hf import save

  tokenizer = train_tokenizer(files, recipe.V)
  config, params = fit(
    recipe, tokenizer, lambda text: progress(f"tiny: {text}")
  )
  mesh = sharding.one_device()
  losses = heldout_losses(config, params, tokenizer, mesh)
  progress(
    f"tiny: held-out perplexity {losses['perplexity']:.1f} (loss "
    f"{losses['loss']:.2f}; {losses['unigram_loss']:.2f} by token frequency)"
  )
  save.save(config, params, path, source=files, overwrite=True)
  manifest = {
    "recipe": dataclasses.asdict(recipe),
    "heldout": losses,
    "sha256": _checksums(path),
  }
  json_files.write_json(path / MANIFEST, manifest)


def _reporter(steps: int, progress: Progress) -> Callable:
  """A log function for `loop.recover` with an estimate of the time left."""
  begun = reported = time.monotonic()

  def log(step: int, metrics: dict[str, float]) -> None:
    nonlocal begun, reported
    now = time.monotonic()
    if step == 0:  # compiled by now
      begun = now
    elif now - reported > PROGRESS_SECONDS or step == steps - 1:
      reported = now
      left = (now - begun) / step * (steps - 1 - step)
      progress(
        f"step {step + 1}/{steps}, loss {metrics['loss']:.2f}, "
        f"about {left:.0f} s left"
      )

  return log


def _key(recipe: Recipe) -> str:
  """Names what the directory's contents depend on."""
  import tokenizers

  parts = {
    "format": FORMAT,
    "recipe": dataclasses.asdict(recipe),
    "text": [embedded_text("train"), embedded_text("heldout")],
    "versions": [jax.__version__, tokenizers.__version__],
  }
  return digest.of_bytes(json.dumps(parts).encode())[:12]


def _checksums(path: Path) -> dict[str, str]:
  """SHA-256 of each file but the manifest."""
  return {
    str(file.relative_to(path)): digest.of_file(file)
    for file in sorted(path.rglob("*"))
    if file.is_file()
    and file.name != MANIFEST
    and "__pycache__" not in file.parts
  }
