import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adapt_pruner_jax.data.tokenizer import load_tokenizer
from adapt_pruner_jax.distributed import sharding
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.evaluation import evaluate, perplexity
from adapt_pruner_jax.formats import convert
from adapt_pruner_jax.formats.hf import load
from adapt_pruner_jax.models import axes, decoder, model_config
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.models.rope import Rope
from tests import small

CONFIG = ModelConfig(
  family="llama",
  vocab_size=48,
  hidden_size=16,
  queries_per_group=2,
  head_dim=8,
  kv_groups=(3, 1),
  ffn_widths=(20, 13),
  norm_eps=1e-5,
  rope=Rope(),
  context=32,
  tied=True,
)


@jax.jit
def log_probs(params, tokens_BT):
  """Of the first row, [T, V]."""
  logits_BTV, _ = decoder.Decoder(CONFIG).apply({"params": params}, tokens_BT)
  return jax.nn.log_softmax(logits_BTV[0])


@pytest.fixture(scope="module")
def params():
  rng = np.random.default_rng(0)
  return axes.map_named(
    lambda name, _, leaf: np.float32(
      name.endswith("norm") + 0.3 * rng.normal(size=leaf.shape)
    ),
    model_config.abstract_params(CONFIG, jnp.float32),
  )


def text(length):
  return np.random.default_rng(1).integers(0, CONFIG.vocab_size, length)


def by_hand(params, tokens, seq_len):
  """Summed nll of each window on its own, and the tokens it predicts."""
  total, count = 0.0, 0
  for start in range(0, len(tokens), seq_len):
    window = tokens[start : start + seq_len]
    found = np.asarray(log_probs(params, window[None]))
    for at in range(1, len(window)):
      total -= float(found[at - 1, window[at]])
      count += 1
  return total, count


@pytest.mark.parametrize("length, seq_len", [(37, 8), (32, 8), (33, 8), (5, 8)])
def test_perplexity_equals_each_window_alone(params, length, seq_len):
  """37: a short last window; 33: a last window that predicts nothing."""
  tokens = text(length)
  total, count = by_hand(params, tokens, seq_len)
  found = perplexity.perplexity(CONFIG, params, tokens, seq_len, batch=2)
  assert found[2] == count
  assert found[1] == pytest.approx(total, rel=1e-5)
  assert found[0] == pytest.approx(math.exp(total / count), rel=1e-5)


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("length", [36, 35, 29, 5, 1])
def test_windows_with_a_begin_token(params, length, given):
  """Each is the token and seven of text; all of the text is predicted once."""
  begin, tokens = 7, text(length)
  tokens[tokens == begin] = 3
  total, count = 0.0, 0
  for start in range(0, length, 7):
    window = np.append(begin, tokens[start : start + 7])
    found = by_hand(params, window, len(window))
    total, count = total + found[0], count + found[1]
  assert count == length
  if given:  # by the tokenizer, in front of the whole text
    tokens = np.append(begin, tokens)
  if len(tokens) < 2:
    return
  found = perplexity.perplexity(
    CONFIG, params, tokens, 8, batch=2, begin_id=begin
  )
  assert found[2] == length
  assert found[1] == pytest.approx(total, rel=1e-5)


def test_batch_and_mesh_do_not_matter(params):
  tokens = text(101)
  expected = perplexity.perplexity(CONFIG, params, tokens, 8, batch=13)
  mesh = sharding.make_mesh(2, 2, 2)
  placed = jax.device_put(params, sharding.param_shardings(params, mesh))
  found = perplexity.perplexity(CONFIG, placed, tokens, 8, batch=3, mesh=mesh)
  assert found == pytest.approx(expected, rel=1e-5)


def test_one_compiled_shape(params):
  perplexity._window_loss.clear_cache()
  perplexity.perplexity(CONFIG, params, text(8 * 5 + 3), 8, batch=2)
  assert perplexity._window_loss._cache_size() == 1


def test_ruined_model_is_infinite_not_an_error(params):
  ruined = params | {"embedding": params["embedding"] * 1e4}
  found = perplexity.perplexity(CONFIG, ruined, text(20), 8, batch=2)
  assert found[0] == math.inf
  assert found[1] > 700


@pytest.mark.parametrize(
  "tokens, message",
  [
    ([], "at least 2 tokens, the text has 0"),
    ([3], "at least 2 tokens, the text has 1"),
    ([3, 48], "token id 48 is outside the model's vocabulary of 48"),
    ([-1, 3], "token id -1 is outside"),
  ],
)
def test_bad_tokens(params, tokens, message):
  with pytest.raises(UserError, match=message):
    perplexity.perplexity(CONFIG, params, np.array(tokens, int), 8, batch=2)


def test_bad_window(params):
  with pytest.raises(UserError, match="use 2 or more"):
    perplexity.perplexity(CONFIG, params, text(20), 1, batch=2)


def test_equals_transformers(tmp_path):
  """On a model saved by Transformers, window after window."""
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  torch.manual_seed(0)
  peer = transformers.LlamaForCausalLM(
    transformers.LlamaConfig(
      vocab_size=48,
      hidden_size=32,
      intermediate_size=40,
      num_hidden_layers=2,
      num_attention_heads=4,
      num_key_value_heads=2,
      initializer_range=0.3,
      max_position_embeddings=64,
    )
  ).eval()
  peer.save_pretrained(tmp_path)
  config, params = load.load(tmp_path, "float32")
  tokens = text(75)
  total, count = 0.0, 0
  for start in range(0, len(tokens), 16):
    window = torch.tensor(tokens[None, start : start + 16])
    with torch.no_grad():
      mean = peer(window, labels=window).loss.item()
    total += mean * (window.shape[1] - 1)
    count += window.shape[1] - 1
  found = perplexity.perplexity(config, params, tokens, 16, batch=2)
  assert found[1:] == (pytest.approx(total, rel=1e-4), count)


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
  file = tmp_path_factory.mktemp("text") / "text.txt"
  file.write_text("The with statement wraps a block of code. " * 20)
  return str(file)


def test_orbax_is_as_good_as_hf(small_model, text_file, tmp_path):
  convert.convert(str(small_model), tmp_path / "orbax", "orbax")
  expected, found = (
    evaluate.evaluate(str(folder), ["perplexity"], text=text_file)
    for folder in (small_model, tmp_path / "orbax")
  )
  assert found.pop("model") != expected.pop("model")
  assert found == expected


@pytest.mark.slow
def test_orbax_of_what_slicegpt_cuts(small_model, text_file, tmp_path):
  """By the decoder, and by the scorer of tasks; and in a work directory."""
  lm = pytest.importorskip("adapt_pruner_jax.evaluation.lm_eval_model")
  cut = dataclasses.replace(
    load.read_config(str(small_model)),
    tied=False,
    residual=((32, 20, 24), (24, 24, 16), (16, 30, 28)),
  )
  params = small.random_params(cut)
  folder = tmp_path / "model"
  convert.write(cut, params, folder, "orbax", source=small_model)
  found = evaluate.evaluate(str(folder), ["perplexity"], text=text_file)
  tokenizer = load_tokenizer(small_model)
  expected = perplexity.text_perplexity(cut, params, tokenizer, text_file)
  assert found["params"] == model_config.count_params(cut)
  assert found["nll"] == pytest.approx(expected["nll"], rel=1e-6)
  scorer = lm.JaxLM(cut, params, tokenizer)
  ((total, _),) = scorer.score([([5], [6, 7, 8])])
  row = np.array([[5, 6, 7]])
  logits, _ = decoder.Decoder(cut).apply({"params": params}, row)
  log_probs = jax.nn.log_softmax(logits[0])
  by_decoder = sum(log_probs[i, token] for i, token in enumerate((6, 7, 8)))
  assert total == pytest.approx(float(by_decoder), rel=1e-5)
  with pytest.raises(UserError, match="is a work directory; its model is"):
    evaluate.evaluate(str(tmp_path), ["perplexity"], text=text_file)


@pytest.mark.parametrize("bos", ["auto", "none"])
def test_begin_token_equals_transformers(shared_data, tmp_path, bos):
  """Of a trained model whose tokenizer adds one: its losses on the windows."""
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  path = shared_data / "models" / "stories260K"
  peer = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
  theirs = transformers.AutoTokenizer.from_pretrained(path)
  text = (shared_data / "text" / "tinystories_heldout.txt").read_text()[:3000]
  (tmp_path / "text.txt").write_text(text)
  whole = theirs(text)["input_ids"]
  begin = theirs.bos_token_id
  assert whole[0] == begin
  if bos == "none":
    windows = [whole[i : i + 64] for i in range(0, len(whole), 64)]
  else:
    rest = whole[1:]
    windows = [[begin, *rest[i : i + 63]] for i in range(0, len(rest), 63)]
  nll = count = 0
  for window in windows:
    ids = torch.tensor([window])
    with torch.no_grad():
      log_probs = torch.log_softmax(peer(ids).logits[0, :-1].double(), -1)
    nll -= float(log_probs.gather(-1, ids[0, 1:, None]).sum())
    count += len(window) - 1
  config, params = load.load(str(path))
  found = perplexity.text_perplexity(
    config, params, load_tokenizer(path, bos), tmp_path / "text.txt", 64
  )
  assert found["tokens"] == count
  assert found["perplexity"] == pytest.approx(math.exp(nll / count), rel=1e-4)
  assert found["bos"] == bos
  assert found["begin_token"] == ("<s>" if bos == "auto" else None)
  if bos == "auto":
    assert count == len(whole) - 1
    words = found["word_perplexity"]
    assert words == pytest.approx(math.exp(nll / len(text.split())), rel=1e-4)
