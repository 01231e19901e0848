"""The baselines against recordings of each method's published code.

`golden/baselines` holds what that code did to two small random LLaMAs, one
with as many KV heads as query heads (mha) and one with fewer (gqa).
"""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from adapt_pruner_jax import axes, model, sharding
from adapt_pruner_jax.baselines import flap, shortgpt, slicegpt
from adapt_pruner_jax.config import Prune
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.model import ModelConfig, Rope

ROOT = pathlib.Path(__file__).parent / "golden" / "baselines"
LOGITS = {"rtol": 2e-3, "atol": 2e-3}


@functools.cache
def dense(name):
  """The pair in folder `name`; float16 files, float32 params."""
  fields = json.loads((ROOT / name / "config.json").read_text())
  K, L = fields["num_key_value_heads"], fields["num_hidden_layers"]
  config = ModelConfig(
    family="llama",
    V=fields["vocab_size"],
    D=fields["hidden_size"],
    G=fields["num_attention_heads"] // K,
    H=fields["head_dim"],
    K=(K,) * L,
    F=(fields["intermediate_size"],) * L,
    norm_eps=fields["rms_norm_eps"],
    rope=Rope(theta=fields["rope_theta"]),
    context=fields["max_position_embeddings"],
    tied=False,
  )
  tensors = load_file(ROOT / name / "model.safetensors")
  names = {
    "embedding": "model.embed_tokens",
    "final_norm": "model.norm",
    "lm_head": "lm_head",
    "attn_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    **{n: f"self_attn.{n}_proj" for n in "qkvo"},
    **{n: f"mlp.{n}_proj" for n in ("gate", "up", "down")},
  }

  def read(name_, layer, leaf):
    prefix = "" if layer is None else f"model.layers.{layer}."
    array = tensors[f"{prefix}{names[name_]}.weight"].astype(np.float32)
    if array.ndim == 2 and name_ != "embedding":
      array = array.T
    return jnp.asarray(array.reshape(leaf.shape))

  shapes = model.abstract_params(config, jnp.float32)
  return config, axes.map_named(read, shapes)


def array(*path):
  return np.load(ROOT.joinpath(*path).with_suffix(".npy"))


def trace(*path):
  return json.loads(ROOT.joinpath(*path, "trace.json").read_text())


def logits(config, params, tokens_BT):
  decoder = model.Decoder(config)
  return np.asarray(jax.jit(decoder.apply)({"params": params}, tokens_BT)[0])


def check_logits(pruned, name, case=""):
  found = logits(pruned.config, pruned.params, array(name, "eval_ids"))
  np.testing.assert_allclose(found, array(name, case, "logits"), **LOGITS)


def run(method, name, *, target=None, mesh=None, settings=None, **options):
  """A method on a golden model, with all of its calibration tokens."""
  config, params = dense(name)
  if mesh is not None:
    params = jax.device_put(params, sharding.param_shardings(params, mesh))
  return method.prune(
    config,
    params,
    settings or Prune(),
    lambda step: array(name, "calib"),
    target=target,
    batch=4,
    mesh=mesh,
    **options,
  )


@pytest.mark.parametrize("name", ["mha", "gqa"])
def test_dense_logits(name):
  found = logits(*dense(name), array(name, "eval_ids"))
  np.testing.assert_allclose(found, array(name, "logits"), rtol=1e-4, atol=1e-4)


# ---- SliceGPT ----------------------------------------------------------------


@pytest.mark.parametrize(
  "case",
  [
    "mha/slicegpt_d48",
    "mha/slicegpt_d48_keepmean",
    "mha/slicegpt_d64",
    "gqa/slicegpt_d48",
    "gqa/slicegpt_d64_keepmean",
  ],
)
def test_slicegpt_golden(case, monkeypatch):
  name, folder = case.split("/")
  want = trace(name, folder)
  eigenvalues = []

  def principal(covariance):
    eigenvalues.append(found := plain(covariance))
    return found

  plain = slicegpt.principal
  monkeypatch.setattr(slicegpt, "principal", principal)
  settings = Prune(slice_subtract_mean=want["demean_embeddings"])
  pruned = run(slicegpt, name, settings=settings, width=want["dim"])
  norms = 2 * 4 * want["dim"] + 64  # the tool has none: they no longer scale
  assert model.count_params(pruned.config) == want["params_sliced"] + norms
  np.testing.assert_allclose(
    [e[0] for e in eigenvalues],
    array(name, folder, "eigenvalues"),
    rtol=1e-4,
  )
  check_logits(pruned, name, folder)


@pytest.mark.parametrize("target", [200_000, 150_001])
def test_slicegpt_reaches_a_target(target):
  pruned = run(slicegpt, "gqa", target=target)
  size = model.count_params(pruned.config)
  assert size == pruned.trace[0]["params"]
  # No place could be one wider.
  widths = slicegpt.place_widths(pruned.config)
  assert max(widths[:-1]) - min(widths[:-1]) <= 1
  assert widths[-1] == 64
  for place in range(len(widths) - 1):
    more = [w + (i == place) for i, w in enumerate(widths)]
    wider = slicegpt.with_place_widths(pruned.config, more)
    assert size <= target < model.count_params(wider)


def test_slicegpt_says_what_it_can_reach():
  with pytest.raises(UserError, match="width of 1 .* remain"):
    run(slicegpt, "gqa", target=10_000)


# ---- ShortGPT ----------------------------------------------------------------


@pytest.mark.parametrize("name", ["mha", "gqa"])
def test_shortgpt_golden(name):
  want = trace(name, "shortgpt")
  pruned = run(shortgpt, name, layers=len(want["removed"]))
  influence = [layer["importance"] for layer in pruned.trace[0]["layers"]]
  np.testing.assert_allclose(
    np.array(influence) * want["tokens"],
    want["bi_sum_raw_block_outputs"],
    rtol=1e-4,
  )
  assert np.argsort(influence).tolist() == want["order_raw"]
  assert [i for i in range(4) if pruned.config.K[i]] == want["kept"]
  assert pruned.config.F == tuple(176 * (k > 0) for k in pruned.config.K)
  check_logits(pruned, name, "shortgpt")


# ---- FLAP --------------------------------------------------------------------

FLAP = sorted(path.name for path in (ROOT / "mha").glob("flap_*_p*"))


@functools.cache
def moments():
  """Statistics of the MHA model, and what was recorded of them."""
  mesh = sharding.make_mesh(devices=jax.local_devices()[:1])
  return flap.statistics(*dense("mha"), array("mha", "calib"), 3, mesh)


@pytest.mark.parametrize("unit, part", [("K", "attn"), ("F", "mlp")])
def test_flap_statistics(unit, part):
  for field, recorded in [
    ("mean", "mean"),
    ("fluctuation", "fluc"),
    ("square", "sqnorm"),
  ]:
    found = [getattr(m, field).ravel() for m in moments()[unit]]
    want = array("mha", f"flap_stat_{part}_{recorded}")
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("case", FLAP)
def test_flap_golden(case, monkeypatch):
  monkeypatch.setattr(flap, "statistics", lambda *_: moments())
  want = trace("mha", case)
  settings = Prune(
    flap_metric=want["metrics"],
    flap_structure=want["structure"].replace("-", ""),
  )
  groups = want["remove_heads"] if want["remove_heads"] >= 0 else None
  pruned = run(
    flap,
    "mha",
    settings=settings,
    ratio=want["pruning_ratio"],
    groups=groups,
  )
  assert [k.tolist() for k in pruned.kept["K"]] == [
    np.flatnonzero(k).tolist() for k in want["head_keep"]
  ]
  assert [
    sorted(set(range(176)) - set(k.tolist())) for k in pruned.kept["F"]
  ] == want["ffn_pruned"]
  assert model.count_params(pruned.config) == want["params_total"]
  for name in ("o_bias", "down_bias"):
    found = [pruned.params[f"layer_{i}"][name] for i in range(4)]
    np.testing.assert_allclose(
      found, array("mha", case, name), rtol=1e-4, atol=1e-5
    )
  check_logits(pruned, "mha", case)
