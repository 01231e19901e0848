"""How fast a model is on the devices it runs on: prefill and decode.

All times are medians of repeats of compiled programs, after a first call that
does not count.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from adapt_pruner_jax.distributed import placement, sharding
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.evaluation import generate
from adapt_pruner_jax.models.arithmetic import ACTIVATIONS
from adapt_pruner_jax.models.axes import Params
from adapt_pruner_jax.models.model_config import ModelConfig

ROUNDINGS = (8, 32, 128)
WORTH = 1.05  # a smaller speed-up may be noise
TIMES = {"prefill_ms": "prefill, ms", "decode_ms_per_token": "decode, ms/token"}
INNER = 20  # MLPs a timed call runs one behind the other


def measure(
  config: ModelConfig,
  params: Params,
  batch: int = 1,
  prompt_len: int = 128,
  new_tokens: int = 64,
  repeats: int = 5,
  mesh: Mesh | None = None,
) -> dict:
  """Times `batch` prompts of random tokens.

  Returns:
    `prefill_ms` (all prompts), `decode_ms_per_token` (one token of all rows),
    `prefill_tokens_per_second` and `decode_tokens_per_second` (all rows
    together), and what was measured, on what.

  Raises:
    UserError: sizes below 1, or longer than the model's context.
  """
  if min(batch, prompt_len, new_tokens, repeats) < 1:
    raise UserError(
      f"latency: batch={batch}, prompt_len={prompt_len}, new_tokens="
      f"{new_tokens} and repeats={repeats} must be at least 1"
    )
  if mesh is None:
    mesh = sharding.one_device()
  prefills, decodes = _times(
    config, params, (batch, prompt_len), new_tokens, repeats, mesh
  )
  prefill_s = statistics.median(prefills[1:])
  token_s = statistics.median(decodes[1:]) / new_tokens
  return {
    "prefill_ms": 1e3 * prefill_s,
    "decode_ms_per_token": 1e3 * token_s,
    "prefill_tokens_per_second": batch * prompt_len / prefill_s,
    "decode_tokens_per_second": batch / token_s,
    "batch": batch,
    "prompt_len": prompt_len,
    "new_tokens": new_tokens,
    "repeats": repeats,
    "dtype": str(params["embedding"].dtype),
    "device": device_name(mesh),
  }


def _times(
  config: ModelConfig,
  params: Params,
  shape: tuple[int, int],
  new_tokens: int,
  repeats: int,
  mesh: Mesh,
) -> tuple[list[float], list[float]]:
  """Seconds of prefills and decodes; the first of each compiles.

  Args:
    shape: number of prompts, and their tokens.
  """
  rng = np.random.default_rng(0)
  prompts = rng.integers(0, config.vocab_size, shape).tolist()
  generate.check_request(config, prompts, new_tokens, generate.Sampling())
  tokens_BT, starts_B = generate.pad_left(prompts, mesh)
  # The length asked for, not the bucket it would be padded to.
  tokens_BT = tokens_BT[:, -shape[1] :]
  starts_B = starts_B - starts_B.min()
  tokens, starts, done = (
    placement.place_rows(rows, mesh)
    for rows in (tokens_BT, starts_B, np.zeros(len(starts_B), bool))
  )
  slots = shape[1] + new_tokens
  how = generate.Decoding(config, mesh, generate.Sampling(), (), new_tokens)
  at = generate.Place(np.int32(shape[1]), np.int32(0), starts)

  def prefill():
    return generate.prefill(config, mesh, slots, params, tokens, starts)

  def decode(logits, caches):
    return generate.decode(how, params, caches, logits, at, done, np.uint32(0))

  prefills, decodes = [], []
  for _ in range(repeats + 1):  # decoding consumes the caches
    seconds, ready = _time(prefill)
    prefills.append(seconds)
    decodes.append(_time(lambda: decode(*ready))[0])  # noqa: B023
  return prefills, decodes


def new_tokens(context: int) -> int:
  """How many tokens a timed decode draws in front of a context's end."""
  return min(16, context // 2)


def timer(
  config: ModelConfig, params: Params, phase: str, batch: int, context: int
) -> Callable[[], float]:
  """Times one call of a model on one device, in milliseconds.

  Args:
    phase: decode, one token of all rows that ends a context; or prefill, of
      all prompts.
    batch, context: rows, and the tokens of each.
  """
  mesh = sharding.one_device()
  params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
  starts = np.zeros(batch, np.int32)
  if phase == "prefill":
    tokens_BT = np.zeros((batch, context), np.int32)
    return lambda: milliseconds(
      lambda: generate.prefill(config, mesh, context, params, tokens_BT, starts)
    )
  new = new_tokens(context)
  how = generate.Decoding(config, mesh, generate.Sampling(), (), new)
  at = generate.Place(np.int32(context - new), np.int32(0), starts)
  # Zeros in place of a prompt's keys and values: no prefill is needed.
  prefill = partial(generate.prefill, config, mesh, context)
  one = np.zeros((batch, 1), np.int32)
  shapes = jax.eval_shape(prefill, params, one, starts)

  def run() -> float:
    made = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    logits, caches = jax.block_until_ready(made)
    done = np.zeros(batch, bool)
    call = lambda: generate.decode(
      how, params, caches, logits, at, done, np.uint32(0)
    )
    return milliseconds(call) / new

  return run


def milliseconds(
  call: Callable, wait: Callable[[], None] = lambda: None
) -> float:
  """Wall-clock time of a call.

  Args:
    wait: for a device that works behind the call; JAX's is waited for.
  """
  begun = time.perf_counter()
  jax.block_until_ready(call())
  wait()
  return 1e3 * (time.perf_counter() - begun)


def compare(before: dict, after: dict) -> dict:
  """Divides the times: speed-ups of `after` over `before`, and one line.

  Raises:
    UserError: they were not measured alike.
  """
  for key in ("batch", "prompt_len", "new_tokens", "dtype", "device"):
    if before[key] != after[key]:
      raise UserError(
        f"latencies with {key}={before[key]} and {after[key]} do not compare: "
        "measure both alike"
      )
  prefill = before["prefill_ms"] / after["prefill_ms"]
  decode = before["decode_ms_per_token"] / after["decode_ms_per_token"]
  return {
    "prefill_speedup": prefill,
    "decode_speedup": decode,
    "text": (
      f"prefill {prefill:.2f}x ({before['prefill_ms']:.2f} -> "
      f"{after['prefill_ms']:.2f} ms), decode {decode:.2f}x "
      f"({before['decode_ms_per_token']:.2f} -> "
      f"{after['decode_ms_per_token']:.2f} ms a token), batch "
      f"{after['batch']} x {after['prompt_len']} tokens, {after['device']}"
    ),
  }


def ffn_advice(
  config: ModelConfig,
  batch: int = 1,
  tokens: int = 128,
  dtype: str = "float32",
  repeats: int = 5,
) -> dict:
  """Finds whether `prune.round_ffn_to` would make this model's MLPs faster.

  Times one MLP on the first device at the width of the median layer, and at
  the nearest multiples of `ROUNDINGS`; a rounded width counts as faster by its
  time per channel, so that a wider MLP is not blamed for what it adds.

  Returns:
    `width`, `ms` {multiple or 1: milliseconds of one MLP at its width},
    `round_ffn_to` (1 = would not pay), and one line, `text`.

  Raises:
    UserError: no layer has an MLP.
  """
  widths = sorted(width for width in config.ffn_widths if width)
  if not widths:
    raise UserError("the model has no MLP whose width could be rounded")
  width = widths[len(widths) // 2]
  rounded = {1: width}
  rounded |= {to: max(to, round(width / to) * to) for to in ROUNDINGS}
  times = {
    w: _mlp_ms(config, w, batch * tokens, dtype, repeats)
    for w in sorted(set(rounded.values()))
  }
  gains = {
    to: (times[width] / width) / (times[w] / w)
    for to, w in rounded.items()
    if w != width
  }
  best = max(gains, key=gains.get, default=1)
  pays = best != 1 and gains[best] > WORTH
  device = jax.local_devices()[0].device_kind
  if pays:
    text = (
      f"prune.round_ffn_to={best} would pay on {device}: a channel of an MLP "
      f"{rounded[best]} wide costs {1 - 1 / gains[best]:.0%} less than of one "
      f"{width} wide ({times[rounded[best]]:.3f} ms, {times[width]:.3f} ms)"
    )
  else:
    text = (
      f"prune.round_ffn_to would not pay on {device}: an MLP {width} wide "
      f"takes {times[width]:.3f} ms, and none of the rounded widths "
      f"{', '.join(str(rounded[to]) for to in ROUNDINGS)} costs less a channel"
    )
  return {
    "width": width,
    "widths": {str(to): w for to, w in rounded.items()},
    "ms": {str(to): times[w] for to, w in rounded.items()},
    "round_ffn_to": best if pays else 1,
    "text": text,
  }


def device_name(mesh: Mesh) -> str:
  """How many devices of which kind, for people."""
  kinds = sorted({device.device_kind for device in mesh.devices.flat})
  return f"{mesh.devices.size} x {', '.join(kinds)}"


def _mlp_ms(
  config: ModelConfig, width: int, rows: int, dtype: str, repeats: int
) -> float:
  """Milliseconds of gate, up, activation and down at this width."""
  act = ACTIVATIONS[config.activation]
  key = jax.random.key(0)
  scale = config.hidden_size**-0.5
  gate, up, down_t = (
    (scale * jax.random.normal(k, (config.hidden_size, width))).astype(dtype)
    for k in jax.random.split(key, 3)
  )
  x_BD = jnp.ones((rows, config.hidden_size), dtype)

  @jax.jit
  def run(x_BD, gate, up, down):
    def one(_, x_BD):
      return x_BD + (act(x_BD @ gate) * (x_BD @ up)) @ down

    return jax.lax.fori_loop(0, INNER, one, x_BD)

  down = down_t.T / width**0.5
  seconds = [
    _time(lambda: run(x_BD, gate, up, down))[0] for _ in range(repeats + 1)
  ]
  return 1e3 * statistics.median(seconds[1:]) / INNER


def _time(call: Callable) -> tuple[float, object]:
  begun = time.perf_counter()
  result = jax.block_until_ready(call())
  return time.perf_counter() - begun, result
