"""Mixture of experts: a router sends each token to a few MLPs of many.

Tokens are sorted by expert, so that each expert multiplies just its own rows;
what they make is weighted by the router and added up (Shazeer et al., arXiv
1701.06538). A row is a token at one of its experts, P = tokens * k of them.

A channel that is masked in between is removed, exactly, as in any MLP: each
expert may lose other ones. An expert that is masked is one whose router logit
is minus infinity, which is what the model without it computes.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jax.custom_batching import sequential_vmap
from jax.sharding import Mesh, PartitionSpec

from adapt_pruner_jax.models.arithmetic import ACTIVATIONS, as_multiplied
from adapt_pruner_jax.models.axes import BATCH, Params
from adapt_pruner_jax.models.model_config import ModelConfig

MOST_ROWS = 128  # of a block of one expert, on a CPU
ROWS = PartitionSpec(BATCH)


class Load(NamedTuple):
  """How a router's choices are spread, summed over tokens (and layers).

  Attributes:
    chosen_X: tokens that each expert got.
    share_X: the router's probabilities.
    tokens: how many, in every layer.
  """

  chosen_X: jax.Array
  share_X: jax.Array
  tokens: jax.Array


@flax.struct.dataclass
class Routed:
  """What the experts have made of their tokens, sorted by expert.

  Where rows are cut over devices, each has sorted its own: numbers of tokens
  are its own then, and there are as many `sizes_X` as devices.

  Attributes:
    made_PF: activations of each row's channels.
    weight_P: the router's, of each row.
    expert_P: whose row it is, rising.
    token_P: which token it is.
    sizes_X: rows of each expert.
    probabilities_TX: of all experts, float32, tokens flat.
    mesh: devices that rows are cut over; None = they are not.
  """

  made_PF: jax.Array
  weight_P: jax.Array
  expert_P: jax.Array
  token_P: jax.Array
  sizes_X: jax.Array
  probabilities_TX: jax.Array
  mesh: Mesh | None = flax.struct.field(pytree_node=False, default=None)


def read(
  config: ModelConfig,
  weights: Params,
  h_BTD: jax.Array,
  mesh: Mesh | None = None,
) -> Routed:
  """Sends tokens to their experts and computes these up to their channels.

  Args:
    config: of the model; `experts_per_token` and `router_norm` count.
    weights: of the layer.
    h_BTD: the normed stream in front of the MLP.
    mesh: devices that rows are to be cut over; None = they are as they are.
  """
  mesh = mesh if mesh is not None and _divides(mesh, len(h_BTD)) else None
  weights = {n: weights[n] for n in ("router", "moe_gate", "moe_up")}
  run = partial(_read, config)
  if mesh is not None:
    channels = _channels(mesh, weights["moe_up"].shape[-1])
    matrix = PartitionSpec(None, None, channels)
    cut = {"router": PartitionSpec(), "moe_gate": matrix, "moe_up": matrix}
    made = (PartitionSpec(BATCH, channels), *(ROWS,) * 5)
    run = _alone(run, mesh, (cut, ROWS), made)
  return Routed(*run(weights, h_BTD), mesh=mesh)


def _read(config, weights, h_BTD):
  h_TD = h_BTD.reshape(-1, h_BTD.shape[-1])
  weight_Tk, expert_Tk, probabilities_TX = route(config, weights, h_TD)
  flat = expert_Tk.reshape(-1)
  order = jnp.argsort(flat, stable=True)
  token_P = order // config.experts_per_token
  sizes_X = jnp.bincount(flat, length=config.experts).astype(jnp.int32)
  rows_PD = h_TD[token_P]
  up_PF = grouped(rows_PD, weights["moe_up"], sizes_X)
  gate_PF = grouped(rows_PD, weights["moe_gate"], sizes_X)
  made_PF = ACTIVATIONS[config.activation](gate_PF) * up_PF
  rows = weight_Tk.reshape(-1)[order], flat[order], token_P
  return made_PF, *rows, sizes_X, probabilities_TX


def route(
  config: ModelConfig, weights: Params, h_TD: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Which experts each token goes to.

  Args:
    config, weights: as of `read`.
    h_TD: tokens.

  Returns:
    Weights [T, k], experts [T, k], and float32 probabilities of all [T, X].
  """
  logits_TX = jnp.einsum("td,dx->tx", h_TD, weights["router"])
  logits_TX = logits_TX.astype(jnp.float32)
  probabilities_TX = jax.nn.softmax(logits_TX, axis=-1)
  top_Tk, expert_Tk = jax.lax.top_k(logits_TX, config.experts_per_token)
  if config.router_norm:
    weight_Tk = jax.nn.softmax(top_Tk, axis=-1)
  else:
    weight_Tk = jnp.take_along_axis(probabilities_TX, expert_Tk, axis=-1)
  return weight_Tk.astype(h_TD.dtype), expert_Tk, probabilities_TX


def masked(routed: Routed, mask_XF: jax.Array) -> Routed:
  """Without the channels that a mask (or numbers in its place) leaves out."""
  mask_PF = mask_XF[routed.expert_P].astype(routed.made_PF.dtype)
  return routed.replace(made_PF=routed.made_PF * mask_PF)


def write(routed: Routed, down_XFE: jax.Array) -> jax.Array:
  """What the experts say together, [tokens, E].

  Args:
    routed: from `read`, masked or not.
    down_XFE: their output matrices.
  """
  if routed.mesh is None:
    return _write(routed, down_XFE)
  mesh = routed.mesh
  channels = _channels(mesh, down_XFE.shape[1])
  cut = jax.tree.map(lambda _: ROWS, routed)
  cut = cut.replace(made_PF=PartitionSpec(BATCH, channels))

  def run(routed, down_XFE):
    y_TE = _write(routed, down_XFE)
    return jax.lax.psum(y_TE, channels) if channels else y_TE

  cuts = cut, PartitionSpec(None, channels)
  return _alone(run, mesh, cuts, ROWS)(routed, down_XFE)


def _write(routed, down_XFE):
  said_PE = said(routed, down_XFE) * routed.weight_P[:, None]
  shape = len(routed.probabilities_TX), said_PE.shape[-1]
  return jnp.zeros(shape, said_PE.dtype).at[routed.token_P].add(said_PE)


def said(routed: Routed, down_XFE: jax.Array) -> jax.Array:
  """What each row's expert says, before the router's weight, [P, E].

  Args:
    routed: of one device.
    down_XFE: the output matrices.
  """
  return grouped(routed.made_PF, down_XFE, routed.sizes_X)


# ---- Balance -----------------------------------------------------------------


def load(routed: Routed | None, counts_T: jax.Array | None) -> Load | None:
  """How the tokens of a layer are spread over the experts.

  Args:
    routed: from `read`; anything else = the layer has no experts.
    counts_T: 1 for tokens that count, 0 for padding; None = nobody asks.
  """
  if counts_T is None or not isinstance(routed, Routed):
    return None
  if routed.mesh is None:
    return _load(routed, counts_T.reshape(-1))

  def run(routed, counts_T):
    return jax.lax.psum(_load(routed, counts_T), BATCH)

  cuts = jax.tree.map(lambda _: ROWS, routed), ROWS
  run = _alone(run, routed.mesh, cuts, PartitionSpec())
  return run(routed.replace(made_PF=routed.weight_P), counts_T.reshape(-1))


def _load(routed, counts_T):
  counts_T = jnp.asarray(counts_T, jnp.float32)
  counts_P = counts_T[routed.token_P]
  chosen_X = jnp.zeros(len(routed.sizes_X)).at[routed.expert_P].add(counts_P)
  share_X = counts_T @ routed.probabilities_TX
  return Load(chosen_X, share_X, jnp.sum(counts_T))


def add(one: Load | None, two: Load | None) -> Load | None:
  """Of two layers together; None = without experts."""
  if one is None or two is None:
    return one or two
  return jax.tree.map(jnp.add, one, two)


def balance_loss(load: Load) -> jax.Array:
  """The auxiliary loss that is lowest, k, where all experts get as much.

  X * sum over experts of (share of tokens that chose it) * (mean probability):
  equations (4) to (6) of the Switch Transformer (arXiv 2101.03961) over the
  tokens of all layers, as in Transformers.

  Args:
    load: summed over layers.
  """
  tokens = jnp.maximum(load.tokens, 1)
  both = jnp.sum(load.chosen_X / tokens * load.share_X / tokens)
  return len(load.chosen_X) * both


# ---- Rows over devices -------------------------------------------------------


def _alone(fn: Callable, mesh: Mesh, cuts: Any, made: Any) -> Callable:
  """`fn` on each device with its rows, so that none sorts those of others."""
  return jax.shard_map(
    fn, mesh=mesh, in_specs=cuts, out_specs=made, check_vma=False
  )


def _divides(mesh: Mesh, rows: int) -> bool:
  """Whether there is more than one device, and rows can be dealt out."""
  return mesh.size > 1 and rows % math.prod(mesh.shape[a] for a in BATCH) == 0


def _channels(mesh: Mesh, width: int) -> str | None:
  """The mesh axis that channels are cut over."""
  size = mesh.shape["tensor"]
  return "tensor" if size > 1 and width % size == 0 else None


# ---- Products by group -------------------------------------------------------


@jax.custom_vjp
def grouped(x_PI: jax.Array, w_XIO: jax.Array, sizes_X: jax.Array) -> jax.Array:
  """Each row times the matrix of its group, [P, O].

  Args:
    x_PI: rows, those of a group next to each other.
    w_XIO: a matrix a group; a float32 one is multiplied in the dtype of the
      rows, and its gradient is summed in float32, as by `arithmetic.project`.
    sizes_X: int32, rows of each group; they add up to P.
  """
  return _product(x_PI, as_multiplied(w_XIO, x_PI), sizes_X)


def _grouped_forward(x_PI, w_XIO, sizes_X):
  return grouped(x_PI, w_XIO, sizes_X), (x_PI, w_XIO, sizes_X)


def _grouped_backward(saved, dy_PO):
  x_PI, w_XIO, sizes_X = saved
  used_XIO, dy_PO = as_multiplied(w_XIO, x_PI), dy_PO.astype(x_PI.dtype)
  dx_PI = _product(dy_PO, used_XIO.swapaxes(1, 2), sizes_X)
  if used_XIO is not w_XIO:
    x_PI, dy_PO = x_PI.astype(w_XIO.dtype), dy_PO.astype(w_XIO.dtype)
  dw_XIO = _outer(x_PI, dy_PO, sizes_X)
  return dx_PI, dw_XIO.astype(w_XIO.dtype), None


grouped.defvjp(_grouped_forward, _grouped_backward)


@sequential_vmap  # `ragged_dot` has no rule for rows in batches
def _product(x_PI, w_XIO, sizes_X):
  return jax.lax.platform_dependent(
    x_PI, w_XIO, sizes_X, cpu=_product_of_blocks, default=jax.lax.ragged_dot
  )


@sequential_vmap
def _outer(x_PI, dy_PO, sizes_X):
  """The sum over a group's rows of x times dy, [X, I, O]."""
  return jax.lax.platform_dependent(
    x_PI, dy_PO, sizes_X, cpu=_outer_of_blocks, default=_ragged_outer
  )


_OVER_ROWS = jax.lax.RaggedDotDimensionNumbers(
  dot_dimension_numbers=(((0,), (0,)), ((), ())),
  lhs_ragged_dimensions=[0],
  rhs_group_dimensions=[],
)
_ragged_outer = partial(
  jax.lax.ragged_dot_general, ragged_dot_dimension_numbers=_OVER_ROWS
)


def _product_of_blocks(x_PI, w_XIO, sizes_X):
  """On a CPU, where XLA would multiply each row with all matrices."""
  at_NR, group_N = _blocks(len(x_PI), sizes_X)
  x_NRI = x_PI.at[at_NR].get(mode="fill", fill_value=0)
  y_NRO = jax.lax.map(lambda b: b[0] @ w_XIO[b[1]], (x_NRI, group_N))
  y_PO = jnp.zeros((len(x_PI), w_XIO.shape[2]), y_NRO.dtype)
  return y_PO.at[at_NR].set(y_NRO, mode="drop")


def _outer_of_blocks(x_PI, dy_PO, sizes_X):
  at_NR, group_N = _blocks(len(x_PI), sizes_X)
  x_NRI, dy_NRO = (
    a.at[at_NR].get(mode="fill", fill_value=0) for a in (x_PI, dy_PO)
  )

  def add(dw_XIO, block):
    x_RI, dy_RO, group = block
    return dw_XIO.at[group].add(x_RI.T @ dy_RO), None

  zeros = jnp.zeros((len(sizes_X), x_PI.shape[1], dy_PO.shape[1]), x_PI.dtype)
  return jax.lax.scan(add, zeros, (x_NRI, dy_NRO, group_N))[0]


def _blocks(rows: int, sizes_X: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Blocks of R rows of one group each, as many as there can be at most.

  Returns:
    Each block's rows [N, R], beyond the last where it has fewer; its group [N].
  """
  groups = len(sizes_X)
  R = min(MOST_ROWS, max(8, rows // groups))
  N = rows // R + min(groups, rows)
  last_X = jnp.cumsum(-(-sizes_X // R))  # block behind each group's
  group_N = jnp.searchsorted(last_X, jnp.arange(N), side="right")
  group_N = jnp.minimum(group_N, groups - 1)
  end_X = jnp.cumsum(sizes_X)
  first_N = last_X[group_N] - -(-sizes_X[group_N] // R)
  start_N = end_X[group_N] - sizes_X[group_N]
  start_N += (jnp.arange(N) - first_N) * R
  at_NR = start_N[:, None] + jnp.arange(R)
  return jnp.where(at_NR < end_X[group_N][:, None], at_NR, rows), group_N
