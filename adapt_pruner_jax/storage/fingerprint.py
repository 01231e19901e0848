"""A number for each array that tells whether it is the one that was saved."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@jax.jit
def fingerprint(x: jax.Array) -> jax.Array:
  """A uint32 that every single flipped bit changes, the same on any mesh.

  The sum of a hash of each element's bits and position. Each hash is one-to-one
  in the bits (the finaliser of MurmurHash3), so a change of one element always
  shows; several ones cancel by chance only, once in 2^32.
  """
  if x.dtype == bool:
    x = x.astype(jnp.uint8)
  unsigned = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
  bits = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
  position = jnp.uint32(0)
  for axis, size in enumerate(bits.shape):
    index = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    position = position * np.uint32(size) + index
  h = bits ^ (position * np.uint32(0x9E3779B9))
  h = (h ^ (h >> 16)) * np.uint32(0x85EBCA6B)
  h = (h ^ (h >> 13)) * np.uint32(0xC2B2AE35)
  return jnp.sum(h ^ (h >> 16), dtype=jnp.uint32)


def fingerprints(leaves: dict[str, jax.Array]) -> dict[str, int]:
  """`fingerprint` of each array, on the host."""
  # One program for each shape: one for all of them takes longer to compile.
  found = jax.device_get({n: fingerprint(x) for n, x in leaves.items()})
  return {name: int(value) for name, value in found.items()}


def named_leaves(tree: Any, separator: str = ".") -> dict[str, Any]:
  """{'params.layer_0.q': leaf, ...}, in the order of the tree's leaves."""
  return {
    jax.tree_util.keystr(path, simple=True, separator=separator): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }
