"""Experts as files have them: in four bits, or all in one tensor."""

import jax
import numpy as np
import pytest
from safetensors import numpy as safe

from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.formats.hf import config_json, load
from tests.formats import zoo

torch = pytest.importorskip("torch")
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
NAME = "model.layers.1.mlp.experts.gate_up_proj"


def random_packed(*shape):
  rng = np.random.default_rng(0)
  blocks = rng.integers(256, size=(*shape, 16), dtype=np.uint8)
  return blocks, rng.integers(120, 128, size=shape, dtype=np.uint8)


@pytest.mark.slow
def test_four_bits_are_what_transformers_unpacks(tmp_path):
  """Of a model with one packed tensor; it reads as the unpacked one does."""
  from transformers.integrations import mxfp4

  path = zoo.make(tmp_path, ("gpt_oss",))["gpt_oss"].path
  file = path / "model.safetensors"
  tensors = safe.load_file(file)
  blocks, scales = random_packed(5, 48, 1)
  given = map(torch.tensor, (blocks, scales))
  plain = mxfp4.convert_moe_packed_tensors(*given).float().numpy()
  assert plain.shape == tensors[NAME].shape
  safe.save_file(tensors | {NAME: plain}, file, {"format": "pt"})
  config, want = load.load(path)
  del tensors[NAME]
  packed = {f"{NAME}_blocks": blocks, f"{NAME}_scales": scales}
  safe.save_file(tensors | packed, file, {"format": "pt"})
  with pytest.raises(UserError, match="stored as U8, which is read with"):
    load.load(path)
  zoo.rewrite_config(path, quantization_config=MXFP4)
  found, got = load.load(path)
  assert found == config
  for name in ("moe_gate", "moe_up"):
    layer = "layer_1"
    np.testing.assert_array_equal(got[layer][name], want[layer][name])
  _, stored = load.stored(path)
  assert stored["layer_1"]["moe_up"].dtype == "bfloat16"
  packed[f"{NAME}_scales"] = scales[:, :40]
  safe.save_file(tensors | packed, file, {"format": "pt"})
  with pytest.raises(UserError, match="do not go together"):
    load.load(path)


@pytest.mark.parametrize("change", [{"swiglu_limit": 0}, {"swiglu_alpha": -1}])
def test_a_gate_that_is_none_is_refused(change):
  raw = {**zoo.BASE, "model_type": "gpt_oss", **change}
  with pytest.raises(UserError, match="must be above 0"):
    config_json.read(raw)


def test_experts_in_one_tensor(tmp_path):
  """As the hub has Qwen's, where `save_pretrained` writes each by itself."""
  path = zoo.make(tmp_path, ("qwen3_moe",))["qwen3_moe"].path
  _, want = load.load(path)
  file = path / "model.safetensors"
  tensors = safe.load_file(file)
  for layer in range(3):
    block = f"model.layers.{layer}.mlp.experts"
    take = lambda name, block=block: np.stack(
      [tensors.pop(f"{block}.{x}.{name}.weight") for x in range(4)]
    )
    both = take("gate_proj"), take("up_proj")
    tensors[f"{block}.gate_up_proj"] = np.concatenate(both, axis=1)
    tensors[f"{block}.down_proj"] = take("down_proj")
  safe.save_file(tensors, file, {"format": "pt"})
  _, got = load.load(path)
  jax.tree.map(np.testing.assert_array_equal, got, want)
