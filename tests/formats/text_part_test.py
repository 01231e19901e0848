"""The language model of multimodal files, and weights in eight bits."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.formats.hf import (
  config_json,
  cut_vocabulary,
  families,
  load,
  save,
  text_part,
)
from adapt_pruner_jax.models import decoder
from tests.formats import zoo

transformers = pytest.importorskip("transformers")
pytest.importorskip("torch")


@pytest.fixture
def mistral(animals):
  """The directory of a small model."""
  return animals["mistral"].path


VISION = {
  "hidden_size": 16,
  "intermediate_size": 16,
  "num_hidden_layers": 1,
  "num_attention_heads": 2,
  "image_size": 28,
  "patch_size": 14,
}
QWEN_TOKENS = {
  "image_token_id": 60,
  "video_token_id": 61,
  "vision_start_token_id": 62,
  "vision_end_token_id": 63,
}
MROPE = {
  "num_attention_heads": 4,
  "rope_parameters": {
    "rope_type": "default",
    "rope_theta": 1e4,
    "mrope_section": [2, 1, 1],
  },
}
# name: (type of the wrapper, changes to zoo.BASE, fields of the wrapper)
WRAPPERS = {
  "gemma3": (
    {**zoo.GEMMA, "model_type": "gemma3_text"},
    {
      "vision_config": VISION,
      "mm_tokens_per_image": 4,
      "image_token_index": 60,
      "boi_token_index": 61,
      "eoi_token_index": 62,
    },
  ),
  "qwen3_5": (
    zoo.CASES["qwen3_5_text"][1] | {"model_type": "qwen3_5_text"},
    {
      "vision_config": {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": 32,
        "num_position_embeddings": 16,
      },
      **QWEN_TOKENS,
    },
  ),
  "gemma4": (
    zoo.CASES["gemma4_e_text"][1]
    | {"model_type": "gemma4_text", "use_bidirectional_attention": "vision"}
    | {"pad_token_id": 0},
    {
      "vision_config": {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
      },
      "image_token_id": 60,
      "video_token_id": 61,
      "audio_token_id": 62,
    },
  ),
  "mistral3": (
    {
      "model_type": "ministral3",
      "head_dim": 16,
      "rope_parameters": {**zoo.YARN, "llama_4_scaling_beta": 0.1},
    },
    # Its own class ties the output matrix, which that of the text does not.
    {"vision_config": {**VISION, "head_dim": 8}, "image_token_index": 60},
  ),
  "smolvlm": (
    {"model_type": "llama"},
    {"vision_config": VISION, "image_token_id": 60},
  ),
  "llava": (
    {"model_type": "llama"},
    {
      "vision_config": {
        **VISION,
        "model_type": "clip_vision_model",
        "projection_dim": 16,
      },
      "image_token_index": 60,
    },
  ),
  "qwen2_vl": (
    {**MROPE, "model_type": "qwen2_vl_text"},
    {
      "vision_config": {
        "depth": 1,
        "embed_dim": 16,
        "hidden_size": 32,
        "num_heads": 2,
        "mlp_ratio": 1,
      },
      **QWEN_TOKENS,
    },
  ),
  "qwen2_5_vl": (
    {**MROPE, "model_type": "qwen2_5_vl_text"},
    {
      "vision_config": {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": 32,
        "fullatt_block_indexes": [0],
      },
      **QWEN_TOKENS,
    },
  ),
  "qwen3_vl": (
    {
      "model_type": "qwen3_vl_text",
      "head_dim": 16,
      "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e4,
        "mrope_section": [3, 3, 2],
      },
    },
    {
      "vision_config": {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": 32,
        "deepstack_visual_indexes": [0],
      },
      **QWEN_TOKENS,
    },
  ),
}
# Without the fields that its text has not.
GEMMA4 = {
  name: found
  for name, found in zoo.CASES["gemma4_text"][1].items()
  if name != "hidden_size_per_layer_input"
}
WRAPPERS["gemma4_unified"] = (
  {
    **GEMMA4,
    "model_type": "gemma4_unified_text",
    "use_bidirectional_attention": "vision",
    "pad_token_id": 0,
  },
  {
    **WRAPPERS["gemma4"][1],
    "vision_config": {
      "patch_size": 2,
      "mm_embed_dim": 16,
      "mm_posemb_size": 4,
      "output_proj_dims": 32,
    },
  },
)
WRAPPERS["qwen3_5_moe"] = (
  zoo.CASES["qwen3_5_moe_text"][1] | {"model_type": "qwen3_5_moe_text"},
  WRAPPERS["qwen3_5"][1],
)
WRAPPERS["qwen3_vl_moe"] = (
  zoo.CASES["qwen3_moe"][1]
  | WRAPPERS["qwen3_vl"][0]
  | {"model_type": "qwen3_vl_moe_text", "norm_topk_prob": False},
  WRAPPERS["qwen3_vl"][1],
)
WRAPPERS["qwen3_omni_moe_thinker"] = (
  WRAPPERS["qwen3_vl_moe"][0]
  | {"model_type": "qwen3_omni_moe_text", "use_qk_norm": True},
  {
    "vision_config": WRAPPERS["qwen3_vl"][1]["vision_config"],
    "audio_config": {
      "d_model": 16,
      "encoder_layers": 1,
      "encoder_attention_heads": 2,
      "encoder_ffn_dim": 16,
      "num_mel_bins": 8,
      "output_dim": 32,
      "downsample_hidden_size": 8,
    },
  },
)
WRAPPERS["exaone4_5"] = (
  zoo.CASES["exaone4"][1] | {"model_type": "exaone4"},
  {
    "vision_config": WRAPPERS["qwen2_5_vl"][1]["vision_config"]
    | {"num_key_value_heads": 2},
    "image_token_id": 60,
    "video_token_id": 61,
  },
)
WRAPPERS["aya_vision"] = (
  zoo.CASES["cohere2"][1] | {"model_type": "cohere2", "pad_token_id": 0},
  {"vision_config": VISION, "image_token_id": 60},
)
WRAPPERS["idefics2"] = (
  {"model_type": "mistral", "pad_token_id": 0},
  {
    "vision_config": VISION,
    "perceiver_config": {
      "num_key_value_heads": 2,
      "resampler_depth": 1,
      "resampler_head_dim": 8,
      "resampler_n_heads": 2,
      "resampler_n_latents": 2,
    },
    "image_token_id": 60,
  },
)
WRAPPERS["granite_speech"] = (
  zoo.CASES["granite"][1] | {"model_type": "granite"},
  {
    "encoder_config": {
      "hidden_dim": 16,
      "input_dim": 16,
      "num_layers": 1,
      "num_heads": 2,
      "dim_head": 8,
      "output_dim": 8,
    },
    "projector_config": {
      "model_type": "blip_2_qformer",
      "hidden_size": 16,
      "encoder_hidden_size": 16,
      "intermediate_size": 16,
      "num_hidden_layers": 1,
      "num_attention_heads": 2,
    },
    "audio_token_index": 60,
    "has_lora_adapter": False,
  },
)


def wrapper(name, folder):
  """Writes a tiny multimodal model; gives it."""
  import torch

  inner, outer = WRAPPERS[name]
  config = transformers.AutoConfig.for_model(
    name, text_config={**zoo.BASE, **inner}, **outer
  )
  torch.manual_seed(0)
  peer = transformers.AutoModelForMultimodalLM.from_config(config).eval()
  peer.save_pretrained(folder)
  return peer


@pytest.mark.slow
@pytest.mark.parametrize("name", WRAPPERS)
def test_the_language_model_of_a_wrapper(name, tmp_path, caplog):
  """Its logits, and an export that is a plain text model."""
  import torch

  peer = wrapper(name, tmp_path / "whole")
  config, params = load.load(tmp_path / "whole")
  assert "only the language model is read" in caplog.text
  part = "encoder" if name == "granite_speech" else "vis"
  assert part in caplog.text.split("left out")[0]
  tokens = np.random.default_rng(0).integers(60, size=(1, 40))
  with torch.no_grad():
    expected = peer(torch.tensor(tokens)).logits.numpy()
  if name in ("aya_vision", "granite_speech"):  # that class does not scale them
    expected *= config.logit_scale
    assert config.logit_scale != 1
  found = decoder.Decoder(config).apply({"params": params}, tokens)[0]
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
  out = tmp_path / "text"
  save.save(config, params, out, source=tmp_path / "whole", say=lambda _: None)
  again = transformers.AutoModelForCausalLM.from_pretrained(out)
  prefix = families.FAMILIES[config.family].prefix
  assert type(again).__name__ == f"{prefix}ForCausalLM"
  with torch.no_grad():
    text = again(torch.tensor(tokens)).logits.numpy()
  np.testing.assert_allclose(text, expected, rtol=0, atol=1e-4)


def test_experts_lie_either_way_round(tmp_path):
  """Transformers writes Qwen3-VL's as others'; published files are turned."""
  import torch

  peer = wrapper("qwen3_vl_moe", tmp_path)
  _, params = load.load(tmp_path)
  file = tmp_path / "model.safetensors"
  arrays = load_file(file)
  turned = {
    name: np.ascontiguousarray(array.swapaxes(1, 2))
    for name, array in arrays.items()
    if ".mlp.experts." in name
  }
  assert {array.shape for array in turned.values()} == {
    (4, 32, 48),
    (4, 24, 32),
  }
  save_file(arrays | turned, file, {"format": "pt"})
  _, again = load.load(tmp_path)
  jax.tree.map(np.testing.assert_array_equal, params, again)
  read = type(peer).from_pretrained(tmp_path).eval()
  tokens = torch.arange(9)[None]
  with torch.no_grad():
    torch.testing.assert_close(read(tokens).logits, peer(tokens).logits)


def test_the_thinker_of_a_model_that_speaks(tmp_path):
  """Its config and its tensors are one level lower; the talker is left out."""
  wrapper("qwen3_omni_moe_thinker", tmp_path / "thinker")
  thinker, params = load.load(tmp_path / "thinker")
  whole = tmp_path / "whole"
  whole.mkdir()
  raw = json.loads((tmp_path / "thinker" / "config.json").read_text())
  outer = {"model_type": "qwen3_omni_moe", "enable_audio_output": True}
  (whole / "config.json").write_text(
    json.dumps(outer | {"thinker_config": raw, "talker_config": {}})
  )
  arrays = load_file(tmp_path / "thinker" / "model.safetensors")
  arrays = {f"thinker.{name}": array for name, array in arrays.items()}
  arrays["talker.model.layers.0.mlp.down_proj.weight"] = np.zeros(
    (2, 2), np.float32
  )
  save_file(arrays, whole / "model.safetensors", {"format": "pt"})
  config, again = load.load(whole)
  assert config == thinker
  jax.tree.map(np.testing.assert_array_equal, params, again)
  (whole / "config.json").write_text(json.dumps(outer))
  with pytest.raises(UserError, match="needs the field thinker_config"):
    load.load(whole)


@pytest.mark.parametrize(
  "kind", sorted({*text_part.ABSENT} - {"qwen3_omni_moe_text"})
)
def test_fields_that_a_text_config_leaves_out(kind):
  """They are the defaults of its own class, which may differ from the row's."""
  peer = transformers.AutoConfig.for_model(kind)
  peer.allow_global_per_layer_attribute_access = True
  wrapper = {v: k for k, v in text_part.WRAPPERS.items()}.get(kind, "llava")
  config = config_json.read(
    {"model_type": wrapper, "text_config": {"model_type": kind}}
  )
  assert config.vocab_size == peer.vocab_size
  assert config.hidden_size == peer.hidden_size
  heads = peer.num_key_value_heads
  assert config.kv_groups == (heads,) * peer.num_hidden_layers
  assert config.queries_per_group * heads == peer.num_attention_heads
  F = getattr(peer, "moe_intermediate_size", peer.intermediate_size)
  assert config.ffn_widths[0] == F
  eps = "layer_norm_eps" if kind.startswith("cohere") else "rms_norm_eps"
  assert config.norm_eps == getattr(peer, eps)
  assert config.context == peer.max_position_embeddings
  rope = peer.rope_parameters
  assert config.rope.theta == rope.get("full_attention", rope)["rope_theta"]
  assert config.head_dim == getattr(
    peer, "head_dim", peer.hidden_size // peer.num_attention_heads
  )


@pytest.mark.parametrize("kind", text_part.WRAPPERS)
def test_what_a_wrapper_says_by_default(kind):
  peer = transformers.AutoConfig.for_model(kind)
  assert peer.text_config.model_type == text_part.WRAPPERS[kind]
  text = {**zoo.BASE, "model_type": peer.text_config.model_type}
  if kind == "gemma4":
    text["hidden_size_per_layer_input"] = 0
  says = config_json.read({"model_type": kind, "text_config": text}).tied
  ties = getattr(peer, "tie_word_embeddings", False)
  assert (says or kind in text_part.TIE) == ties


def test_fields_of_the_language_model_beside_those_of_others():
  """As in the files of Qwen2-VL and Qwen2.5-VL."""
  inner = {**zoo.BASE, "rope_theta": 1e6, "rms_norm_eps": 1e-6}
  inner["rope_scaling"] = {"type": "mrope", "mrope_section": [1, 1]}
  for name in text_part.FLAT:
    outer = {"model_type": name, "vision_config": {"depth": 1}}
    outer |= {"image_token_id": 60, "vision_start_token_id": 62}
    nested = config_json.read(outer | {"text_config": inner})
    assert config_json.read(outer | inner) == nested
    peer = transformers.AutoConfig.for_model(**outer, **inner).text_config
    assert (peer.hidden_size, peer.rms_norm_eps) == (32, 1e-6)


def test_names_of_a_wrapper(tmp_path, mistral):
  """Both spellings of releases, and what the outer config says."""
  raw = json.loads((mistral / "config.json").read_text())
  weights = load_file(mistral / "model.safetensors")
  inner = {n: v for n, v in raw.items() if n != "eos_token_id"}
  outer = {"model_type": "mistral3", "text_config": inner, "eos_token_id": [2]}
  outer |= {"image_token_index": 10, "vision_config": {"hidden_size": 8}}
  expected, params = load.load(mistral)
  spellings = {
    "old": lambda name: f"language_model.{name}",
    "new": lambda name: name.replace("model.", "model.language_model."),
  }
  for spelling, rename in spellings.items():
    path = tmp_path / spelling
    path.mkdir()
    tower = {"vision_tower.patch.weight": np.zeros((2, 2), np.float32)}
    tower["vision_tower.position_ids"] = np.arange(2)  # of an old CLIP
    save_file(
      {rename(n): w for n, w in weights.items()} | tower,
      path / "model.safetensors",
    )
    (path / "config.json").write_text(json.dumps(outer))
    config, found = load.load(path)
    assert config.eos_ids == (2,)
    assert dataclasses.replace(config, eos_ids=expected.eos_ids) == expected
    assert jax.tree.all(jax.tree.map(np.array_equal, found, params))
  # Of tying, what the wrapper says counts, and whether there is a matrix.
  says = {"tie_word_embeddings": False}
  inside = {"text_config": inner | {"tie_word_embeddings": True}}
  (path / "config.json").write_text(json.dumps(outer | says | inside))
  assert not load.read_config(path).tied
  del weights["lm_head.weight"]
  weights = {rename(n): w for n, w in weights.items()}
  save_file(weights, path / "model.safetensors")
  (path / "config.json").write_text(json.dumps(outer))
  config, found = load.load(path)
  assert config.tied
  kept = np.arange(0, config.vocab_size, 2)
  cut_vocabulary.write(path, tmp_path / "cut", kept, {}, config.tied)
  config, cut = load.load(tmp_path / "cut")
  assert config.tied
  np.testing.assert_array_equal(cut["embedding"], found["embedding"][kept])
  with pytest.raises(UserError, match="needs the field text_config"):
    config_json.read({"model_type": "mistral3"})
  # A wrapper that is not known, around a language model that is.
  with pytest.raises(UserError) as caught:
    config_json.read(outer | {"model_type": "paligemma"})
  text = str(caught.value)
  assert "of type paligemma holds a language model of type mistral" in text
  assert "did you mean" not in text


@pytest.mark.parametrize("block", [[16, 8], None])
def test_weights_in_eight_bits(tmp_path, mistral, block):
  """Blocks with a scale each, or one scale: their product, made by torch."""
  import torch
  from safetensors.torch import load_file as load_torch
  from safetensors.torch import save_file as save_torch

  source = mistral
  tensors = load_torch(source / "model.safetensors")
  stored, plain = {}, {}
  for name, weight in tensors.items():
    stored[name] = plain[name] = weight
    if not name.endswith("_proj.weight"):
      continue
    small, scale = weight.to(torch.float8_e4m3fn), torch.rand(())
    spread = scale
    if block:
      grid = [-(-n // b) for n, b in zip(weight.shape, block, strict=True)]
      scale = torch.rand(grid) + 0.5
      spread = scale.repeat_interleave(block[0], 0).repeat_interleave(
        block[1], 1
      )[: weight.shape[0], : weight.shape[1]]
    stored |= {name: small, f"{name}_scale_inv": scale}
    stored[name.replace("weight", "activation_scale")] = torch.ones(())
    plain[name] = small.float() * spread
  for folder, content in ("eight", stored), ("plain", plain):
    shutil.copytree(source, tmp_path / folder)
    save_torch(content, tmp_path / folder / "model.safetensors")
  with pytest.raises(UserError, match="is stored in eight bits, which needs"):
    load.load(tmp_path / "eight")
  quantization = {"quant_method": "fp8", "weight_block_size": block}
  zoo.rewrite_config(tmp_path / "eight", quantization_config=quantization)
  config, found = load.load(tmp_path / "eight")
  expected = load.load(tmp_path / "plain")
  assert config == expected[0]
  assert jax.tree.all(jax.tree.map(np.array_equal, found, expected[1]))
  _, kept = load.load(tmp_path / "eight", None)
  assert kept["layer_0"]["q"].dtype == "bfloat16"
  for wrong, said in ([8, 8], "_scale_inv has shape"), ([8], "two numbers"):
    other = {"quant_method": "fp8", "weight_block_size": wrong}
    zoo.rewrite_config(tmp_path / "eight", quantization_config=other)
    with pytest.raises(UserError, match=said):
      load.load(tmp_path / "eight")
