"""Families against Transformers, and config.json as it is found in the wild."""

import json
import shutil

import jax
import numpy as np
import pytest

from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.formats.hf import config_json, defaults, families, load
from adapt_pruner_jax.models import decoder, model_config
from tests.formats import zoo

transformers = pytest.importorskip("transformers")
pytest.importorskip("torch")


SLOW = ("phi3_longrope", "qwen3_5_text", "exaone4", "glm", "hunyuan_v1_dense")
SLOW += ("gpt_oss", "qwen3_5_moe_text", "cohere", "cohere2", "stablelm")
SLOW += ("stablelm_parallel", "phi", "apertus", "ministral")
SLOW += ("gemma4_text", "gemma4_e_text", "gemma4_moe_text")


def logits_of(config, params, tokens):
  run = decoder.Decoder(config).apply
  run = jax.jit(run) if config.delta else run  # others share small programs
  return run({"params": params}, tokens)[0]


def old_spelling(raw):
  """A config.json of Transformers 5 as version 4 would have written it."""
  raw = dict(raw)
  rope = raw.pop("rope_parameters")
  if "sliding_attention" in rope:
    if raw["model_type"] == "gemma3_text":
      raw["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
    rope = rope["full_attention"]
  rope = dict(rope)
  own = families.FAMILIES[raw["model_type"]].renamed
  for name in ("rope_theta", "partial_rotary_factor"):
    raw[own.get(name, name)] = rope.pop(name, ...)
  rope["type"] = rope.pop("rope_type")
  raw["rope_scaling"] = rope if rope["type"] != "default" else None
  raw["torch_dtype"] = raw.pop("dtype")
  return {name: value for name, value in raw.items() if value is not ...}


@pytest.mark.parametrize(
  "name", [zoo.slow_if(name, SLOW) for name in zoo.CASES]
)
def test_logits_equal_transformers(animals, name):
  animal = animals[name]
  config, params = load.load(animal.path)
  found = logits_of(config, params, animal.tokens_BT)
  assert np.abs(animal.logits_BTV).max() > 0.5
  np.testing.assert_allclose(found, animal.logits_BTV, rtol=0, atol=1e-4)
  shapes = jax.tree.map(np.shape, params)
  assert shapes == model_config.param_shapes(config)
  assert config.eos_ids == ((2,) if name == "llama" else (2, 3))


@pytest.mark.parametrize("name", zoo.CASES)
def test_spellings_and_inverse(name):
  raw = json.loads(zoo.peer_config(name).to_json_string())
  raw |= {"dtype": "float32"}
  config = config_json.read(raw)
  written = config_json.write(config)
  assert config_json.read(written) == config
  # Either spelling alone, as one version of Transformers sees it.
  if not config.wide:  # whose class is of version 5, and reads that one only
    for spelt in (raw, written | {"dtype": "float32"}):
      assert config_json.read(old_spelling(spelt)) == config
  for field in ("rope_theta", "rope_scaling", "rope_local_base_freq"):
    written.pop(field, None)
  assert config_json.read(written) == config


@pytest.mark.parametrize("family", families.FAMILIES)
def test_defaults_are_those_of_transformers(family):
  row = families.FAMILIES[family]
  peer = transformers.AutoConfig.for_model(row.model_type or family)
  peer.allow_global_per_layer_attribute_access = True
  rope = {} if "rope_theta" in row.rope else peer.rope_parameters
  same = {
    "rope_theta": rope.get("full_attention", rope).get(
      "rope_theta", peer.default_theta
    ),
    "rope_local_base_freq": rope.get("sliding_attention", {}).get("rope_theta"),
    "partial_rotary_factor": rope.get("partial_rotary_factor"),
    "rope_scaling": None,
    "rope_parameters": None,
    # In code; no fields any more.
    "sliding_window_pattern": getattr(
      peer, "sliding_window_pattern", 4 if family == "cohere2" else 6
    ),
    "full_attention_interval": 4,
    "global_head_dim": 512,
    "num_global_key_value_heads": None,
  }
  for field, default in row.fields.items():
    if default is defaults.REQUIRED or field == "layer_types":
      continue
    derived = ("head_dim", "num_key_value_heads", "no_rope_layers")
    if field in derived and default is None:
      continue  # they follow from other fields
    own = row.renamed.get(field, field)
    expected = same[field] if field in same else getattr(peer, own)
    if field == "sliding_window" and not getattr(
      peer, "use_sliding_window", True
    ):
      expected = default  # Transformers blanks what is not used
    assert default == expected, field


@pytest.mark.parametrize(
  "family, layers",
  [
    ("gemma2", 5),
    ("gemma3_text", 13),
    ("qwen2", 30),
    ("olmo3", 9),
    ("smollm3", 9),
    ("exaone4", 9),
    ("cohere2", 9),
  ],
)
def test_windows_are_those_of_transformers(family, layers):
  """Where layer_types is absent, as in older files."""
  fields = {**zoo.BASE, "num_hidden_layers": layers, "sliding_window": 8}
  fields["use_sliding_window"] = True
  peer = transformers.AutoConfig.for_model(family, **fields)
  if family not in ("qwen2", "smollm3"):
    del fields["use_sliding_window"]
  config = config_json.read(fields | {"model_type": family})
  expected = [8 * (kind == "sliding_attention") for kind in peer.layer_types]
  assert 0 in expected
  assert 8 in expected
  assert list(config.window) == expected
  still = [1 - i for i in getattr(peer, "no_rope_layers", [1] * layers)]
  if family in ("exaone4", "cohere2"):  # global layers, where others are local
    still = [int(not size) for size in expected]
  assert list(config.nope or (0,) * layers) == still


def test_a_published_qwen3_5():
  """Fields that no class of Transformers reads; as many parameters as there."""
  read = {
    "attn_output_gate": True,
    "output_gate_type": "swish",
    "full_attention_interval": 4,
    "mamba_ssm_dtype": "float32",
    "mlp_only_layers": [],
    "mtp_num_hidden_layers": 1,
    "mtp_use_dedicated_embeddings": False,
  }
  text = {"hidden_size": 1024, "num_hidden_layers": 24, "head_dim": 256}
  text |= {"num_attention_heads": 8, "num_key_value_heads": 2}
  text |= {"linear_num_value_heads": 16, "intermediate_size": 3584}
  text |= {"tie_word_embeddings": True, "model_type": "qwen3_5_text"}
  config = config_json.read(
    {"model_type": "qwen3_5", "text_config": text | read}
  )
  assert config.delta == (1, 1, 1, 0) * 6
  assert config.kv_groups == (16, 16, 16, 2) * 6
  # As counted by Transformers, without the tower and the guessing head.
  import torch

  with torch.device("meta"):
    peer = transformers.AutoConfig.for_model(**text)
    model = transformers.AutoModelForCausalLM.from_config(peer)
  counted = sum(p.numel() for p in {*model.parameters()})
  assert model_config.count_params(config) == counted


GEMMA4 = {
  "model_type": "gemma4_text",
  "hidden_size": 512,
  "num_hidden_layers": 8,
  "num_attention_heads": 8,
  "attention_k_eq_v": True,
  "num_global_key_value_heads": 1,
  "hidden_size_per_layer_input": 0,
}


def test_sizes_of_a_gemma4():
  """As many parameters as in Transformers; kinds of layers by its own rules."""
  import torch

  config = config_json.read(GEMMA4)
  # Every sixth, and the last whatever is said.
  assert config.wide == (0, 0, 0, 0, 0, 1, 0, 1)
  assert config.kv_groups == (4, 4, 4, 4, 4, 1, 4, 1)
  assert config.heads() == (8,) * 8
  with torch.device("meta"):
    peer = transformers.AutoConfig.for_model(**GEMMA4)
    model = transformers.AutoModelForCausalLM.from_config(peer)
  counted = sum(p.numel() for p in {*model.parameters()})
  scales = config.num_layers  # which are buffers there
  assert model_config.count_params(config) == counted + scales


@pytest.mark.parametrize(
  "changes, words",
  [
    (
      {"hidden_size_per_layer_input": 4, "vocab_size": 9},
      "vocab_size_per_layer_input=262144 is not supported; vocab_size=9 is",
    ),
    ({"num_kv_shared_layers": 8}, "num_kv_shared_layers=8 .*; 0 to 7 of 8"),
    (
      {"num_kv_shared_layers": 1},
      "num_kv_shared_layers=1 is supported with .*_layer_input above 0",
    ),
    ({"num_kv_shared_layers": 3}, "leaves no layer of the kind full_attention"),
    (
      {
        "hidden_size_per_layer_input": 4,
        "num_kv_shared_layers": 1,
        "per_layer_config": {
          "5": {"head_dim": 512, "num_key_value_heads": 1},
          "7": {
            "head_dim": 512,
            "num_key_value_heads": 2,
            "num_attention_heads": 16,
          },
        },
      },
      "layer 7 has 2 KV groups and uses those of a layer with 1",
    ),
    (
      {
        "hidden_size_per_layer_input": 4,
        "num_kv_shared_layers": 2,
        "per_layer_config": {
          "0": {"num_key_value_heads": 8, "num_attention_heads": 16},
          "5": {"head_dim": 512, "num_key_value_heads": 1},
          "7": {"head_dim": 512, "num_key_value_heads": 1},
        },
      },
      "layer 0 has 8 KV groups, more than the 4 of the layer whose",
    ),
    ({"use_bidirectional_attention": "all"}, "attention=all is not supported"),
    ({"attention_bias": True}, "attention_bias=True is not supported"),
    ({"layer_types": ["full_attention"] * 8}, "all layers are of the kind"),
    ({"per_layer_config": {"7": {"head_dim": 64}}}, "layer 7 has heads of 64"),
    ({"num_global_key_value_heads": 3}, "layer 5 has 8 heads on 3"),
    ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling"),
  ],
)
def test_gemma4_that_is_refused(changes, words):
  with pytest.raises(UserError, match=words) as caught:
    config_json.read(GEMMA4 | changes)
  assert "\n" not in str(caught.value)


def test_a_qwen3_5_without_delta_nets():
  """What is written is read again, and means as much to Transformers."""
  kinds = {"layer_types": ["full_attention"] * 3, "linear_num_value_heads": 48}
  config = config_json.read(zoo.BASE | kinds | {"model_type": "qwen3_5_text"})
  written = config_json.write(config)
  assert config_json.read(written) == config
  assert transformers.AutoConfig.for_model(**written).linear_num_key_heads == 1


def test_exaone_without_windows_turns_everywhere():
  fields = {**zoo.BASE, "model_type": "exaone4", "sliding_window": None}
  with pytest.raises(UserError, match="sliding_window=None must be at least"):
    config_json.read(fields)
  fields["layer_types"] = ["full_attention"] * 3
  config = config_json.read(fields)
  assert (config.nope, config.window) == ((), ())
  assert config_json.write(config)["sliding_window"] is None
  still = config_json.read(fields | {"sliding_window": 8})
  assert still.nope == (1, 1, 1)
  assert config_json.write(still)["sliding_window"] == 4096
  with pytest.raises(UserError, match="pattern='LLLG' must be int"):
    config_json.read(
      fields | {"layer_types": None, "sliding_window_pattern": "LLLG"}
    )


def test_a_pattern_that_transformers_does_not_read():
  """Gemma 3's files have it, with an underscore, beside layer_types or not."""
  fields = {**zoo.BASE, "num_hidden_layers": 13, "sliding_window": 8}
  fields["_sliding_window_pattern"] = 2
  peer = transformers.AutoConfig.for_model("gemma3_text", **fields)
  config = config_json.read(fields | {"model_type": "gemma3_text"})
  expected = [8 * (kind == "sliding_attention") for kind in peer.layer_types]
  assert expected.count(0) == 2
  assert list(config.window) == expected


@pytest.mark.parametrize(
  "name",
  ["llama_bias", "mistral", "qwen2", "qwen3", "gemma2", "olmo2", "granite"],
)
def test_a_partial_rope_where_transformers_ignores_it(animals, name, tmp_path):
  import torch

  path = tmp_path / name
  shutil.copytree(animals[name].path, path)
  rope = {"rope_type": "default", "rope_theta": 1e4}
  zoo.rewrite_config(
    path, rope_parameters=rope | {"partial_rotary_factor": 0.5}
  )
  peer = transformers.AutoModelForCausalLM.from_pretrained(
    path, attn_implementation="eager"
  )
  tokens = animals[name].tokens_BT
  with torch.no_grad():
    expected = peer(torch.tensor(tokens)).logits.numpy()
  found = logits_of(*load.load(path), tokens)
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_a_partial_rope_of_phi3(animals, tmp_path):
  import torch

  path = tmp_path / "phi3"
  shutil.copytree(animals["phi3"].path, path)
  rope = {"rope_type": "default", "rope_theta": 1e4}
  zoo.rewrite_config(
    path, rope_parameters=rope | {"partial_rotary_factor": 0.5}
  )
  peer = transformers.AutoModelForCausalLM.from_pretrained(path)
  tokens = animals["phi3"].tokens_BT
  with torch.no_grad():
    expected = peer(torch.tensor(tokens)).logits.numpy()
  config, params = load.load(path)
  assert config.rope.partial == 0.5
  found = logits_of(config, params, tokens)
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
  written = config_json.write(config)
  assert written["partial_rotary_factor"] == 0.5
  assert written["rope_scaling"] is None  # version 4 knows longrope only


@pytest.mark.parametrize("kind", ["linear", "llama3"])
def test_ropes_that_the_config_class_refuses(kind):
  rope = {**zoo.LLAMA3, "rope_type": kind}
  fields = {**zoo.BASE, "rope_parameters": rope}
  with pytest.raises(Exception, match="longrope"):
    transformers.AutoConfig.for_model("phi3", **fields)
  with pytest.raises(UserError, match=f"rope type {kind} is not supported in"):
    config_json.read(fields | {"model_type": "phi3"})
  share = {"partial_rotary_factor": 0.5}  # shapes do not fit in Transformers
  fields |= {"rope_parameters": rope | share, "model_type": "llama"}
  with pytest.raises(UserError, match="more than llama models can compute"):
    config_json.read(fields)


@pytest.mark.parametrize(
  "name",
  [
    "meta-llama/Llama-3.2-1B",
    "HuggingFaceTB/SmolLM2-135M",
    "TinyLlama/TinyLlama-1.1B",
    "mistralai/Mistral-7B-v0.1",
    "Qwen/Qwen2.5-0.5B",
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
    "Qwen/Qwen3-0.6B",
    "google/gemma-2-2b",
    "google/gemma-3-1b-pt",
    "microsoft/Phi-3-mini-4k-instruct",
    "facebook/MobileLLM-125M",
  ],
)
def test_published_models(golden, name):
  """Their config.json, and the number of parameters on their pages."""
  found = json.loads((golden / "hub_configs.json").read_text())[name]
  config = config_json.read(found["config"])
  assert model_config.count_params(config) == found["parameters"]
  assert config_json.read(config_json.write(config)) == config


LLAMA = zoo.BASE | {"model_type": "llama"}


def refusal(**changes):
  raw = {k: v for k, v in (LLAMA | changes).items() if v is not ...}
  with pytest.raises(UserError) as caught:
    config_json.read(raw, path="dir/config.json")
  text = str(caught.value)
  assert "\n" not in text
  return text


@pytest.mark.parametrize(
  "changes, words",
  [
    ({"model_type": "bert"}, ["bert", "llama, mistral, qwen2"]),
    (
      {
        "model_type": "smollm3",
        "sliding_window": 8,
        "use_sliding_window": False,
        "layer_types": ["sliding_attention"] * 2,
      },
      ["which use_sliding_window=False contradicts"],
    ),
    ({"model_type": "qwen4"}, ["qwen4 is not supported; supported: llama"]),
    ({"model_type": ["llama"]}, ["model_type=['llama'] must be str or null"]),
    ({"rms_norm_eps": -1e-5}, ["rms_norm_eps=-1e-05 makes no sense"]),
    ({"eos_token_id": ["</s>"]}, ["eos_token_id=['</s>'] makes no sense"]),
    ({"max_position_embeddings": 0}, ["_embeddings=0 makes no sense"]),
    ({"rope_scaling": {"rope_type": ["yarn"]}}, ["rope_type=['yarn'] must be"]),
    (
      {
        "rope_scaling": {
          "rope_type": "llama3",
          "factor": 8.0,
          "low_freq_factor": 4.0,
          "high_freq_factor": 4.0,
        }
      },
      ["a rope of these numbers makes no sense"],
    ),
    (
      {"model_type": "mistral", "sliding_window": -8},
      ["sliding_window=-8 must be null or 0 or up"],
    ),
    (
      {"model_type": "gemma3_text", "query_pre_attn_scalar": -1},
      ["query_pre_attn_scalar=-1 makes no sense"],
    ),
    (
      {"model_type": "llava", "text_config": {"model_type": ["llama"]}},
      ["text_config.model_type=['llama'] must be str"],
    ),
    ({"model_type": ...}, ["model_type None"]),
    ({"architectures": ["LlamaForSequenceClassification"]}, ["not a causal"]),
    ({"architectures": ["LlamaModel"]}, ["LlamaModel", "not a causal"]),
    ({"quantization_config": {"bits": 4}}, ["quantization_config"]),
    ({"alibi": True}, ["alibi=True is not supported", "ignore_fields=alibi"]),
    ({"logit_cap": 3}, ["logit_cap=3 is not known", "ignore_fields=logit_cap"]),
    ({"atention_bias": True}, ["did you mean attention_bias"]),
    ({"sliding_window": 8}, ["sliding_window=8"]),
    ({"rope_scaling": {"type": "ntk", "factor": 2}}, ["rope type ntk"]),
    ({"rope_scaling": {"type": "mrope"}}, ["rope type mrope"]),
    ({"rope_scaling": {"rope_type": "dynamic"}}, ["needs the field factor"]),
    (
      {
        "rope_scaling": {
          "type": "longrope",
          "short_factor": [1.0],
          "long_factor": [1.0, 2.0],
        }
      },
      ["short_factor has 1 numbers; 2 are needed"],
    ),
    (
      {"rope_scaling": {"type": "yarn", "factor": 2, "beta_slow": -1}},
      ["a rope of these numbers makes no sense"],
    ),
    (
      {"rope_scaling": {"type": "yarn", "llama_4_scaling_beta": 0.1}},
      ["llama_4_scaling_beta is not supported in a rope of type yarn"],
    ),
    ({"rope_scaling": {"type": "linear"}}, ["linear needs the field factor"]),
    (
      {"rope_scaling": {"type": "linear", "factor": 2.0, "beta_fast": 1}},
      ["rope field beta_fast"],
    ),
    ({"hidden_act": "tanh"}, ["hidden_act=tanh", "silu"]),
    (
      {"layer_types": ["full_attention", "mamba", "mamba"]},
      ["layer 1 is of the kind mamba, which is not supported; full_attention"],
    ),
    ({"hidden_act": "xielu"}, ["llama models have no activation xielu"]),
    ({"hidden_size": ...}, ["hidden_size is missing"]),
    ({"hidden_size": "32"}, ["hidden_size='32' must be int"]),
    ({"num_hidden_layers": 0}, ["num_hidden_layers=0 must be from 1"]),
    ({"vocab_size": True}, ["vocab_size=True must be int"]),
    ({"rms_norm_eps": float("nan")}, ["rms_norm_eps=nan must be finite"]),
    ({"mlp_bias": "no"}, ["mlp_bias='no' must be bool"]),
    ({"extra_biases": 1}, ["extra_biases=1 must be list"]),
    ({"extra_biases": ["mlp.x"]}, ["names mlp.x, which has none in llama"]),
    ({"tie_word_embeddings": "no"}, ["tie_word_embeddings='no' must be bool"]),
    ({"num_key_value_heads": 3}, ["8 heads on 3 key/value heads"]),
    ({"per_layer_config": {"9": {}}}, ["per_layer_config has no layer 9"]),
    (
      {"per_layer_config": {"1": {"head_dim": 8}}},
      ["per_layer_config.1.head_dim"],
    ),
    (
      {"per_layer_config": {"1": {"skip": "mlp"}}},
      ["per_layer_config.1.skip=mlp is not", "a list of attention and mlp"],
    ),
    (
      {"per_layer_config": {"1": {"num_key_value_heads": 1}}},
      ["layer 1", "8 heads on 1"],
    ),
  ],
)
def test_refused(changes, words):
  text = refusal(**changes)
  assert text.startswith("dir/config.json: ")
  assert all(word in text for word in words), text


def test_ignored_fields():
  config = config_json.read(LLAMA)
  raw = LLAMA | {"logit_cap": 3, "sliding_window": 8}
  assert config_json.read(raw, "logit_cap, sliding_window") == config
  # Switched off, harmless, or not there.
  raw = LLAMA | {"alibi": False, "some_future_field": None, "temperature": 0.7}
  raw |= {"layer_types": ["full_attention"] * 3}
  assert config_json.read(raw) == config
  yarn = {"type": "ntk", "factor": 4.0, "alpha": 32}
  raw = LLAMA | {"rope_scaling": yarn}
  assert config_json.read(raw, "rope_scaling") == config


def test_other_names_of_what_is_known():
  config = config_json.read(LLAMA)
  assert config_json.read(LLAMA | {"hidden_act": "swish"}) == config
  assert config_json.write(config)["hidden_act"] == "silu"
  # Falcon 3 says so, and no class reads it.
  assert config_json.read(LLAMA | {"activation": "swiglu"}) == config
  text = refusal(activation="geglu")
  assert "activation=geglu is not known" in text
  # Published files of others have more of these.
  for family in "starcoder2", "cohere2", "apertus", "hunyuan_v1_dense":
    fields = {**zoo.BASE, "model_type": family}
    more = families.FAMILIES[family].anyway
    assert config_json.read(fields | more) == config_json.read(fields)
  assert "norm_type=layer_norm is not known" in refusal(norm_type="layer_norm")


def test_gelu_of_gemma_is_the_tanh_form():
  """Its first files say gelu, and its class takes that for the other."""
  fields = {**zoo.BASE, "hidden_act": "gelu"}
  peer = transformers.AutoConfig.for_model("gemma", **fields)
  assert peer.hidden_act == "gelu_pytorch_tanh"
  config = config_json.read(fields | {"model_type": "gemma"})
  assert config.activation == "gelu_tanh"
  # Gemma 1.1's say it in a second field, which the class passes over.
  both = fields | {"hidden_activation": "gelu_pytorch_tanh"}
  assert config_json.read(both | {"model_type": "gemma"}) == config
  exact = config_json.read(fields | {"model_type": "llama"})
  assert exact.activation == "gelu"


def test_families_that_refuse_by_name():
  kinds = {"layer_types": ["full_attention", "mamba", "mamba"]}
  dense = {"num_local_experts": 0}
  for family, changes, word in [
    ("granitemoehybrid", {}, "num_local_experts=8 is not supported"),
    ("granitemoehybrid", dense, "layer_types=None"),
    ("granitemoehybrid", dense | kinds, "layer 1 is of the kind mamba"),
    (
      "qwen3_5_text",
      {"layer_types": ["mamba"] * 3},
      "0 is of the kind mamba, w",
    ),
    ("qwen3_5_text", {"linear_num_value_heads": 7}, "7 value heads on 16 key"),
    ("qwen3_5_text", {"attn_output_gate": False}, "attn_output_gate=False"),
    ("qwen3_5_text", {"output_gate_type": "sigmoid"}, "output_gate_type=sigm"),
    ("phi", {"qk_layernorm": True}, "qk_layernorm=True is not supported"),
    (
      "phi",
      {"rope_scaling": {"type": "proportional"}},
      "rope type proportional is not supported in phi",
    ),
    (
      "stablelm",
      {"head_dim": 8, "rope_scaling": {"type": "dynamic", "factor": 2}},
      "a rope of these numbers makes no sense",
    ),
    ("cohere2", {"layer_switch": 3}, "layer_switch=3 is not known"),
    ("cohere", {"use_qk_norm": True}, "use_qk_norm=True is not supported"),
    ("smollm3", {"no_rope_layers": [1]}, "no_rope_layers must name 3 layers"),
    (
      "qwen2",
      {"use_sliding_window": True, "max_window_layers": None},
      "max_window_layers=None must be int",
    ),
    ("phi3", {"rope_scaling": {"type": "linear"}}, "rope type linear"),
    ("olmoe", {"clip_qkv": 8.0}, "clip_qkv=8.0 is not supported in olmoe"),
    ("qwen3_moe", {"mlp_only_layers": [1]}, "mlp_only_layers=\\[1\\] is not"),
    ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step=2 is not"),
    ("granitemoe", {"num_local_experts": 1}, "2 experts a token .* of 1"),
    ("granitemoe", {"num_experts_per_tok": 0}, "0 experts a token .* of 8"),
    ("gemma2", {"sliding_window": None}, "sliding_window"),
    ("gemma2", {"layer_types": ["chunked"]}, "layer_types=.* of 3 layers"),
    ("gemma2", {"layer_types": ["chunked"] * 3}, "layer 0 is of the kind chun"),
    ("lfm2", {"layer_types": ["conv"]}, "lfm2, with layers conv, is not supp"),
    ("nemotron_h", {"layers_block_type": ["mamba"]}, "with layers mamba, is"),
    (
      "gemma3_text",
      {"use_bidirectional_attention": True},
      "use_bidirectional_attention",
    ),
  ]:
    with pytest.raises(UserError, match=word):
      config_json.read(LLAMA | {"model_type": family} | changes)


def test_internlm_is_llama(tmp_path):
  """Its own defaults, names of fields, and a rope that grows with the row."""
  import torch

  peer = transformers.AutoConfig.for_model("internlm3")
  for field, default in config_json.INTERNLM.items():
    assert getattr(peer, field) == default, field
  rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
  fields = {**zoo.BASE, "head_dim": 8, "qkv_bias": True, "bias": True}
  fields |= {"max_position_embeddings": 16, "rope_parameters": rope}
  peer = transformers.AutoConfig.for_model("internlm3", **fields)
  torch.manual_seed(0)
  model = transformers.AutoModelForCausalLM.from_config(peer).eval()
  model.save_pretrained(tmp_path)
  tokens = np.random.default_rng(0).integers(64, size=(1, 40))
  with torch.no_grad():
    expected = model(torch.tensor(tokens)).logits.numpy()
  config, params = load.load(tmp_path)
  assert config.family == "llama"
  assert config.qkv_bias
  assert config.down_bias
  found = logits_of(config, params, tokens)
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
  with pytest.raises(UserError, match="must be alike in internlm3"):
    config_json.read(fields | {"model_type": "internlm3", "bias": False})


def test_shared_layers_become_layers_of_their_own(tmp_path, animals, caplog):
  """MobileLLM-LS: each stored layer runs twice; truth by doubling it."""
  path = tmp_path / "shared"
  shutil.copytree(animals["llama"].path, path)
  mobile = {
    "model_type": "mobilellm",
    "architectures": ["MobileLLMForCausalLM"],
  }
  zoo.rewrite_config(path, **mobile, layer_sharing=True, share_embedding=False)
  config, params = load.load(path)
  assert "2 times" in caplog.text
  assert config.num_layers == 6
  assert config.family == "llama"
  assert params["layer_0"]["q"] is not None
  np.testing.assert_array_equal(
    params["layer_4"]["down"], params["layer_5"]["down"]
  )
  torch = pytest.importorskip("torch")
  peer = transformers.AutoModelForCausalLM.from_pretrained(
    animals["llama"].path
  )
  layers = [layer for layer in peer.model.layers for _ in range(2)]
  peer.model.layers = torch.nn.ModuleList(layers)
  peer.config.num_hidden_layers = 6
  tokens = animals["llama"].tokens_BT
  with torch.no_grad():
    expected = peer(torch.tensor(tokens), use_cache=False).logits.numpy()
  found = logits_of(config, params, tokens)
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
  zoo.rewrite_config(path, num_hidden_layers=None)
  with pytest.raises(UserError, match="num_hidden_layers=None must be int"):
    load.load(path)
