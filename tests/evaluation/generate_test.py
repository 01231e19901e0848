"""Truth: the forward without a cache, and Transformers' own generate."""

import dataclasses

import jax
import numpy as np
import pytest

from adapt_pruner_jax.distributed import sharding
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.evaluation import generate
from adapt_pruner_jax.models import axes, model_config
from adapt_pruner_jax.models.decoder import Decoder
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.models.rope import Rope
from tests import small

# Two families' worth of oddities; layers without attention, and without MLP.
PLAIN = ModelConfig(
  family="llama",
  vocab_size=48,
  hidden_size=16,
  queries_per_group=2,
  head_dim=8,
  kv_groups=(3, 0, 1),
  ffn_widths=(20, 13, 0),
  norm_eps=1e-5,
  rope=Rope(),
  context=128,
  tied=True,
  eos_ids=(47,),
)
ODD = ModelConfig(
  family="gemma3",
  vocab_size=48,
  hidden_size=16,
  queries_per_group=1,
  head_dim=8,
  kv_groups=(2, 1),
  ffn_widths=(12, 9),
  norm_eps=1e-5,
  rope=Rope(theta=1e4, kind="linear", factor=2.0),
  local_rope=Rope(theta=100.0),
  window=(3, 0),
  context=128,
  tied=False,
  qk_norm="head",
  norm_order="sandwich",
  attn_softcap=5.0,
  final_softcap=9.0,
  embed_scale=4.0,
)
# A memory in place of a cache, or a cache of other sizes, before one of keys.
SECOND = {
  option: dataclasses.replace(
    small.option(option).with_layers([1, 2]), vocab_size=48, context=128
  )
  for option in ("delta", "wide")
}
SECOND["shared"] = dataclasses.replace(  # keys and values of an earlier layer
  small.option("shared"), vocab_size=48, context=128
)
PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10, 3, 3], [11]]
WARM = generate.Sampling(1.0)
NEW = 40  # more than one chunk


def params_of(config, seed=0):
  rng = np.random.default_rng(seed)
  return axes.map_named(
    lambda name, _, leaf: np.float32(
      name.endswith("norm") + 0.6 * rng.normal(size=leaf.shape)
    ),
    model_config.abstract_params(config, np.float32),
  )


@pytest.fixture(scope="module")
def plain():
  return params_of(PLAIN)


def uncached(config, params, prompt, number):
  """Greedy with the whole forward again for each token, padded on the right."""
  decoder = Decoder(config)
  forward = jax.jit(lambda params, rows: decoder.apply(params, rows)[0])
  row = np.zeros((1, len(prompt) + number), np.int32)
  row[0, : len(prompt)] = prompt
  for at in range(len(prompt), row.shape[1]):
    row[0, at] = np.argmax(forward({"params": params}, row)[0, at - 1])
  return row[0, len(prompt) :].tolist()


@pytest.mark.slow
@pytest.mark.parametrize("option", SECOND)
def test_two_kinds_go_on_as_the_forward_without_cache(option):
  """Prompts shorter than convolutions of gated delta nets, and longer."""
  config = SECOND[option]
  params = params_of(config)
  found = generate.generate(config, params, PROMPTS, NEW, eos_ids=())
  rows = np.zeros((len(PROMPTS), max(map(len, PROMPTS)) + NEW), np.int32)
  for row, prompt, new in zip(rows, PROMPTS, found, strict=True):
    row[: len(prompt) + NEW] = prompt + new  # what is behind is not seen
  logits_BTV, _ = jax.jit(Decoder(config).apply)({"params": params}, rows)
  for logits_TV, prompt, new in zip(logits_BTV, PROMPTS, found, strict=True):
    at = len(prompt) - 1
    assert logits_TV[at : at + NEW].argmax(-1).tolist() == new


@pytest.mark.parametrize("config", [PLAIN, ODD], ids=["plain", "odd"])
def test_greedy_equals_the_forward_without_cache(config):
  params = params_of(config)
  found = generate.generate(config, params, PROMPTS, NEW, eos_ids=())
  for prompt, new in zip(PROMPTS, found, strict=True):
    assert new == uncached(config, params, prompt, NEW)
  assert (
    len({token for new in found for token in new}) > 9
  )  # not what any model would give


def test_ends_with_the_end_token(plain):
  whole = generate.generate(PLAIN, plain, PROMPTS, NEW, eos_ids=())
  end = whole[1][5]
  found = generate.generate(PLAIN, plain, PROMPTS, NEW, eos_ids=(end, 1000))
  for old, new in zip(whole, found, strict=True):
    at = old.index(end) + 1 if end in old else len(old)
    assert new == old[:at]


def test_finished_ends_a_row_at_a_chunk(plain):
  whole = generate.generate(PLAIN, plain, PROMPTS, 70, eos_ids=())
  found = generate.generate(
    PLAIN,
    plain,
    PROMPTS,
    70,
    eos_ids=(),
    finished=lambda new: new == whole[1][:32],
  )
  assert found == [whole[0], whole[1][: generate.CHUNK], whole[2]]


def test_mesh_does_not_matter(plain):
  expected = generate.generate(PLAIN, plain, PROMPTS, NEW)
  mesh = sharding.make_mesh(2, 2, 2)
  placed = jax.device_put(plain, sharding.param_shardings(plain, mesh))
  assert generate.generate(PLAIN, placed, PROMPTS, NEW, mesh=mesh) == expected


def test_sampling_follows_the_softmax():
  """Many rows of the same logits, to 5 sigma."""
  logits = np.random.default_rng(0).normal(0, 2, 12).astype(np.float32)
  expected = np.asarray(jax.nn.softmax(logits / 1.7))
  number = 20_000
  drawn = generate._draw(
    np.tile(logits, (number, 1)), jax.random.key(0), generate.Sampling(1.7)
  )
  found = np.bincount(drawn, minlength=12) / number
  assert np.all(abs(found - expected) < 5 * np.sqrt(expected / number) + 1e-4)


@pytest.mark.parametrize(
  "sampling, allowed",
  [
    (generate.Sampling(1.0, top_k=2), {1, 3}),
    (generate.Sampling(1.0, top_p=0.5), {3}),
    (generate.Sampling(1.0, top_p=0.75), {1, 3}),
    (generate.Sampling(1.0, top_k=3, top_p=0.999), {0, 1, 3}),
    (generate.Sampling(0.0), {3}),
  ],
)
def test_top_k_and_top_p(sampling, allowed):
  logits = np.log(np.array([[0.15, 0.2, 0.05, 0.6]], np.float32))
  keys = jax.random.split(jax.random.key(0), 500)
  draw = jax.vmap(lambda key: generate._draw(logits, key, sampling))
  assert set(np.asarray(draw(keys)).ravel().tolist()) == allowed


def test_a_row_draws_the_same_beside_others(plain):
  alone = generate.generate(PLAIN, plain, PROMPTS[:1], 20, WARM, seed=3)
  beside = generate.generate(PLAIN, plain, PROMPTS, 20, WARM, seed=3)
  other = generate.generate(PLAIN, plain, PROMPTS, 20, WARM, seed=4)
  assert alone[0] == beside[0] != other[0]


def test_one_compilation_for_alike_lengths(plain):
  generate.decode.clear_cache()
  for length in (3, 20, 32):
    generate.generate(PLAIN, plain, [[1] * length], 5)
  assert generate.decode._cache_size() == 1


@pytest.mark.parametrize(
  "prompts, number, options, message",
  [
    ([], 3, {}, "at least one token"),
    ([[1], []], 3, {}, "at least one token"),
    ([[48]], 3, {}, "token id 48 is outside the model's vocabulary of 48"),
    ([[-1]], 3, {}, "token id -1 is outside"),
    ([[1]], 0, {}, "max_new_tokens=0 must be at least 1"),
    ([[1] * 100], 29, {}, "context of 128: .* at most 28 new tokens"),
    ([[1]], 3, {"sampling": generate.Sampling(-1.0)}, "temperature=-1.0"),
    ([[1]], 3, {"sampling": generate.Sampling(top_p=0.0)}, "top_p=0.0 in"),
  ],
)
def test_bad_requests(plain, prompts, number, options, message):
  with pytest.raises(UserError, match=message):
    generate.generate(PLAIN, plain, prompts, number, **options)


def test_equals_transformers(shared_data):
  """Greedy on a real model, three prompts of different lengths at once."""
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  from adapt_pruner_jax.data.tokenizer import load_tokenizer
  from adapt_pruner_jax.formats.hf import load

  path = shared_data / "models" / "stories260K"
  config, params = load.load(path, "float32")
  tokenizer = load_tokenizer(path)
  peer = transformers.AutoModelForCausalLM.from_pretrained(
    path, dtype=torch.float32
  ).eval()
  texts = ["Once upon a time", "The dog", "Lily and Tom went to the park and"]
  prompts = [tokenizer.encode(text) for text in texts]
  found = generate.generate(config, params, prompts, 60)
  for prompt, new in zip(prompts, found, strict=True):
    with torch.no_grad():
      expected = peer.generate(
        torch.tensor([prompt]), max_new_tokens=60, do_sample=False
      )
    assert new == expected[0, len(prompt) :].tolist()
  assert tokenizer.backend.decode(found[0]).startswith(
    ", there was a little girl named Lily. She loved to play outside"
  )
