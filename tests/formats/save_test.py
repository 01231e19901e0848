"""Exports, opened by Transformers in a process of its own, and bad input."""

import dataclasses
import json
import stat

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors

from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.formats.hf import (
  card,
  config_json,
  load,
  reopen,
  save,
  tensors,
  uniform,
  weights,
)
from adapt_pruner_jax.models import decoder, model_config
from adapt_pruner_jax.models.rope import Rope
from tests import small
from tests.formats import zoo

quiet = {"say": lambda _: None}


pytestmark = pytest.mark.usefixtures("small_programs")


def same(one, two):
  return jax.tree.all(jax.tree.map(np.array_equal, one, two))


# Fast are those whose tensors lie in a layout of their own.
SLOW = {*zoo.SINCE_5} - {"gpt_neox", "ernie4_5"}


def test_one_class_makes_layers_of_gemma4_with_experts_and_without(tmp_path):
  """Transformers knows one for each configuration class."""
  made = set()
  for name in ("gemma4_text", "gemma4_moe_text"):
    kind, changes = zoo.CASES[name]
    config = config_json.read(zoo.BASE | changes | {"model_type": kind})
    config = dataclasses.replace(config, ffn_widths=(24, 0, 5))
    save._write_classes(tmp_path, config)
    file = config_json.write(config)["auto_map"]["AutoModel"].split(".")[0]
    made.add((tmp_path / f"{file}.py").read_text())
  assert len(made) == 1


@pytest.mark.parametrize(
  "name", [zoo.slow_if(name, SLOW) for name in zoo.CASES]
)
def test_unpruned_tensors_are_byte_identical(animals, tmp_path, name):
  original = animals[name].path
  pair = load.load(original, None)
  path = tmp_path / "again"
  save.save(*pair, path, source=original, **quiet)
  assert not list(path.glob("*.py"))  # a plain model of its family
  raw = json.loads((path / "config.json").read_text())
  assert "auto_map" not in raw
  file = original / "model.safetensors"
  with (
    safetensors.safe_open(file, "numpy") as one,
    safetensors.safe_open(path / file.name, "numpy") as two,
  ):
    assert {*one.keys()} == {*two.keys()}
    assert two.metadata() == {"format": "pt"}
    for tensor in one.keys():  # noqa: SIM118
      first, second = one.get_tensor(tensor), two.get_tensor(tensor)
      assert first.dtype == second.dtype
      assert first.tobytes() == second.tobytes()
  import transformers

  peer = transformers.AutoModelForCausalLM.from_pretrained(path)
  assert type(peer).__name__ == raw["architectures"][0]
  old = transformers.AutoConfig.from_pretrained(original).to_dict()
  new = peer.config.to_dict()
  different = {
    field
    for field in old
    if plain(field, old[field]) != plain(field, new.get(field))
  }
  # What only new models, models with windows, or longrope use.
  unused = {"initializer_range", "original_max_position_embeddings"}
  if not pair[0].window:
    unused.add("max_window_layers")
  unused |= {field for field in old if field.startswith("mamba_")}
  if {"shared_intermediate_size", "moe_intermediate_size"} & {*old}:
    unused.add("intermediate_size")
  if name in ("qwen3_5_text", "hunyuan_v1_dense"):
    unused.add("rope_parameters")  # no sections of images; alpha in the base
  if name == "gemma3_text":
    unused.add("attn_logit_softcapping")  # which its class passes over
  assert different <= {"_name_or_path", *unused}


def plain(field, found):
  """A rope without its type's older name."""
  if field != "rope_parameters" or "full_attention" in found:
    return found
  return {name: value for name, value in found.items() if name != "type"}


def test_no_half_is_left_that_is_gone(animals, tmp_path):
  """Else Transformers fills it with random numbers, and says so in a table."""
  import transformers

  pruned = zoo.cut(*load.load(animals["gpt_neox"].path), **zoo.HOLES)
  save.save(*pruned, tmp_path / "uneven", **quiet)
  model = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / "uneven", trust_remote_code=True
  )
  file = tmp_path / "uneven" / "model.safetensors"
  with safetensors.safe_open(file, "numpy") as written:
    assert {*model.state_dict()} == {*written.keys()}


def test_steps_aside_where_transformers_makes_the_layers(
  animals, tmp_path, monkeypatch
):
  """As it may one day: classes that read `per_layer_config` by themselves."""
  import torch
  import transformers
  from transformers.models.llama import modeling_llama

  class Nothing(torch.nn.Module):
    def forward(self, hidden_states, **_):
      return torch.zeros_like(hidden_states), None

  class NoMlp(torch.nn.Module):
    def forward(self, x):
      return torch.zeros_like(x)

  class Layer(modeling_llama.LlamaDecoderLayer):
    def __init__(self, config, index):
      own = config.per_layer_config[index]
      super().__init__(own, index)
      self.self_attn.config = config
      if "attention" in own.skip:
        self.self_attn, self.input_layernorm = Nothing(), torch.nn.Identity()
      if "mlp" in own.skip:
        self.mlp, self.post_attention_layernorm = NoMlp(), torch.nn.Identity()

  config, params = zoo.cut(*load.load(animals["llama3"].path), **zoo.HOLES)
  save.save(config, params, tmp_path / "uneven", **quiet)
  raw = json.loads((tmp_path / "uneven" / "config.json").read_text())
  own = raw["per_layer_config"]
  assert own["0"] == {"skip": ["attention"], "intermediate_size": 24}
  assert own["1"]["skip"] == ["mlp"]
  tokens = torch.tensor(animals["llama3"].tokens_BT[:1])

  def opened(cls, **trust):
    model = cls.from_pretrained(
      tmp_path / "uneven", attn_implementation="eager", **trust
    )
    with torch.no_grad():
      return model, model(tokens).logits

  ours = transformers.AutoModelForCausalLM, {"trust_remote_code": True}
  _, expected = opened(ours[0], **ours[1])
  monkeypatch.setattr(modeling_llama, "LlamaDecoderLayer", Layer)
  for cls, trust in ours, (transformers.LlamaForCausalLM, {}):
    model, logits = opened(cls, **trust)
    assert type(model).__name__.startswith("Pruned") == bool(trust)
    assert type(model.model.layers[0].self_attn) is Nothing
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


def transformers_ids(path, **options):
  import transformers

  tokenizer = transformers.AutoTokenizer.from_pretrained(path, **options)
  return tokenizer("Once upon a time, 12 cats").input_ids


def test_real_model(shared_data, tmp_path):
  """With tokenizer, generation config, model card and checksums."""
  source = shared_data / "models" / "stories260K"
  config, params = load.load(source)
  pruned = zoo.cut(config, params, (4, 2, 1, 3, 4), (172, 100, 31, 64, 90))
  facts = {
    "method": "adapt",
    "model": "someone/stories",
    "params_before": model_config.count_params(config),
    "perplexity_before": 10.0,
    "perplexity_after": 12.5,
    "kv_heads_before": list(config.kv_groups),
    "ffn_before": list(config.ffn_widths),
  }
  path = tmp_path / "out" / "model"
  said = []
  save.save(*pruned, path, source=source, facts=facts, say=said.append)
  assert said == []
  for name in ("tokenizer.json", "generation_config.json"):
    assert (path / name).read_bytes() == (source / name).read_bytes()
  ids = transformers_ids(source)
  assert transformers_ids(path) == ids
  modes = {stat.S_IMODE(file.stat().st_mode) for file in path.iterdir()}
  assert modes == {0o644}
  assert stat.S_IMODE(path.stat().st_mode) == 0o755
  text = (path / card.CARD).read_text()
  for words in (
    "base_model: someone/stories",
    "| method | adapt |",
    "| perplexity | 10.000 → 12.500 |",
    f"{model_config.count_params(pruned[0]):,} (-3",
    "| 2 | 8 → 2 | 4 → 1 | 172 → 31 |",
    "trust_remote_code=True",
    "hf_uniform",
  ):
    assert words in text
  card.verify(path)
  (path / "config.json").write_text("{}")
  with pytest.raises(UserError, match="was changed after"):
    card.verify(path)
  (path / "config.json").unlink()
  with pytest.raises(UserError, match="is missing"):
    card.verify(path)
  with pytest.raises(UserError, match="no SHA256SUMS"):
    card.verify(source)


TINY = model_config.ModelConfig(
  family="llama",
  vocab_size=24,
  hidden_size=16,
  queries_per_group=2,
  head_dim=4,
  kv_groups=(2, 2),
  ffn_widths=(12, 12),
  norm_eps=1e-5,
  rope=Rope(),
  context=32,
  tied=True,
)


@pytest.fixture(scope="module")
def tiny():
  return TINY, decoder.init_params(TINY, jax.random.key(0))


def refusal(pair, path, **options):
  with pytest.raises(UserError) as caught:
    save.save(*pair, path, **quiet, **options)
  assert not list(path.parent.glob(f".{path.name}-*"))
  text = str(caught.value)
  assert "\n" not in text
  return text


def test_licence_is_carried_over(tiny, tmp_path):
  source = tmp_path / "parent"
  source.mkdir()
  head = "---\nlanguage: en\nlicense: apache-2.0\nlicense_link: LICENSE\n---\n"
  (source / "README.md").write_text(f"{head}# The parent\nlicense: not this")
  (source / "LICENSE").write_text("You may.")
  said = []
  save.save(*tiny, tmp_path / "out", source=source, say=said.append)
  text = (tmp_path / "out" / "README.md").read_text()
  assert "\nlicense: apache-2.0\nlicense_link: LICENSE\n" in text
  assert "not this" not in text
  assert (tmp_path / "out" / "LICENSE").read_text() == "You may."
  assert said == [f"no tokenizer is written: {source} has none"]


def test_empty_layers_are_left_out(tiny, tmp_path):
  config, params = zoo.cut(*tiny, K=(0, 2), F=(0, 12))
  config = dataclasses.replace(config, window=())
  save.save(config, params, tmp_path / "out", **quiet)
  found, again = load.load(tmp_path / "out")
  assert found.kv_groups == (2,)
  assert same(again["layer_0"], params["layer_1"])
  assert not list((tmp_path / "out").glob("*.py"))
  nothing = zoo.cut(*tiny, K=(0, 0), F=(0, 0))
  assert "no layer left" in refusal(nothing, tmp_path / "none")


def test_heads_that_do_not_divide(tiny, tmp_path):
  """Transformers 5 refuses them in a plain LLaMA, so they get the classes."""
  config = dataclasses.replace(TINY, kv_groups=(3, 3), hidden_size=16)
  params = decoder.init_params(config, jax.random.key(0))
  save.save(config, params, tmp_path / "hf", **quiet)
  assert (tmp_path / "hf" / "modeling_pruned_llama.py").is_file()
  save.save(config, params, tmp_path / "u", format="hf_uniform", **quiet)
  assert load.read_config(tmp_path / "u").kv_groups == (4, 4)
  config = dataclasses.replace(TINY, queries_per_group=3)
  params = decoder.init_params(config, jax.random.key(0))
  pair = config, params
  text = refusal(pair, tmp_path / "no", format="hf_uniform")
  assert "divides the hidden size 16" in text


def test_padding_says_what_it_costs(tiny, tmp_path):
  save.save(*tiny, tmp_path / "parent", **quiet)
  pruned = zoo.cut(*tiny, K=(2, 1), F=(12, 3))
  said = []
  save.save(
    *pruned,
    tmp_path / "out",
    source=tmp_path / "parent",
    format="hf_uniform",
    facts={"params_before": model_config.count_params(TINY)},
    say=said.append,
  )
  factor = model_config.count_params(TINY) / model_config.count_params(
    pruned[0]
  )
  assert f"{factor:.2f} times" in said[0]
  assert "KV cache 1.33 times" in said[0]
  assert "nothing is gained" in said[1]
  assert said[0] in (tmp_path / "out" / "README.md").read_text()
  few = {"params_before": model_config.count_params(TINY) + 1}
  for number, facts in enumerate((few, None)):
    said.clear()
    out = tmp_path / f"out{number}"
    options = {"format": "hf_uniform", "facts": facts, "say": said.append}
    save.save(*pruned, out, source=tmp_path / "parent", **options)
    assert not any("nothing is gained" in line for line in said)


def test_what_formats_cannot_express(tiny, tmp_path, animals):
  config, params = load.load(animals["olmo2"].path)
  pair = zoo.cut(config, params, **zoo.UNEVEN)
  text = refusal(pair, tmp_path / "out", format="hf_uniform")
  assert "--format=hf" in text
  pair = zoo.with_output_biases(*load.load(animals["mistral"].path))
  text = refusal(pair, tmp_path / "out", format="hf_uniform")
  assert "mistral has no bias in self_attn.o_proj" in text
  sliced = dataclasses.replace(TINY, residual=((8, 8, 8), (8, 8, 8)))
  pair = sliced, decoder.init_params(sliced, jax.random.key(0))
  assert "--format=orbax" in refusal(pair, tmp_path / "out")
  assert "did you mean hf_uniform" in refusal(
    tiny, tmp_path / "out", format="hf_unifrom"
  )


def test_nothing_is_overwritten(tiny, tmp_path):
  path = tmp_path / "out"
  save.save(*tiny, path, **quiet)
  assert "exists" in refusal(tiny, path)
  (path / "mark").write_text("old")
  save.save(*tiny, path, overwrite=True, **quiet)
  assert not (path / "mark").exists()
  home = tmp_path / "home"
  home.mkdir()
  (home / "thesis").write_text("years")
  assert "not a model directory" in refusal(tiny, home, overwrite=True)
  assert (home / "thesis").read_text() == "years"
  work = tmp_path / "work"  # a run's config.json is no model's
  (work / "checkpoints").mkdir(parents=True)
  recipe = json.dumps({"prune": {}, "calibration": {}})
  (work / "config.json").write_text(recipe)
  assert "not a model directory" in refusal(tiny, work, overwrite=True)
  assert (work / "checkpoints").is_dir()
  text = refusal(tiny, home / "thesis" / "model")
  assert "cannot write" in text


def test_interrupted_or_wrong_writing_leaves_nothing(
  tiny, tmp_path, monkeypatch
):
  path = tmp_path / "out"
  whole = weights.write

  def stop(*args):
    whole(*args)
    raise KeyboardInterrupt

  monkeypatch.setattr(weights, "write", stop)
  with pytest.raises(KeyboardInterrupt):
    save.save(*tiny, path, **quiet)
  assert list(tmp_path.iterdir()) == []

  def wrong(folder, config, get, *rest):
    twisted = lambda key: -get(key) if key == (1, "down") else get(key)
    whole(folder, config, twisted, *rest)

  monkeypatch.setattr(weights, "write", wrong)
  with pytest.raises(RuntimeError, match="down of layer 1 does not come back"):
    save.save(*tiny, path, **quiet)
  assert list(tmp_path.iterdir()) == []

  def full(*args):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(weights, "write", full)
  assert "No space left on device" in refusal(tiny, path)
  assert list(tmp_path.iterdir()) == []


def test_others_gather_to_the_end_when_the_disk_is_full(
  tiny, tmp_path, monkeypatch
):
  """They would wait for process 0 forever."""
  config, params = tiny
  get, asked = weights.getter(params), []

  def full(*_):
    raise OSError(28, "No space left on device")

  def counted(key):
    asked.append(key)
    return get(key)

  monkeypatch.setattr(weights, "_write_file", full)
  kinds = dict.fromkeys(tensors.tensor_shapes(config), np.dtype("float32"))
  with pytest.raises(OSError, match="No space"):
    weights.write(tmp_path, config, counted, kinds, 2000)
  assert asked == list(tensors.places(config))


def test_wrong_padding_is_another_function(tiny, tmp_path, monkeypatch):
  """All bits come back, and only the logits can tell."""
  pad = uniform.padded_getter

  def wrong(*args):
    get = pad(*args)
    return lambda key: get(key) + (key == (1, "down"))

  monkeypatch.setattr(uniform, "padded_getter", wrong)
  pair = zoo.cut(*tiny, K=(2, 1), F=(12, 3))
  text = "another function than the model: the output of layer 1 differs"
  with pytest.raises(RuntimeError, match=text):
    save.save(*pair, tmp_path / "out", format="hf_uniform", **quiet)
  assert list(tmp_path.iterdir()) == []


def test_not_a_number(tiny, tmp_path):
  config, params = tiny
  params = jax.tree.map(lambda x: x, params)
  params["layer_1"]["down"] = params["layer_1"]["down"].at[0, 0].set(jnp.nan)
  text = refusal((config, params), tmp_path / "out")
  assert "down of layer 1 has NaN" in text


def test_sharded_params(tiny, tmp_path):
  """From a mesh, to the same bytes."""
  from adapt_pruner_jax.distributed import sharding

  config, params = tiny
  mesh = sharding.make_mesh(2, 2, 2)
  placed = jax.device_put(params, sharding.param_shardings(params, mesh))
  for name, tree in (("one", params), ("eight", placed)):
    save.save(config, tree, tmp_path / name, **quiet)
  one, eight = (
    (tmp_path / name / "model.safetensors").read_bytes()
    for name in ("one", "eight")
  )
  assert one == eight


def test_comparison_is_that_of_the_whole_model(tiny):
  """`reopen` goes layer by layer; the logits are those of the Decoder."""
  config, params = zoo.cut(*tiny, K=(2, 1), F=(0, 5))
  ids = np.arange(20)[None] % config.vocab_size
  *_, (_, logits) = reopen.walk(config, weights.getter(params), ids)
  expected = decoder.Decoder(config).apply({"params": params}, ids)[0]
  np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("option", ["plain", "parallel"])
def test_other_processes_send_what_the_comparison_asks_for(option):
  """In its order: else all would wait. `parallel` has a bias of the output."""
  config = small.option(option)
  get, asked = weights.getter(small.random_params(config)), []

  def noted(key):
    asked.append(key)
    return get(key)

  for _ in reopen.walk(config, noted, np.arange(8)[None]):
    pass
  assert list(reopen._walked(config)) == asked
