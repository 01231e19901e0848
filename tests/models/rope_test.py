"""Kinds of rotary embeddings, against Transformers' own functions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adapt_pruner_jax.formats.hf import config_json
from adapt_pruner_jax.models import rope as ropes
from adapt_pruner_jax.models.rope import Rope

HEAD = 16
ORIGINAL = 32
CASES = {
  "linear": {"factor": 3.0},
  "dynamic": {"factor": 3.0},
  "llama3": {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": ORIGINAL,
  },
  "yarn": {"factor": 4.0, "original_max_position_embeddings": ORIGINAL},
  "yarn_scales": {
    "factor": 4.0,
    "original_max_position_embeddings": 4096,
    "mscale": 1.0,
    "mscale_all_dim": 0.5,
    "beta_fast": 16,
    "beta_slow": 2,
    "truncate": False,
  },
  "yarn_given": {
    "factor": 4.0,
    "original_max_position_embeddings": ORIGINAL,
    "attention_factor": 0.9,
    "beta_fast": None,
  },
  "longrope": {
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [1.0 + i for i in range(8)],
    "original_max_position_embeddings": ORIGINAL,
  },
  "longrope_given": {
    "short_factor": [1.0] * 8,
    "long_factor": [2.0] * 8,
    "factor": 8.0,
    "attention_factor": 1.3,
    "original_max_position_embeddings": ORIGINAL,
  },
  "proportional": {"partial_rotary_factor": 0.3, "factor": 2.0},
}
LLAMA = {
  "model_type": "llama",
  "vocab_size": 64,
  "hidden_size": 64,
  "intermediate_size": 24,
  "num_hidden_layers": 1,
  "num_attention_heads": 4,
  "max_position_embeddings": 128,
}


def fields_of(case):
  """A config.json with the rope of a case."""
  rope = {"rope_type": case.split("_")[0], "rope_theta": 5e4, **CASES[case]}
  if case == "dynamic":  # grows beyond the model's own context
    return LLAMA | {
      "rope_parameters": rope,
      "max_position_embeddings": ORIGINAL,
    }
  return LLAMA | {"rope_parameters": rope}


@pytest.mark.parametrize("length", [ORIGINAL, ORIGINAL + 1, 128])
@pytest.mark.parametrize("case", CASES)
def test_frequencies_are_those_of_transformers(case, length):
  transformers = pytest.importorskip("transformers")
  torch = pytest.importorskip("torch")
  utils = transformers.modeling_rope_utils
  fields = fields_of(case)
  peer = transformers.LlamaConfig(**fields)
  kind = peer.rope_parameters["rope_type"]
  make = utils.ROPE_INIT_FUNCTIONS[kind]
  expected, scale = make(peer, "cpu", seq_len=torch.tensor(length))
  config = config_json.read(fields)
  found = ropes.rope_frequencies(config.rope, HEAD, length)
  np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5)
  assert ropes.rope_scale(config.rope) == pytest.approx(scale, rel=1e-6)
  # The length may be known on the device only, and differ between rows.
  lengths = jnp.array([[length], [5]])
  traced = jax.jit(lambda n: ropes.rope_frequencies(config.rope, HEAD, n))
  both = np.broadcast_to(traced(lengths), (2, 1, HEAD // 2))
  np.testing.assert_allclose(both[0, 0], expected.numpy(), rtol=1e-5)
  short, _ = make(peer, "cpu", seq_len=torch.tensor(5))
  np.testing.assert_allclose(both[1, 0], short.numpy(), rtol=1e-5)
  assert config_json.read(config_json.write(config)) == config


def test_what_is_absent_follows_from_the_contexts():
  """Both factors are the quotient of the contexts, as in Transformers."""
  rope = {"rope_type": "yarn", "factor": None, "rope_theta": 1e4}
  rope["original_max_position_embeddings"] = ORIGINAL
  config = config_json.read(LLAMA | {"rope_parameters": rope})
  assert config.rope.factor == 4
  # Without an original context it is the model's own; one at the top wins.
  rope = {"type": "yarn", "factor": 2.0}
  config = config_json.read(LLAMA | {"rope_scaling": rope})
  assert config.rope.original_context == 128
  top = {"original_max_position_embeddings": 64}
  config = config_json.read(LLAMA | {"rope_scaling": rope} | top)
  assert config.rope.original_context == 64
  default = config_json.read(LLAMA)
  assert config_json.read(LLAMA | top) == default
  # Text has but one position: the three axes of a multimodal rope are alike.
  multimodal = {"rope_type": "default", "mrope_section": [2, 3, 3]}
  assert config_json.read(LLAMA | {"rope_scaling": multimodal}) == default


def test_nothing_turns():
  still = Rope(kind="none", partial=0.5)
  cos, sin = ropes.rope_tables(still, HEAD, jnp.arange(3)[None])
  assert cos.shape == sin.shape == (1, 3, HEAD // 2)
  x = jnp.arange(3.0 * HEAD).reshape(1, 3, 1, HEAD)
  np.testing.assert_array_equal(ropes.rotate(x, (cos, sin)), x)
