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
from jax.sharding import Mesh, PartitionSpec

from adapt_pruner_jax.models import deal, exchange, grouped
from adapt_pruner_jax.models.arithmetic import ACTIVATIONS, project, rms_norm
from adapt_pruner_jax.models.axes import BATCH, Params
from adapt_pruner_jax.models.heads import norm
from adapt_pruner_jax.models.model_config import ModelConfig

ROWS = PartitionSpec(BATCH)
# Parameters that are read, and how many dims of them come before channels.
READ = {
  "router": None,
  "router_bias": None,
  "router_scale": None,
  "expert_scale": None,
  "moe_norm": None,
  "moe_gate": 2,
  "moe_up": 2,
  "moe_gate_bias": 1,
  "moe_up_bias": 1,
}


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
  are its own then, and there are as many `sizes_X` as devices. Where experts
  are cut too, `made_PF`, `expert_P` and `sizes_X` are of rows that came to a
  device's experts, the others of those that it has sent.

  Attributes:
    made_PF: activations of each row's channels.
    weight_P: the router's, of each row.
    expert_P: whose row it is, rising.
    token_P: which token it is.
    row_Tk: the rows of each token.
    sizes_X: rows of each expert.
    probabilities_TX: of all experts, float32, tokens flat.
    chosen_P: to which expert each row goes; `expert_P` if none is sent.
    sent: how rows come back; None = none is sent.
    beside_TE: what an expert that all tokens see says of each, if there is one.
    mesh: devices that rows are cut over; None = they are not.
  """

  made_PF: jax.Array
  weight_P: jax.Array
  expert_P: jax.Array
  token_P: jax.Array
  row_Tk: jax.Array
  sizes_X: jax.Array
  probabilities_TX: jax.Array
  chosen_P: jax.Array
  sent: exchange.Sent | None = None
  beside_TE: jax.Array | None = None
  mesh: Mesh | None = flax.struct.field(pytree_node=False, default=None)


class Shared(NamedTuple):
  """What an expert that all tokens see says, where the others are gone."""

  said_TE: jax.Array


def normed(config: ModelConfig, weights: Params, x_BTD: jax.Array) -> jax.Array:
  """The stream as `read` takes it; weights of `expert_norms` come later."""
  if not config.expert_norms:
    return norm(config, weights, "mlp_norm", x_BTD)
  return rms_norm(x_BTD, jnp.ones((), x_BTD.dtype), config.norm_eps)


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
    h_BTD: the stream in front of the MLP, `normed`.
    mesh: devices that rows are to be cut over, and experts; None = they are
      as they are.
  """
  mesh = mesh if mesh is not None and _divides(mesh, len(h_BTD)) else None
  beside_TE = shared(config, weights, h_BTD)
  weights = {n: weights[n] for n in READ if n in weights}
  run = partial(_read, config, _parts(mesh))
  if mesh is not None:
    channels = _channels(mesh, weights["moe_up"].shape[-1])
    cut = {n: _cut(n, mesh, channels) for n in weights}
    made = Routed(PartitionSpec(BATCH, channels), *(ROWS,) * 7)
    if _parts(mesh) > 1:
      made = made.replace(sent=exchange.Sent(*(ROWS,) * 3))
    run = _alone(run, mesh, (cut, ROWS), made)
  return run(weights, h_BTD).replace(mesh=mesh, beside_TE=beside_TE)


def shared(
  config: ModelConfig, weights: Params, h_BTD: jax.Array
) -> jax.Array | None:
  """What the expert says that all tokens see, [tokens, E]; None = no such.

  Args:
    config, weights, h_BTD: as of `read`.
  """
  if not config.shared_width:
    return None
  h_TD = h_BTD.reshape(-1, h_BTD.shape[-1])
  if config.expert_norms:
    h_TD *= weights["mlp_norm"]
  up_TS = project("td,ds->ts", h_TD, weights["shared_up"])
  gate_TS = project("td,ds->ts", h_TD, weights["shared_gate"])
  made_TS = ACTIVATIONS[config.activation](gate_TS) * up_TS
  said_TE = project("ts,se->te", made_TS, weights["shared_down"])
  if config.expert_norms:
    return norm(config, weights, "shared_post_norm", said_TE)
  open_T1 = project("td,do->to", h_TD, weights["shared_open"])
  return jax.nn.sigmoid(open_T1) * said_TE


def _read(config, parts, weights, h_BTD):
  h_TD = h_BTD.reshape(-1, h_BTD.shape[-1])
  weight_Tk, expert_Tk, probabilities_TX = route(config, weights, h_TD)
  flat = expert_Tk.reshape(-1)
  order = jnp.argsort(flat, stable=True)
  token_P = order // config.experts_per_token
  sizes_X = jnp.bincount(flat, length=config.experts).astype(jnp.int32)
  row_Tk = deal.inverse(order).reshape(expert_Tk.shape)
  chosen_P, sent = flat[order], None
  rows_PD = deal.to_rows(to_experts(weights, h_TD), token_P, row_Tk)
  own_P, first = chosen_P, 0
  if parts > 1:
    came = exchange.there(rows_PD, sizes_X, parts)
    rows_PD, own_P, sizes_X, sent = came
    first = jax.lax.axis_index(exchange.AXIS) * len(sizes_X)
  return Routed(
    made_PF=channels(config, weights, rows_PD, sizes_X, own_P),
    weight_P=weight_Tk.reshape(-1)[order],
    expert_P=first + own_P,
    token_P=token_P,
    row_Tk=row_Tk,
    sizes_X=sizes_X,
    probabilities_TX=probabilities_TX,
    chosen_P=chosen_P,
    sent=sent,
  )


def to_experts(weights: Params, h_TD: jax.Array) -> jax.Array:
  """What experts read of the stream that `read` takes."""
  return h_TD * weights["moe_norm"] if "moe_norm" in weights else h_TD


def channels(
  config: ModelConfig,
  weights: Params,
  rows_PD: jax.Array,
  sizes_X: jax.Array,
  expert_P: jax.Array,
) -> jax.Array:
  """What experts make of their rows, up to their channels, [P, F].

  Args:
    config, weights: as of `read`.
    rows_PD: sorted by expert.
    sizes_X: rows of each.
    expert_P: whose each is.
  """
  up_PF = grouped.product(rows_PD, weights["moe_up"], sizes_X)
  gate_PF = grouped.product(rows_PD, weights["moe_gate"], sizes_X)
  if config.expert_bias:
    up_PF = up_PF + weights["moe_up_bias"][expert_P].astype(up_PF.dtype)
    gate_PF = gate_PF + weights["moe_gate_bias"][expert_P].astype(up_PF.dtype)
  if limit := config.swiglu_limit:
    gate_PF = jnp.minimum(gate_PF, limit)
    opened_PF = gate_PF * jax.nn.sigmoid(config.swiglu_alpha * gate_PF)
    return opened_PF * (jnp.clip(up_PF, -limit, limit) + 1)
  return ACTIVATIONS[config.activation](gate_PF) * up_PF


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
  if config.expert_norms:
    scale = jnp.asarray(config.hidden_size**-0.5, h_TD.dtype)
    h_TD = h_TD * weights["router_scale"] * scale
  logits_TX = jnp.einsum("td,dx->tx", h_TD, weights["router"])
  if config.expert_bias:
    logits_TX = logits_TX + weights["router_bias"].astype(logits_TX.dtype)
  logits_TX = logits_TX.astype(jnp.float32)
  probabilities_TX = jax.nn.softmax(logits_TX, axis=-1)
  top_Tk, expert_Tk = jax.lax.top_k(logits_TX, config.experts_per_token)
  if config.router_norm:
    weight_Tk = jax.nn.softmax(top_Tk, axis=-1)
  else:
    weight_Tk = jnp.take_along_axis(probabilities_TX, expert_Tk, axis=-1)
  if config.expert_norms:
    weight_Tk *= weights["expert_scale"][expert_Tk]
  return weight_Tk.astype(h_TD.dtype), expert_Tk, probabilities_TX


def masked(routed: Routed, mask_XF: jax.Array) -> Routed:
  """Without the channels that a mask (or numbers in its place) leaves out.

  Experts without any channel are gone, their output biases too.
  """
  made_PF, there = routed.made_PF, jnp.any(mask_XF != 0)
  # Float32 as in `layer.times_mask`.
  wide = jnp.promote_types(made_PF.dtype, mask_XF.dtype)
  product_PF = made_PF.astype(wide) * mask_XF[routed.expert_P].astype(wide)
  return routed.replace(
    made_PF=product_PF.astype(made_PF.dtype),
    weight_P=routed.weight_P * there.astype(routed.weight_P.dtype),
  )


def write(
  routed: Routed, down_XFE: jax.Array, bias_XE: jax.Array | None = None
) -> jax.Array:
  """What the experts say together, [tokens, E], without what is beside.

  Args:
    routed: from `read`, masked or not.
    down_XFE: their output matrices.
    bias_XE: their output biases, if they have any.
  """
  routed = routed.replace(beside_TE=None)
  if routed.mesh is None:
    return _write(routed, down_XFE) + _biases(routed, bias_XE)
  mesh = routed.mesh
  channels = _channels(mesh, down_XFE.shape[1])
  cut = jax.tree.map(lambda _: ROWS, routed)
  cut = cut.replace(made_PF=PartitionSpec(BATCH, channels))

  def run(routed, down_XFE, bias_XE):
    y_TE = _write(routed, down_XFE, _parts(mesh))
    y_TE = jax.lax.psum(y_TE, channels) if channels else y_TE
    return y_TE + _biases(routed, bias_XE)

  down = PartitionSpec(_experts(mesh), channels)
  cuts = cut, down, PartitionSpec()
  return _alone(run, mesh, cuts, ROWS)(routed, down_XFE, bias_XE)


def _write(routed, down_XFE, parts=1):
  said_PE = said(routed, down_XFE)
  if parts > 1:
    said_PE = exchange.back(said_PE, routed.sent, parts)
  said_PE = said_PE * routed.weight_P[:, None]
  return deal.to_tokens(said_PE, routed.token_P, routed.row_Tk)


def _biases(routed, bias_XE):
  """What output biases add, [tokens, E]; 0 = nothing."""
  if bias_XE is None:
    return 0
  weight_TX = jnp.zeros(routed.probabilities_TX.shape, routed.weight_P.dtype)
  at = routed.token_P, routed.chosen_P
  return weight_TX.at[at].set(routed.weight_P) @ bias_XE.astype(weight_TX.dtype)


def said(routed: Routed, down_XFE: jax.Array) -> jax.Array:
  """What each row's expert says, before the router's weight, [P, E].

  Args:
    routed: of one device.
    down_XFE: the output matrices.
  """
  return grouped.product(routed.made_PF, down_XFE, routed.sizes_X)


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

  home = routed.replace(made_PF=routed.weight_P, sent=None, beside_TE=None)
  cuts = jax.tree.map(lambda _: ROWS, home), ROWS
  run = _alone(run, routed.mesh, cuts, PartitionSpec())
  return run(home, counts_T.reshape(-1))


def _load(routed, counts_T):
  counts_T = jnp.asarray(counts_T, jnp.float32)
  counts_P = counts_T[routed.token_P]
  share_X = counts_T @ routed.probabilities_TX
  chosen_X = jnp.zeros(len(share_X)).at[routed.chosen_P].add(counts_P)
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


def _parts(mesh: Mesh | None) -> int:
  """How many parts experts are cut into."""
  return 1 if mesh is None else mesh.shape[exchange.AXIS]


def _experts(mesh: Mesh) -> str | None:
  """The mesh axis that experts are cut over."""
  return exchange.AXIS if _parts(mesh) > 1 else None


def _cut(name: str, mesh: Mesh, channels: str | None) -> PartitionSpec:
  """Where a parameter that is read is cut."""
  before = READ[name]
  if before is None:
    return PartitionSpec()
  return PartitionSpec(_experts(mesh), *[None] * (before - 1), channels)


def _channels(mesh: Mesh, width: int) -> str | None:
  """The mesh axis that channels are cut over."""
  size = mesh.shape["tensor"]
  return "tensor" if size > 1 and width % size == 0 else None
