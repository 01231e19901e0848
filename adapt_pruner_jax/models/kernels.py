"""Which implementation of attention runs, and the kernels among them.

plain   all queries of a block with all keys before them; short rows
blocks  the same in small blocks that the backward pass computes once more, so
        that memory grows with the length of a row, not its square
splash  JAX's Pallas kernel for TPUs
cudnn   cuDNN's kernel for NVIDIA GPUs (`cudnn`)
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from adapt_pruner_jax.models import cudnn
from adapt_pruner_jax.models.axes import BATCH
from adapt_pruner_jax.models.model_config import ModelConfig

KERNELS = ("splash", "cudnn")  # the others are plain XLA
LONGEST_PLAIN = 1024  # tokens; longer rows go in blocks
LANES = 128  # of a TPU: what splash's blocks are multiples of
LARGEST_BLOCK = 1024  # of splash: queries, and keys
COMPUTED = 512  # keys of a block of splash at a time


@dataclasses.dataclass(frozen=True)
class Kernel:
  """Which implementation is asked for, and the devices that rows are cut over.

  Attributes:
    name: auto | plain | blocks | splash | cudnn.
    mesh: None = not told; the kernels then are left alone.
    alone: within `shard_map`: each device has its rows and no others.
  """

  name: str = "auto"
  mesh: Mesh | None = None
  alone: bool = False

  @property
  def cutting(self) -> Mesh | None:
    """The mesh that a kernel has to cut rows over; None = they are cut."""
    return None if self.alone else self.mesh


AUTO = Kernel()


class Case(NamedTuple):
  """What the choice depends on.

  Attributes:
    device: what one of the devices is: `jax.Device.device_kind`.
    rows, length, head_size: of the queries, B, T and H.
    dtype: of the queries, by name.
    window: positions that a query sees; 0 = all, None = known at run time only.
    softcap: of the scores; 0 = none.
    packed: rows have segments.
    prefix: as `AttentionInputs.prefix`.
    shards: parts that rows are cut into; 0 = there is no mesh.
    capability: of an NVIDIA GPU, such as 9.0.
    sinks: heads may look at nothing, see `attention.attend`.
  """

  device: str
  rows: int
  length: int
  head_size: int
  dtype: str = "bfloat16"
  window: int | None = 0
  softcap: float = 0.0
  packed: bool = False
  prefix: bool = False
  shards: int = 1
  capability: float = 0.0
  sinks: bool = False


def choose(asked: str, case: Case) -> tuple[str, str]:
  """The implementation for a case, and why it is not another one.

  Args:
    asked: auto, or a name of the list above.
    case: what it would have to do.

  Returns:
    The name, and a reason; "" where it is what was asked for.
  """
  xla = "plain" if case.length <= LONGEST_PLAIN else "blocks"
  if asked in ("plain", "blocks"):
    return asked, ""
  best = "blocks"
  if case.device.startswith("TPU"):
    best = "splash"
  elif case.device.startswith("NVIDIA"):
    best = "cudnn"
  wanted = best if asked == "auto" else asked
  if wanted == "blocks":
    return xla, ""
  lacks = {"splash": _splash_lacks, "cudnn": _cudnn_lacks}[wanted](case)
  return (xla, f"{wanted} {lacks}") if lacks else (wanted, "")


def _splash_lacks(case: Case) -> str:
  if not case.device.startswith("TPU"):
    return f"is for TPUs, this is {case.device}"
  if case.length < LANES:
    return f"wants rows of at least {LANES} tokens, not {case.length}"
  return _kernels_lack(case)


def _cudnn_lacks(case: Case) -> str:
  if not case.device.startswith("NVIDIA"):
    return f"is for NVIDIA GPUs, this is {case.device}"
  if case.dtype not in ("bfloat16", "float16"):
    return f"computes in bfloat16 or float16, not {case.dtype}"
  hopper = case.capability >= 9
  widest = 256 if hopper else 128
  if case.head_size % 8 or case.head_size > widest:
    return (
      f"wants heads of a multiple of 8 up to {widest}, not {case.head_size}"
    )
  if case.softcap:
    return "has no soft cap"
  if case.packed and not hopper:
    return "wants a Hopper GPU or newer for packed rows"
  return _kernels_lack(case)


def _kernels_lack(case: Case) -> str:
  if case.window is None:
    return "must know the window when it is compiled"
  if case.sinks:
    return "has no attention sinks"
  if case.prefix:
    return "has no common prefix of branches"
  if not case.shards:
    return "is not told the devices"
  if case.rows % case.shards:
    return f"cannot cut {case.rows} row(s) over {case.shards} devices"
  return ""


def case_of(
  kernel: Kernel,
  q_BTKGH: jax.Array,
  window: jax.Array | int,
  softcap: float,
  packed: bool,
  prefix: bool,
) -> Case:
  """The case of these queries on the devices of `kernel`."""
  B, T, _, _, H = q_BTKGH.shape
  window = window if isinstance(window, int) else None
  shape = B, T, H, q_BTKGH.dtype.name
  case = _on_devices(kernel.mesh, *shape, window, softcap, packed, prefix)
  return case._replace(shards=1) if kernel.alone else case


def case_of_run(
  config: ModelConfig,
  mesh: Mesh,
  rows: int,
  length: int,
  dtype: str,
  packed: bool,
) -> Case:
  """The case of a model's layers without windows, for what a run says."""
  head_dim = (config.wide_heads or config).head_dim
  shape = rows, length, head_dim, dtype
  case = _on_devices(mesh, *shape, 0, config.attn_softcap, packed, False)
  return case._replace(sinks=config.attn_sinks)


def _on_devices(mesh: Mesh | None, *of_queries) -> Case:
  device = jax.local_devices()[0] if mesh is None else mesh.devices.flat[0]
  shards = 0 if mesh is None else math.prod(mesh.shape[a] for a in BATCH)
  capability = float(getattr(device, "compute_capability", 0))
  return Case(device.device_kind, *of_queries, shards, capability)


def splash_attention(
  mesh: Mesh | None,
  q_BTKGH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  segments_BT: jax.Array | None,
  window: int,
  scale: float,
  softcap: float,
  interpret: bool = False,
) -> jax.Array:
  """`attention.attend` by JAX's Pallas kernel for TPUs.

  Rows are padded to whole blocks; what pads is behind all that is real, where
  nobody looks.

  Args:
    mesh: its rows are cut over `BATCH`, KV groups over `tensor`; None = this is
      one device's part.
    q_BTKGH, k_BSKH, v_BSKH, window, scale, softcap: as `attention.attend`'s.
    segments_BT: the documents of packed rows; None = one a row.
    interpret: run the kernel on a CPU.
  """
  T = q_BTKGH.shape[1]
  block = min(LARGEST_BLOCK, -(-T // LANES) * LANES)
  padded = -(-T // block) * block

  def widen(x, value=0):
    pad = ((0, 0), (0, padded - T)) + ((0, 0),) * (x.ndim - 2)
    return jnp.pad(x, pad, constant_values=value)

  def local(q_BTKGH, k_BSKH, v_BSKH, *segments):
    B, _, K, G, H = q_BTKGH.shape
    kernel, ids = _splash(K * G, padded, block, window, softcap, interpret)
    q_BNTH = q_BTKGH.reshape(B, padded, K * G, H).swapaxes(1, 2)
    heads = q_BNTH, k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2)
    one = lambda q, k, v, *s: kernel(q, k, v, ids(*s, *s) if s else None)
    attend = jax.vmap(one)
    if q_BTKGH.dtype.itemsize < 4 and jax.config.jax_default_matmul_precision:
      attend = _as_it_is(attend)
    y_BNTH = attend(*heads, *segments)
    return y_BNTH.swapaxes(1, 2).reshape(B, padded, K, G, H)

  q_BTKGH = q_BTKGH * jnp.asarray(scale, q_BTKGH.dtype)
  arrays = [widen(x) for x in (q_BTKGH, k_BSKH, v_BSKH)]
  if segments_BT is not None:
    arrays.append(widen(segments_BT, -1))
  return _on_each_device(local, mesh, *arrays)[:, :T]


def _as_it_is(attend: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
  """A kernel of half precision under any `jax.default_matmul_precision`.

  Its products are exact as they are, and Mosaic refuses to make them in
  float32's passes; forward and backward.
  """
  own = lambda: jax.default_matmul_precision("bfloat16")

  @jax.custom_vjp
  def run(*args):
    with own():
      return attend(*args)

  def forward(*args):
    heads, rest = args[:3], args[3:]
    with own():
      said, back = jax.vjp(lambda *heads: attend(*heads, *rest), *heads)
    return said, (back, rest)

  def backward(saved, dsaid):
    back, rest = saved
    with own():
      return (*back(dsaid), *(None for _ in rest))

  run.defvjp(forward, backward)
  return run


@functools.cache
def _splash(heads, length, block, window, softcap, interpret):
  """The kernel for so many query heads of a row, and its type of segments."""
  from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as splash,
  )
  from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as masks,
  )

  shape = (length, length)
  mask = masks.CausalMask(shape)
  if window:
    mask = masks.LocalMask(shape, (window - 1, 0), 0)
  computed = COMPUTED if block % COMPUTED == 0 else block
  sizes = splash.BlockSizes(
    block_q=block,
    block_kv=block,
    block_kv_compute=computed,
    block_q_dkv=block,
    block_kv_dkv=block,
    block_kv_dkv_compute=computed,
    use_fused_bwd_kernel=True,
  )
  with jax.ensure_compile_time_eval():
    kernel = splash.make_splash_mha(
      masks.MultiHeadMask([mask] * heads),
      block_sizes=sizes,
      head_shards=1,
      q_seq_shards=1,
      attn_logits_soft_cap=softcap or None,
      interpret=interpret,
    )
  return kernel, splash.SegmentIds


def cudnn_attention(
  mesh: Mesh | None,
  q_BTKGH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  segments_BT: jax.Array | None,
  window: int,
  scale: float,
) -> jax.Array:
  """`attention.attend` by cuDNN; arguments as of `splash_attention`.

  Rows must not have more documents than `cudnn.room`.
  """

  def local(q_BTKGH, k_BSKH, v_BSKH, *segments):
    B, T, K, G, H = q_BTKGH.shape
    q_BTNH = q_BTKGH.reshape(B, T, K * G, H)
    segments_BT = segments[0] if segments else None
    args = q_BTNH, k_BSKH, v_BSKH, segments_BT, window, scale
    return cudnn.attend(*args).reshape(q_BTKGH.shape)

  arrays = [q_BTKGH, k_BSKH, v_BSKH]
  arrays += [] if segments_BT is None else [segments_BT]
  return _on_each_device(local, mesh, *arrays)


def _on_each_device(
  local: Callable[..., jax.Array],
  mesh: Mesh | None,
  q_BTKGH: jax.Array,
  *arrays: jax.Array,
) -> jax.Array:
  """`local` of each device's rows and, where they divide, KV groups."""
  if mesh is None:
    return local(q_BTKGH, *arrays)
  groups = q_BTKGH.shape[2]
  tensor = "tensor" if groups % mesh.shape["tensor"] == 0 else None
  heads = PartitionSpec(BATCH, None, tensor)
  rows = PartitionSpec(BATCH)
  specs = [heads if x.ndim > 2 else rows for x in (q_BTKGH, *arrays)]
  call = jax.shard_map(
    local, mesh=mesh, in_specs=tuple(specs), out_specs=heads, check_vma=False
  )
  return call(q_BTKGH, *arrays)
