"""Exports as other programs use them: Transformers in processes of its own."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from adapt_pruner_jax.formats.hf import families, load, reopen, save, weights
from adapt_pruner_jax.models import decoder, model_config
from adapt_pruner_jax.models.rope import Rope
from tests.formats import zoo

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("small_programs")]

OLD = "uneven_0.1"  # written by version 0.1
PEER = Path(__file__).parent / "transformers_peer.py"
TRANSFORMERS_4 = (
  "transformers==4.57.6",
  "huggingface_hub==0.36.0",
  "tokenizers==0.22.1",
)
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
quiet = {"say": lambda _: None}


@pytest.fixture(scope="module")
def exports(animals, golden, tmp_path_factory):
  """Every family pruned unevenly, in each format; some with whole halves gone.

  Gives the directory and {name: (config, params)}.
  """
  pytest.importorskip("accelerate")
  pytest.importorskip("peft")
  root = tmp_path_factory.mktemp("exports")
  pairs = {}
  tokens = animals["llama"].tokens_BT[:1, : reopen.TOKENS]
  np.save(root / "tokens.npy", tokens)

  def export(name, format, config, params):
    path = root / f"{name}-{format}"
    save.save(config, params, path, format=format, **quiet)
    # The programs that `save` compiled; `reopen` has a test of its own.
    *_, (_, logits) = reopen.walk(config, weights.getter(params), tokens)
    np.save(path / "logits.npy", logits)
    pairs[path.name] = config, params

  for name in zoo.CASES:
    if name in ("llama", "llama_linear"):
      continue
    whole = load.load(animals[name].path)
    # Of families with classes of their own also without some halves, of those
    # with delta nets and a shared expert too.
    holed = name in zoo.SINCE_5 and not whole[0].experts
    holed |= name.startswith(("qwen3_5", "gemma4"))
    sizes = zoo.OWN_UNEVEN.get(name, zoo.UNEVEN)
    if holed:
      sizes = zoo.OWN_HOLES.get(name, zoo.HOLES)
    pruned = zoo.cut(*whole, **sizes)
    export(name, "hf", *pruned)
    if name not in ("olmo2", "olmo3", "olmoe"):
      export(name, "hf_uniform", *pruned)
    if name in ("llama3", "qwen2", "gemma2", "gemma3_text", "phi3"):
      holed = zoo.with_output_biases(*zoo.cut(*whole, **zoo.HOLES))
      export(f"{name}_holes", "hf", *holed)
    if name == "llama_bias":
      export(f"{name}_holes", "hf", *zoo.cut(*whole, **zoo.HOLES))
      export(f"{name}_holes", "hf_uniform", *zoo.cut(*whole, **zoo.HOLES))
      # What is left has the sizes of the parent: nothing would seem amiss.
      even = {"K": (0, 4, 4), "F": (24, 0, 24)}
      export(f"{name}_even_holes", "hf", *zoo.cut(*whole, **even))
  for name in ("llama3", "gemma3_text", "phi3", "qwen2_holes"):
    resave(root, name)
    pairs[f"{name}_saved-hf"] = pairs[f"{name}-hf"]
  shutil.copytree(golden / OLD, root / "old-hf")
  config, params = pairs["old-hf"] = load.load(root / "old-hf")
  *_, (_, logits) = reopen.walk(config, weights.getter(params), tokens)
  np.save(root / "old-hf" / "logits.npy", logits)
  return root, pairs


def resave(root, name):
  """As Transformers 5 saves it, in the spelling of that version alone."""
  import transformers

  path, new = root / f"{name}-hf", root / f"{name}_saved-hf"
  model = transformers.AutoModelForCausalLM.from_pretrained(
    path, trust_remote_code=True, dtype="auto"
  )
  model.save_pretrained(new)
  shutil.copyfile(path / "logits.npy", new / "logits.npy")


def run_peer(root, env, without=()):
  done = subprocess.run(
    [sys.executable, str(PEER), str(root), *without],
    capture_output=True,
    text=True,
    env=env,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  return json.loads(done.stdout.splitlines()[-1])


def check_peer(result):
  for name, found in result["found"].items():
    assert found["class"].startswith("Pruned") == name.endswith("-hf"), name
    assert found["logits"] < 1e-4, name
    assert found["dynamic"] == found["by_hand"], name
    if not name.endswith("-hf"):
      continue
    check_opening(name, found, result["version"])
    assert found.get("sdpa", 0) < 1e-4, name
    assert found["static"] == found["by_hand"], name
    for dtype, most in (("float16", 0.03), ("bfloat16", 0.1)):
      off, made = found.get(f"torch.{dtype}", (0, 6))
      assert off < most, (name, dtype)
      assert made == 6, (name, dtype)
    checkpointing, helped = found["fine_tune"]
    assert checkpointing < 1e-5, name
    assert helped, name
    # Stock Gemma 2 reopens with another attention on Transformers 4.
    if "gemma2" not in name or result["version"][0] != "4":
      assert found["reload"] < 1e-4, name
  trained = {n: f for n, f in result["found"].items() if "train" in f}
  assert len(trained) == 3
  for name, found in trained.items():
    losses, saved = found["train"]
    assert losses == sorted(losses, reverse=True), name
    assert saved == 0, name
    changed, saved, merged = found["lora"]
    assert changed > 1e-3, name  # else the adapter did nothing
    assert saved == 0, name
    assert merged < 1e-4, name


def check_opening(name, found, version):
  """What happens with and without trust, and to models that are not pruned."""
  if name == "old-hf":
    assert "trust_remote_code" in found["untrusted"]
    return
  assert found["warnings"] == [], name
  # The family's class must not open it with random numbers in the gaps.
  refusal = "not homogeneous" if name.startswith("gemma4") else "RuntimeError"
  assert refusal in found["untrusted"], name
  assert found["again"] == 0, name
  family = name.split("_")[0].removesuffix("-hf")
  none = ("granite", "granitemoehybrid", "olmo2", "ernie4", "gpt")
  none += ("granitemoe", "olmoe")
  tasks = dict.fromkeys(none, ()) | {"gemma3": ("Sequence",)}
  tasks |= {"cohere": (), "cohere2": (), "apertus": ("Token",), "gemma4": ()}
  tasks["olmo3"] = tasks["hunyuan"] = ("Sequence",)
  wanted = tasks.get(family, ("Sequence", "Token"))
  if name.startswith("qwen3_5"):
    wanted = () if "moe" in name else ("Sequence",)
  if name.startswith("gpt_oss"):
    wanted = ("Sequence", "Token")
  assert (*found["heads"],) == wanted, name
  assert all(off < 1e-6 for off in found["heads"].values()), name


@pytest.mark.slow
def test_opens_in_transformers(exports, subprocess_env):
  root, pairs = exports
  result = run_peer(root, subprocess_env())
  assert result["found"].keys() == pairs.keys()
  check_peer(result)


@pytest.mark.slow
def test_opens_in_transformers_4(exports, tmp_path, subprocess_env):
  """In an older release, which needs other versions of its dependencies."""
  command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps"]
  command += ["--target", str(tmp_path / "old"), *TRANSFORMERS_4]
  done = subprocess.run(command, capture_output=True, text=True)
  if done.returncode:
    pytest.skip(f"no Transformers 4: {done.stderr.strip()[-200:]}")
  env = subprocess_env()
  env["PYTHONPATH"] = str(tmp_path / "old")
  root, _ = exports
  result = run_peer(root, env, [f"{name}-" for name in zoo.SINCE_5])
  assert result["version"] == "4.57.6"
  check_peer(result)


@pytest.mark.slow  # only because of the fixture
def test_read_back(exports):
  """A pruned model is a model like any other."""
  root, pairs = exports
  for name, (config, params) in pairs.items():
    found, again = load.load(root / name)
    if name.endswith("-hf"):
      assert found == config, name
      equal = jax.tree.map(np.array_equal, again, params)
      assert jax.tree.all(equal), name
    else:
      groups = {*zip(found.kinds(), found.kv_groups, strict=True)}
      assert len(groups) == len({*found.kinds()}), name
      assert len({*found.ffn_widths}) == 1, name
      assert model_config.count_params(found) > model_config.count_params(
        config
      ), name


# Model, sizes that are left, and the parts of a layer that are cut.
OVER_TWO = [
  ("llama3", zoo.UNEVEN, ["mlp"]),
  ("llama_bias", {"K": (4, 2, 2), "F": (24, 17, 5)}, ["mlp", "self_attn"]),
  ("qwen2", zoo.HOLES, []),
]


@pytest.mark.slow
def test_cut_over_two_processes(animals, tmp_path, subprocess_env):
  """Attention only where each process gets as many KV heads of every layer."""
  tokens, pairs = animals["llama3"].tokens_BT[:1, :16], {}
  for name, sizes, _ in OVER_TWO:
    pairs[name] = zoo.cut(*load.load(animals[name].path), **sizes)
    save.save(*pairs[name], tmp_path / name, **quiet)
  np.save(tmp_path / "tokens.npy", tokens)
  command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
  command += ["--nproc_per_node=2", str(PEER.with_name("parallel_peer.py"))]
  command += [tmp_path / "tokens.npy", *(tmp_path / name for name in pairs)]
  done = subprocess.run(
    [str(word) for word in command],
    capture_output=True,
    text=True,
    env=subprocess_env(),
  )
  assert done.returncode == 0, done.stderr[-3000:]
  for name, _, parts in OVER_TWO:
    found, (config, params) = np.load(tmp_path / name / "out.npz"), pairs[name]
    assert [*found["parts"]] == parts
    expected = decoder.Decoder(config).apply({"params": params}, tokens)[0]
    np.testing.assert_allclose(found["logits"], expected, rtol=0, atol=1e-4)


def test_an_export_of_version_0_1(golden):
  """Its model_type is of its own, and so is its configuration class."""
  path = golden / OLD
  config, params = load.load(path)
  assert (config.kv_groups, config.ffn_widths) == ((2, 0, 1), (12, 5, 0))
  assert config.family == "llama"
  ids = np.arange(20)[None]
  found = decoder.Decoder(config).apply({"params": params}, ids)[0]
  expected = np.load(path / "logits.npy")
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


# model_type, and what Transformers' own fixes of tokenizers depend on besides.
KINDS = [
  ("llama", {}),
  ("mistral", {"transformers_version": "4.44.0"}),
  ("mistral", {"transformers_version": "5.3.0"}),
  ("qwen2", {}),
  ("phi3", {}),
  ("olmo2", {}),
  ("granite", {}),
  ("gemma2", {}),
]


NAMES = ["", "LlamaTokenizer", "GPT2Tokenizer"]  # that the parent gives


@pytest.mark.parametrize(
  "kind, fields, named",
  [
    (*kind, name)
    for kind in KINDS
    for name in NAMES
    if (kind[0], name) != ("gemma2", "")  # wants another vocabulary
  ],
)
def test_tokenizer_is_the_parents(kind, fields, named, tmp_path, shared_data):
  """As `AutoTokenizer` gives it, which asks nobody; also if saved by it."""
  import transformers

  parent, path = tmp_path / "parent", tmp_path / "export"
  config = dataclasses.replace(TINY, family=kind)
  config = dataclasses.replace(config, **families.FAMILIES[kind].fixed)
  if kind == "gemma2":
    config = dataclasses.replace(config, attn_scale=0.5, embed_scale=4.0)
  params = decoder.init_params(config, jax.random.key(0))
  save.save(config, params, parent, **quiet)
  zoo.rewrite_config(parent, **fields)
  tokenizer = shared_data / "tokenizers" / "minimind"
  shutil.copyfile(tokenizer / "tokenizer.json", parent / "tokenizer.json")
  if named:
    about = {"tokenizer_class": named, "eos_token": "<|im_end|>"}
    (parent / "tokenizer_config.json").write_text(json.dumps(about))
  pruned = zoo.cut(config, params, K=(2, 1), F=(12, 5))
  save.save(*pruned, path, source=parent, **quiet)
  assert list(path.glob("*.py"))
  text = "In 2024, 1234567 cats  ate\n\n\t3.14<|im_end|>pies <|im_start|>a"
  expected = transformers.AutoTokenizer.from_pretrained(parent)(text).input_ids
  again = transformers.AutoTokenizer.from_pretrained(path)
  assert again(text).input_ids == expected
  again.save_pretrained(path)
  again = transformers.AutoTokenizer.from_pretrained(path)
  assert again(text).input_ids == expected


def test_another_tokenizer_is_noticed(tmp_path, shared_data, monkeypatch):
  parent = tmp_path / "parent"
  params = decoder.init_params(TINY, jax.random.key(0))
  save.save(TINY, params, parent, **quiet)
  tokenizer = shared_data / "tokenizers" / "minimind"
  shutil.copyfile(tokenizer / "tokenizer.json", parent / "tokenizer.json")

  def digits(source, target):
    raw = json.loads(Path(source).read_text("utf-8"))
    before = {"type": "Digits", "individual_digits": True}
    raw["pre_tokenizer"] = {
      "type": "Sequence",
      "pretokenizers": [before, raw["pre_tokenizer"]],
    }
    Path(target).write_text(json.dumps(raw), "utf-8")

  monkeypatch.setattr(shutil, "copyfile", digits)
  with pytest.raises(RuntimeError, match="reads other tokens"):
    save.save(TINY, params, tmp_path / "out", source=parent, **quiet)
  # Of another type of model, that is nobody's fault, and said.
  zoo.rewrite_config(parent, model_type="mobilellm")
  said = []
  save.save(TINY, params, tmp_path / "out", source=parent, say=said.append)
  assert "model of type mobilellm, here to llama" in said[0]
  assert said[0] in (tmp_path / "out" / "README.md").read_text()
