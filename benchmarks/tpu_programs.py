"""The programs that tpu_compile.py compiles, lowered for abstract arrays."""

import argparse
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.stages import Lowered

from adapt_pruner_jax.config import Config, Train
from adapt_pruner_jax.distributed import placement, sharding
from adapt_pruner_jax.models import axes, flops, layer
from adapt_pruner_jax.models.model_config import (
  ModelConfig,
  layer_names,
  unit_cost,
)
from adapt_pruner_jax.planning import arrays, memory
from adapt_pruner_jax.pruning import (
  least_squares,
  normal_equations,
  streams,
  surgery,
)
from adapt_pruner_jax.training import memory as training_memory
from adapt_pruner_jax.training import stacking, step

TRAINING = ("train", "distill", "lora")
SCORING = ("adapt", "curvature")


class Work(NamedTuple):
  """What is compiled, and what of it is known beforehand.

  Attributes:
    programs: (name, what lowers it, how often it runs) of each.
    held: bytes on a chip beside what a program is given.
    flops: true ones of all chips; None = nothing is claimed.
    facts: more of the row.
  """

  programs: list[tuple[str, Callable[[], Lowered], int]]
  held: float
  flops: float | None
  facts: dict


def work(
  flags: argparse.Namespace, full: ModelConfig, model: ModelConfig, mesh: Mesh
) -> Work:
  """What the flags of tpu_compile.py name.

  Args:
    full, model: before pruning and after.
  """
  if flags.program in TRAINING:
    return training(flags, full, model, mesh)
  made = scoring if flags.program in SCORING else refit
  return made(flags, full, mesh)


def training(
  flags: argparse.Namespace, full: ModelConfig, model: ModelConfig, mesh: Mesh
) -> Work:
  """A train step of runs of layers."""
  settings = Train(
    dtype="bfloat16",
    remat=flags.remat,
    moments=flags.moments,
    scan_layers=flags.scan_layers,
    distill_alpha=0.5 if flags.program == "distill" else 0.0,
    lora_rank=16 if flags.program == "lora" else 0,
  )
  runs = stacking.choose(model, settings, mesh, int(flags.train_tokens))
  shape, tokens = (flags.rows, flags.tokens), flags.rows * flags.tokens
  needed = flops.training_flops(model, flags.tokens) * tokens
  if settings.lora_rank:  # no gradients of the frozen weights
    needed *= 2 / 3
  taught = full if settings.distill_alpha else None
  if taught:  # the teacher's forward
    needed += flops.training_flops(full, flags.tokens) / 3 * tokens
  resolved = training_memory.with_remat(settings, model, taught, shape, mesh)
  facts = {
    "runs": [run._asdict() for run in runs],
    "padding": padding(model, runs),
    "remat": resolved.remat,
  }
  lower = partial(_lower_step, settings, model, full, mesh, runs, shape)
  return Work([("step", lower, 1)], 0, needed, facts)


def _lower_step(settings, model, full, mesh, runs, shape) -> Lowered:
  params = partial(step.abstract_state, settings=settings, mesh=mesh)
  rank, base, teacher = settings.lora_rank, None, None
  half = lambda x: jax.ShapeDtypeStruct(
    x.shape, settings.dtype, sharding=x.sharding
  )
  if rank:
    base = jax.tree.map(half, params(model, rank=0, runs=runs)[0])
  if settings.distill_alpha:
    whole = stacking.choose(full, settings, mesh)
    taught, _ = params(full, rank=0, runs=whole)
    teacher = full, jax.tree.map(half, taught)
  trained, state = params(model, rank=rank, runs=runs)
  batch = step.abstract_batch(*shape, mesh)
  given = model, settings, lambda _: 1.0, mesh
  made = step.make_step(*given, base=base, teacher=teacher, runs=runs)
  return made.lower(trained, state, batch)


def padding(model: ModelConfig, runs: stacking.Runs) -> float:
  """Share of the layers' parameters that only pads."""
  cost = unit_cost(model)
  true = sum(cost[u] * n for u, all_ in model.units().items() for n in all_)
  padded = sum(
    (cost["K"] * run.kv_groups + cost["F"] * run.ffn_width)
    * (run.end - run.first)
    for run in runs
  )
  return padded / true - 1 if runs else 0.0


def _recipe(flags: argparse.Namespace) -> Config:
  config = Config()
  config.model.dtype = "bfloat16"
  config.prune.method = "curvature" if flags.program == "curvature" else "adapt"
  of = config.calibration
  of.samples, of.seq_len, of.batch = flags.windows, flags.tokens, flags.rows
  of.refit_samples = flags.windows
  return config


def scoring(flags: argparse.Namespace, full: ModelConfig, mesh: Mesh) -> Work:
  """The passes of a pruning step, by first order or by curvature."""
  given = _recipe(flags), full, mesh, jnp.dtype("bfloat16")
  walk, end, (M, B, T), _ = memory.lower_scoring(*given)
  passes = -(-flags.windows // (M * B))
  held = arrays.model_bytes(full, jnp.dtype("bfloat16"), mesh)
  programs = [("pass", lambda: walk, passes)]
  if end is not None:
    programs.append(("end", lambda: end, 1))
  facts = {"windows_a_pass": M * B, "passes": passes}
  return Work(programs, held, None, facts)


def refit(flags: argparse.Namespace, full: ModelConfig, mesh: Mesh) -> Work:
  """What a refit of `o` and `down` runs, of each layer and minibatch."""
  config, dtype = _recipe(flags), jnp.dtype("bfloat16")
  parts = memory.refit_held(config, full, mesh)
  held = parts["weights"] + parts["streams"]
  shape = flags.rows, flags.tokens
  programs = _refit_programs(surgery.dense(full), mesh, shape, dtype)
  layers, number = full.num_layers, -(-flags.windows // flags.rows)
  judge = -(-round(flags.windows * streams.HELD_OUT) // flags.rows)
  # Minibatches: of both streams, and of one once more for sums or energies.
  many = {"fed": 3 * number, "written": 3 * number + judge}
  many |= {"sum": number - judge, "energy": 2 * judge}
  times = lambda name: layers * many.get(name.split()[0], 1)
  named = [(name, lower, times(name)) for name, lower in programs.items()]
  return Work(named, held, None, {})


def _refit_programs(config, mesh, shape, dtype) -> dict:
  """Name and what lowers it of each, by what `least_squares.layers` runs."""
  whole, rows = sharding.replicated(mesh), placement.batch_sharding(mesh)
  array = lambda where, dtype, *shape: jax.ShapeDtypeStruct(
    shape, dtype, sharding=where
  )
  number = array(whole, jnp.int32)
  place = layer.Place(number, number)
  sizes = config.sizes(0)
  weights = {
    n: array(whole, dtype, *axes.shape(n, sizes)) for n in layer_names(config)
  }
  masks = {u: array(whole, bool, n[0]) for u, n in config.units().items()}
  x_BTD = array(rows, jnp.float32, *shape, config.hidden_size)
  weight_BT = array(whole, jnp.float32, *shape)
  sums, found = normal_equations, {}
  for writer in (name for name in layer.HALVES if name in weights):
    unit, stream = axes.unit_of(writer), (config, writer, weights, place)
    fed = jax.eval_shape(partial(streams.fed_to, *stream, mesh=mesh), x_BTD)
    fed = array(rows, fed.dtype, *fed.shape)
    task = sums.Task(config, (writer,), mesh)
    parts = sums.Parts(weights, weights, masks, place)
    batch = sums.Batch(x_BTD, x_BTD, weight_BT, fed, given_BTD=x_BTD)
    given = task, parts, batch
    summed = jax.eval_shape(partial(sums.of_minibatch, task), *given[1:])
    placed = jax.tree.map(lambda x: array(rows, x.dtype, *x.shape), summed)
    equations = jax.eval_shape(partial(sums.added_up, mesh=mesh), placed)
    where = NamedSharding(mesh, PartitionSpec(sharding.BATCH))
    equations = jax.tree.map(
      lambda x, where=where: array(where, x.dtype, *x.shape), equations
    )
    old = {writer: weights[writer]}
    ridge = array(whole, jnp.float32)
    found |= {
      f"fed {writer}": partial(streams.fed_to.lower, *stream, x_BTD, mesh=mesh),
      f"written {writer}": partial(
        streams.written.lower, config, unit, weights, x_BTD, fed, mesh=mesh
      ),
      f"sum {writer}": partial(sums.of_minibatch.lower, *given),
      f"added up {writer}": partial(sums.added_up.lower, placed, mesh=mesh),
      f"solve {writer}": partial(
        least_squares.solve.lower, *equations, old, ridge, mesh=mesh
      ),
      f"energy {writer}": partial(sums.energies.lower, *given),
    }
  return found
