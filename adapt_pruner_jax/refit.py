"""Refit: what is left of a layer learns to stand in for what was removed.

From the embedding on, two residual streams pass the layers in float32: z of
the dense model and u of the pruned one. At each matrix W that writes to the
stream (`o`, then `down`), with x its input in the pruned model, ridge least
squares makes u land on z:

  W <- argmin  sum over tokens |u + x W - z|^2  +  ridge |W - W_now|^2

The target holds the error that earlier layers have left, so each layer corrects
those before it. No parameter is added. `refit_all` also refits the matrices
that read the stream, to what the dense model computes in their place.

One layer and one Gram matrix exist at a time, in dense coordinates, so that one
executable serves all layers: removed units have zero weights, hence inputs of
zero, and stay zero.

In large models a few channels and tokens are a thousand times larger than the
rest. The ridge is therefore a multiple of the median channel's energy, the
equations are scaled to a unit diagonal, and a token counts for no more than
`CAP` typical ones.
"""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from adapt_pruner_jax import axes, model, prune, sharding
from adapt_pruner_jax.axes import Params
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.model import Block, Decoder, ModelConfig

# The matrix that each half layer writes with, and those that it reads with.
HALVES = {"o": ("q", "k", "v"), "down": ("gate", "up")}
HELD_OUT = 0.1  # share of the sequences that judge a refit
CAP = 10.0  # most that a token's input energy counts, in medians
ENOUGH = 20  # tokens per input channel from which a weak ridge is best
WEAK, STRONG = 0.1, 1.0  # ridges with enough tokens, and with fewer

Stream = list[jax.Array]  # minibatches [B, T, D], float32
Place = tuple[np.ndarray, np.ndarray]  # attention window, which rope


def refit(
  dense: tuple[ModelConfig, Params],
  pruned: tuple[ModelConfig, Params],
  kept: prune.Kept,
  tokens_NT: np.ndarray,
  batch: int,
  *,
  ridge: float = 0.0,
  refit_all: bool = False,
  mesh: Mesh | None = None,
) -> tuple[Params, list[dict]]:
  """Refits a pruned model to the one that it was cut from.

  Args:
    dense: the model before pruning.
    pruned: the model after it, by any method that keeps the residual width.
    kept: the units of `dense` that are left, in its numbering
      (`prune.relative_to` translates).
    tokens_NT: calibration tokens; the last tenth of the rows is held out.
    batch: sequences at a time.
    ridge: in units of the median energy of a matrix's input channels; 0 =
      WEAK where there are ENOUGH tokens for each channel, else STRONG.
    refit_all: refit q, k, v, gate and up too.
    mesh: devices that the batch is cut over; default one.

  Returns:
    The new params, and a record for each matrix: {"layer", "matrix", "ridge",
    "before", "after", "refitted"}, with the held-out residual relative to the
    target, before and after. A matrix keeps its old weights where the residual
    would not fall.

  Raises:
    UserError: fewer than two rows, or a model that cannot be refitted.
  """
  (dense_config, dense_params), (config, params) = dense, pruned
  mesh = mesh or sharding.make_mesh(devices=jax.local_devices()[:1])
  check(config)
  wide_dense = prune.dense(dense_config)
  wide = dataclasses.replace(config, **wide_dense.units())
  all_masks = prune.to_masks(kept, dense_config)
  everything = prune.everything(dense_config)

  def widen(params: Params, i: int, units: prune.Kept, like: ModelConfig):
    at = {u: units[u][i] for u in axes.UNITS}
    dtype = np.zeros(0, params["embedding"].dtype)
    return prune.transform(
      lambda p: prune.widen(p, at, like, dtype),
      params[axes.layer_name(i)],
      mesh,
    )

  def layer_at(i: int):
    masks = {u: m[i] for u, m in all_masks.items()}
    return (
      widen(dense_params, i, everything, wide_dense),
      widen(params, i, kept, wide),
      masks,
    )

  outer = {n: dense_params[n] for n in model.outer_names(dense_config)}
  new, records = dict(params), []
  for i, changed, found in layers(
    wide_dense, wide, outer, layer_at, tokens_NT, batch, ridge, refit_all, mesh
  ):
    at = {u: kept[u][i] for u in axes.UNITS}
    changed = prune.transform(
      lambda tree, at=at: {n: axes.take(n, w, at) for n, w in tree.items()},
      changed,
      mesh,
    )
    new[axes.layer_name(i)] = params[axes.layer_name(i)] | changed
    records += found
  return new, records


def check(config: ModelConfig) -> None:
  """Raises a UserError for a model whose matrices cannot be refitted."""
  why = ""
  if config.norm_order != "pre" or config.qk_norm == "all":
    why = (
      f"the family {config.family} norms what its matrices write, which "
      "least squares does not see"
    )
  elif config.residual:
    why = "SliceGPT changes the residual width"
  if why:
    raise UserError(
      f"this model cannot be refitted: {why}; use --config.prune.refit=none "
      "and another --config.prune.method than curvature"
    )


def layers(
  dense_config: ModelConfig,
  config: ModelConfig,
  outer: Params,
  layer_at: Callable[[int], tuple[Params, Params, dict[str, np.ndarray]]],
  tokens_NT: np.ndarray,
  batch: int,
  ridge: float,
  refit_all: bool,
  mesh: Mesh,
) -> Iterator[tuple[int, Params, list[dict]]]:
  """Refits layer by layer, in dense coordinates.

  Args:
    dense_config, config: of the two models, equal layers.
    outer: parameters outside the layers.
    layer_at: gives of layer i the dense weights, the pruned ones, zero where
      units are removed, and the masks {"K": bool [K], "F": bool [F]}.

  Yields:
    i, the matrices that changed, and the records of the layer.
  """
  z, fit, held = _start(dense_config, outer, tokens_NT, batch, mesh)
  u = z
  tokens = int(sum(float(jnp.sum(w)) for w in fit))
  windows = config.window or (0,) * config.L
  for i in range(config.L):
    dense_layer, layer, masks = layer_at(i)
    place = np.int32(windows[i]), np.int32(config.rope_ids()[i])
    masks = prune.replicate(masks, mesh)
    live = {u_: int(m.sum()) for u_, m in masks.items()}
    channels = {"o": live["K"] * config.G * config.H, "down": live["F"]}
    if u is z and _same(dense_layer, layer):
      # Nothing was removed so far: the streams are still the same one.
      for writer in HALVES:
        z = u = _advance(dense_config, writer, dense_layer, place, z, mesh)
      yield i, {}, []
      continue
    changed, records = {}, []
    for writer, readers in HALVES.items():
      jobs = [((writer,), channels[writer])]
      if refit_all:
        jobs.insert(0, (readers, config.D))
      for names, width in jobs:
        if names == (writer,):
          z = _advance(dense_config, writer, dense_layer, place, z, mesh)
        if not channels[writer]:
          continue
        strength = ridge or (WEAK if tokens >= ENOUGH * width else STRONG)
        problem = _Problem(config, names, dense_layer, masks, place, mesh)
        new, found = problem.solve(layer, z, u, fit, held, strength)
        layer, changed = layer | new, changed | new
        records += [{"layer": i, "ridge": strength} | r for r in found]
      u = _advance(config, writer, layer, place, u, mesh)
    yield i, changed, records


@dataclasses.dataclass(frozen=True, eq=False)
class _Problem:
  """Least squares for matrices of a layer that have the same input."""

  config: ModelConfig
  names: tuple[str, ...]
  dense_layer: Params
  masks: dict[str, jax.Array]
  place: Place
  mesh: Mesh

  def solve(
    self,
    layer: Params,
    z: Stream,
    u: Stream,
    fit: list,
    held: list,
    ridge: float,
  ) -> tuple[Params, list[dict]]:
    """The matrices that got better, and a record for each.

    Args:
      z: dense stream: in front of the half for matrices that read it, behind
        it for those that write to it.
      u: pruned stream, in front of the half.
      fit, held: which tokens count for what, float32 [B, T] each.
    """
    total = None
    for z_BTD, u_BTD, fit_BT in zip(z, u, fit, strict=True):
      found = self._call(_normal_equations, layer, z_BTD, u_BTD, fit_BT)
      total = found if total is None else _plus(total, found)
    old = {n: layer[n] for n in self.names}
    new = _solve(*total, old, np.float32(ridge))
    before = self._residual(layer, z, u, held)
    after = self._residual(layer | new, z, u, held)
    records, better = [], {}
    for n in self.names:
      # Written so that NaN, from equations too singular to solve, loses.
      if after[n] < before[n]:
        better[n] = new[n]
      record = {"matrix": n, "before": before[n], "after": after[n]}
      records.append(record | {"refitted": n in better})
    return better, records

  def _residual(self, layer, z, u, held) -> dict[str, float]:
    """Root of the held-out residual's energy over the target's."""
    total = None
    for z_BTD, u_BTD, held_BT in zip(z, u, held, strict=True):
      if held_BT is not None:
        found = self._call(_energies, layer, z_BTD, u_BTD, held_BT)
        total = found if total is None else _plus(total, found)
    total = jax.device_get(total)
    return {n: float(np.sqrt(r / max(y, 1e-30))) for n, (r, y) in total.items()}

  def _call(self, fn, layer, z_BTD, u_BTD, weight_BT):
    return fn(
      self.config,
      self.names,
      {n: self.dense_layer[n] for n in self.dense_layer},
      layer,
      self.masks,
      self.place,
      z_BTD,
      u_BTD,
      weight_BT,
      mesh=self.mesh,
    )


# ---- A half layer in two steps -----------------------------------------------


def fed(
  config: ModelConfig, name: str, layer: Params, place: Place, x_BTD: jax.Array
) -> jax.Array:
  """What matrix `name` of a layer multiplies, [B, T, C], in its dtype.

  Args:
    config: pre-norm, equal layers.
    place: the layer's window and rope; may be traced.
    x_BTD: the residual stream in front of the half.
  """
  B, T, _ = x_BTD.shape
  x_BTD = x_BTD.astype(layer[name].dtype)
  block = Block(config, config.K[0], config.F[0])
  call = partial(block.apply, {"params": layer})
  if name in axes.SCORED["K"] and name != "o":
    norm = layer["attn_norm"]
    return model.rms_norm(x_BTD, norm, config.norm_eps, config.norm_offset)
  if name in ("gate", "up"):
    norm = layer["mlp_norm"]
    return model.rms_norm(x_BTD, norm, config.norm_eps, config.norm_offset)
  if name == "down":
    return call(x_BTD, method=Block.hidden)
  window, rope_id = place
  rows_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
  seen = None
  if any(config.window):
    seen = model.attention_mask(rows_BT, None, window)
  tables = model.rope_tables(config, rows_BT)
  rope = jax.tree.map(lambda *t: jnp.stack(t)[rope_id], *tables)
  qkv = call(x_BTD, rope, method=Block.qkv)
  return call(*qkv, seen, method=Block.attend).reshape(B, T, -1)


def add(
  config: ModelConfig,
  name: str,
  layer: Params,
  x_BTD: jax.Array,
  y_BTC: jax.Array,
) -> jax.Array:
  """The stream x behind a half whose matrix `o` or `down` multiplies y."""
  block = Block(config, config.K[0], config.F[0])
  method = Block.add_mlp
  if name == "o":
    y_BTC = y_BTC.reshape(*x_BTD.shape[:2], config.K[0], config.G, config.H)
    method = Block.add_attention
  return block.apply({"params": layer}, x_BTD, y_BTC, method=method)


def as_matrix(name: str, weight: jax.Array) -> jax.Array:
  """Weight as [inputs, outputs]."""
  reads = axes.AXES[name][0] in axes.RESIDUAL
  cut = 1 if reads else weight.ndim - 1
  inputs = int(np.prod(weight.shape[:cut]))
  return weight.reshape(inputs, -1)


def product(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
  """An einsum to float32, at full precision."""
  return jnp.einsum(
    equation,
    x,
    y,
    precision=jax.lax.Precision.HIGHEST,
    preferred_element_type=jnp.float32,
  )


# ---- On the devices ----------------------------------------------------------


def _start(config, outer, tokens_NT, batch, mesh):
  """The stream in front of the layers, and the tokens to fit and hold out."""
  N = len(tokens_NT)
  if N < 2:
    raise UserError(
      f"a refit needs at least 2 calibration sequences, not {N}: one to fit "
      "and one to judge; raise --config.calibration.refit_samples"
    )
  held_rows = max(1, round(N * HELD_OUT))
  tokens_MBT, valid_MB = prune.minibatches(tokens_NT, batch, mesh)
  valid_MB = np.asarray(valid_MB)
  number_MB = valid_MB.ravel().cumsum().reshape(valid_MB.shape)
  stream, fit, held = [], [], []
  for m, valid_B in enumerate(valid_MB):
    stream.append(_embed(config, outer, tokens_MBT[m], mesh=mesh))
    out_B = number_MB[m] > N - held_rows

    def weights(row_B):
      spread = np.repeat(row_B[:, None], tokens_NT.shape[1], axis=1)
      return prune.replicate(spread.astype(np.float32), mesh)

    fit.append(weights(valid_B & ~out_B))
    held.append(weights(valid_B & out_B) if (valid_B & out_B).any() else None)
  return stream, fit, held


def _cut(x: jax.Array, mesh: Mesh) -> jax.Array:
  """Rows over the devices."""
  where = NamedSharding(mesh, PartitionSpec(sharding.BATCH))
  return jax.lax.with_sharding_constraint(x, where)


@partial(jax.jit, static_argnames=("config", "mesh"))
def _embed(config, outer, tokens_BT, *, mesh):
  # As in train: a whole table keeps the stream cut by rows.
  whole = sharding.replicated(mesh)
  table = jax.lax.with_sharding_constraint(outer["embedding"], whole)
  variables = {"params": outer | {"embedding": table}}
  x_BTD = Decoder(config).apply(variables, tokens_BT, method=Decoder.embed)
  return _cut(x_BTD.astype(jnp.float32), mesh)


def _advance(config, writer, layer, place, stream, mesh) -> Stream:
  """The stream behind a half."""
  return [_half(config, writer, layer, place, x, mesh=mesh) for x in stream]


@partial(jax.jit, static_argnames=("config", "writer", "mesh"))
def _half(config, writer, layer, place, x_BTD, *, mesh):
  y_BTC = fed(config, writer, layer, place, x_BTD)
  return _cut(add(config, writer, layer, x_BTD, y_BTC), mesh)


def _lacking(config, names, dense_layer, layer, masks, place, z_BTD, u_BTD):
  """What the matrices are fed, and {name: (residual, target)}, [B, T, ...]."""
  fed_BTC = fed(config, names[0], layer, place, u_BTD)
  if names[0] in HALVES:
    given_BTD = add(config, names[0], layer, u_BTD, fed_BTC)
    scale = config.residual_scale
    residual, target = (z_BTD - given_BTD) / scale, (z_BTD - u_BTD) / scale
    return fed_BTC, {names[0]: (residual, target)}
  dense_BTD = fed(config, names[0], dense_layer, place, z_BTD)
  found = {}
  for n in names:
    dense_weight = as_matrix(n, axes.mask(n, dense_layer[n], masks))
    target = product("btd,de->bte", dense_BTD, dense_weight)
    given = product("btd,de->bte", fed_BTC, as_matrix(n, layer[n]))
    found[n] = target - given, target
  return fed_BTC, found


def _token_weights(fed_BTC: jax.Array, weight_BT: jax.Array) -> jax.Array:
  """Weights that let no token's energy exceed CAP medians."""
  energy_BT = jnp.sum(jnp.square(fed_BTC.astype(jnp.float32)), axis=-1)
  most = CAP * jnp.median(energy_BT)
  return weight_BT * jnp.minimum(1, most / jnp.maximum(energy_BT, 1e-30))


@partial(jax.jit, static_argnames=("config", "names", "mesh"))
def _normal_equations(
  config,
  names,
  dense_layer,
  layer,
  masks,
  place,
  z_BTD,
  u_BTD,
  weight_BT,
  *,
  mesh,
):
  """Gram matrix [C, C] of the input, {name: [C, outputs]} with the residual."""
  fed_BTC, found = _lacking(
    config, names, dense_layer, layer, masks, place, z_BTD, u_BTD
  )
  weight_BT = _token_weights(fed_BTC, weight_BT)
  fed_BTC = fed_BTC.astype(jnp.float32)
  weighted_BTC = fed_BTC * weight_BT[..., None]
  gram = product("btc,bte->ce", weighted_BTC, fed_BTC)
  moments = {
    n: product("btc,bte->ce", weighted_BTC, residual)
    for n, (residual, _) in found.items()
  }
  whole = sharding.replicated(mesh)
  return jax.lax.with_sharding_constraint((gram, moments), whole)


@partial(jax.jit, static_argnames=("config", "names", "mesh"))
def _energies(
  config,
  names,
  dense_layer,
  layer,
  masks,
  place,
  z_BTD,
  u_BTD,
  weight_BT,
  *,
  mesh,
):
  """{name: energies (of the residual, of the target)}."""
  fed_BTC, found = _lacking(
    config, names, dense_layer, layer, masks, place, z_BTD, u_BTD
  )
  weight_BT = _token_weights(fed_BTC, weight_BT)
  energy = lambda y: jnp.sum(weight_BT[..., None] * jnp.square(y))
  total = jax.tree.map(energy, found)
  return jax.lax.with_sharding_constraint(total, sharding.replicated(mesh))


def factor(gram_CC: jax.Array, ridge: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Cholesky factor of a Gram matrix with its ridge, scaled: (L, scale_C).

  (gram + ridge * median diagonal * I) = diag(scale) L L^T diag(scale). Channels
  that are always zero do not count in the median, and get a unit diagonal.
  """
  diagonal_C = jnp.diagonal(gram_CC)
  live_C = diagonal_C > 0
  median = jnp.nanmedian(jnp.where(live_C, diagonal_C, jnp.nan))
  scale_C = jnp.where(live_C, jnp.sqrt(diagonal_C + ridge * median), 1)
  scaled_CC = gram_CC / scale_C[:, None] / scale_C[None]
  scaled_CC = jnp.fill_diagonal(scaled_CC, 1.0, inplace=False)
  return jnp.linalg.cholesky(scaled_CC), scale_C


@jax.jit
def _solve(gram_CC, moments, weights, ridge):
  """Weights whose change solves the normal equations, in their dtype."""
  lower_CC, scale_C = factor(gram_CC, ridge)
  new = {}
  for n, weight in weights.items():
    change = jax.scipy.linalg.cho_solve(
      (lower_CC, True), moments[n] / scale_C[:, None]
    )
    change = (change / scale_C[:, None]).reshape(weight.shape)
    new[n] = (weight.astype(jnp.float32) + change).astype(weight.dtype)
  return new


@jax.jit
def _plus(total, found):
  return jax.tree.map(jnp.add, total, found)


def _same(dense_layer: Params, layer: Params) -> bool:
  return dense_layer.keys() == layer.keys() and bool(_equal(dense_layer, layer))


@jax.jit
def _equal(dense_layer, layer):
  equal = jax.tree.map(lambda x, y: jnp.all(x == y), dense_layer, layer)
  return jnp.all(jnp.stack(jax.tree.leaves(equal)))
