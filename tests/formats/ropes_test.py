"""Every kind of rotary embedding in every family, against its own class."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from adapt_pruner_jax.formats.hf import config_json
from adapt_pruner_jax.formats.hf.families import FAMILIES
from adapt_pruner_jax.models.rope import rope_tables
from tests.formats import zoo

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

CONTEXT = 16
LENGTHS = 12, 40  # within the original context, and beyond
ORIGINAL = {"original_max_position_embeddings": CONTEXT}
GIVEN = {
  "default": {},
  "linear": {"factor": 4.0},
  "dynamic": {"factor": 2.0},
  "llama3": {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    **ORIGINAL,
  },
  "yarn": {
    "factor": 4.0,
    "mscale": 0.7,
    "mscale_all_dim": 0.9,
    "beta_fast": 8.0,
    **ORIGINAL,
  },
  "longrope": {"factor": 3.0, **ORIGINAL},
  "proportional": {"partial_rotary_factor": 0.5, "factor": 2.0},
}


def peer_of(family: str, kind: str) -> object:
  """The configuration of a family's case, with a rope of this kind."""
  row = FAMILIES[family]
  rope = {"rope_type": kind, "rope_theta": 1e4, **GIVEN[kind]}
  changes = next(made for name, made in zoo.CASES.values() if name == family)
  fields = {**zoo.BASE, **changes, "hidden_size": 64}
  if family == "helium":
    fields["head_dim"] = 8  # which its heads have to fill
  H = fields.get("head_dim", 64 // fields["num_attention_heads"])
  if "partial_rotary_factor" in row.fields:
    rope["partial_rotary_factor"] = 0.5
    H //= 2
  if kind == "longrope":
    rope["short_factor"] = [1 + 0.2 * i for i in range(H // 2)]
    rope["long_factor"] = [1.5 + i for i in range(H // 2)]
  if row.query_growth:
    rope["llama_4_scaling_beta"] = 0.1
  if row.local_rope:
    local = {"rope_type": "default", "rope_theta": row.fields["rope_theta"]}
    rope = {"full_attention": rope, "sliding_attention": local}
  fields |= {"rope_parameters": rope, "max_position_embeddings": CONTEXT}
  return transformers.AutoConfig.for_model(family, **fields)


def tables_of(peer: object) -> list[np.ndarray]:
  """Cosines and sines of its class, of one channel of each pair."""
  family = peer.model_type
  rotary = transformers.AutoModel.from_config(peer).rotary_emb
  layer = ("full_attention",) * FAMILIES[family].local_rope
  found = []
  for length in LENGTHS:
    both = rotary(torch.zeros(1), torch.arange(length)[None], *layer)
    for table in both:
      pairs = table.shape[-1] // (1 if family == "gpt_oss" else 2)
      step = 2 if family.startswith("cohere") else 1
      found.append(table[..., ::step][..., :pairs].numpy())
  return found


@pytest.mark.slow
@pytest.mark.parametrize(
  "family", [name for name, row in FAMILIES.items() if not row.model_type]
)
def test_ropes_of_a_family(family):
  """Short and long rows, and what Transformers makes of the exported config."""
  for kind in FAMILIES[family].ropes:
    peer = peer_of(family, kind)
    expected = tables_of(peer)
    config = config_json.read(json.loads(peer.to_json_string()))
    head_dim = (config.wide_heads or config).head_dim
    found = [
      np.asarray(table)[..., : table.shape[-1] // 2]
      for length in LENGTHS
      for table in rope_tables(config.rope, head_dim, jnp.arange(length)[None])
    ]
    again = transformers.AutoConfig.for_model(**config_json.write(config))
    for one, two, three in zip(found, expected, tables_of(again), strict=True):
      np.testing.assert_allclose(one, two, rtol=0, atol=1e-5, err_msg=kind)
      np.testing.assert_array_equal(two, three, err_msg=kind)
