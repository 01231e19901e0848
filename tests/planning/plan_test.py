import dataclasses
import json
import math
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adapt_pruner_jax.config import Config, Prune, Train
from adapt_pruner_jax.distributed import sharding
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.formats import convert
from adapt_pruner_jax.formats.hf import load
from adapt_pruner_jax.models import flops, model_config
from adapt_pruner_jax.models.decoder import Decoder
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.models.rope import Rope
from adapt_pruner_jax.planning import (
  advice,
  compiling,
  cost,
  disk,
  memory,
  plan,
  training_memory,
)
from adapt_pruner_jax.planning.hardware import Hardware, resolve
from adapt_pruner_jax.pruning import targets

SMALL = ModelConfig(
  "llama", 512, 64, 2, 16, (4,) * 4, (96,) * 4, 1e-5, Rope(), 128, False
)
LLAMA_8B = ModelConfig(
  "llama", 128256, 4096, 4, 128, (8,) * 32, (14336,) * 32, 1e-5, Rope(), 8192,
  False,
)  # fmt: skip
LLAMA_8B_JSON = {
  "architectures": ["LlamaForCausalLM"],
  "hidden_act": "silu",
  "hidden_size": 4096,
  "intermediate_size": 14336,
  "max_position_embeddings": 131072,
  "model_type": "llama",
  "num_attention_heads": 32,
  "num_hidden_layers": 32,
  "num_key_value_heads": 8,
  "rms_norm_eps": 1e-05,
  "rope_scaling": {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
  },
  "rope_theta": 500000.0,
  "tie_word_embeddings": False,
  "torch_dtype": "bfloat16",
  "vocab_size": 128256,
}


@pytest.fixture(autouse=True)
def no_tpu_compiler(monkeypatch):
  """Stand-ins take a TPU's place, whether libtpu is installed or not."""
  monkeypatch.setattr(compiling, "has_compiler", lambda: False)


def recipe(**fields):
  """A Config; `recipe(prune__ratio=0.2)` sets prune.ratio."""
  config = Config()
  config.prune.ratio = 0.2
  config.calibration.samples, config.calibration.batch = 16, 8
  config.data.batch, config.data.seq_len = 8, 32
  for name, value in fields.items():
    section, field = name.split("__")
    setattr(getattr(config, section), field, value)
  return config


def one_device():
  return sharding.make_mesh(devices=jax.devices()[:1])


# ---- Sizes, tokens, FLOPs ----------------------------------------------------


@pytest.mark.parametrize("ratio", [0.05, 0.2, 0.5, 0.6])
def test_even_pruning_ends_just_below_the_target(ratio):
  full = SMALL
  settings = recipe(prune__ratio=ratio).prune
  target = targets.resolve_target(full, settings)
  config = cost.evenly(full, settings, target)
  size = model_config.count_params(config)
  a_channel_everywhere = model_config.unit_cost(full)["F"] * full.num_layers
  assert target - a_channel_everywhere < size <= target
  assert len(set(config.kv_groups)) == len(set(config.ffn_widths)) == 1
  assert 1 <= config.kv_groups[0] <= 4
  # Groups and channels lose about the same share.
  assert abs(config.kv_groups[0] / 4 - config.ffn_widths[0] / 96) < 0.3


def test_even_pruning_keeps_to_its_layers_and_blocks():
  settings = recipe(
    prune__attention_layers="1:3", prune__mlp_layers="2:4",
    prune__round_ffn_to=8,
  ).prune  # fmt: skip
  config = cost.evenly(
    SMALL, settings, int(0.9 * model_config.count_params(SMALL))
  )
  assert [config.kv_groups[i] for i in (0, 3)] == [4] * 2
  assert config.ffn_widths[:2] == (96, 96)
  assert config.ffn_widths[2] < 96
  assert all(f % 8 == 0 for f in config.ffn_widths)


def test_stages_by_hand():
  """20 % in two stages; 2:1 of 30 steps of 8 x 32 tokens."""
  config = recipe(prune__stages=2, train__tokens=30 * 256)
  size = model_config.count_params(SMALL)
  rows = cost.stage_table(config, SMALL, int(0.8 * size))
  assert [r["train_steps"] for r in rows] == [10, 20]
  assert [r["train_tokens"] for r in rows] == [2560, 5120]
  assert rows[0]["params"] <= 0.9 * size
  assert rows[1]["params"] <= 0.8 * size
  # A stage takes a tenth of the model; what may be pruned is most of it.
  prunable = size - 2 * 512 * 64 - 9 * 64
  steps = math.ceil((size - rows[0]["params"]) / prunable / 0.02)
  assert rows[0]["prune_steps"] == steps


def test_max_steps_without_a_target():
  config = recipe(prune__ratio=0.0, prune__max_steps=5)
  rows = cost.stage_table(config, SMALL, None)
  assert [r["prune_steps"] for r in rows] == [5]
  prunable = model_config.count_params(SMALL) - 2 * 512 * 64 - 9 * 64
  assert rows[0]["params"] <= model_config.count_params(SMALL) - 0.1 * prunable


def test_flops_are_those_of_the_compiled_model():
  """The forward pass, counted by XLA."""
  config = dataclasses.replace(
    SMALL, kv_groups=(4, 2, 1, 3), ffn_widths=(96, 40, 8, 64)
  )
  tokens = jax.ShapeDtypeStruct((4, 64), jnp.int32)
  params = model_config.abstract_params(config, jnp.float32)
  forward = jax.jit(lambda p, t: Decoder(config).apply({"params": p}, t)[0])
  counted = forward.lower(params, tokens).compile().cost_analysis()["flops"]
  mine = 4 * 64 * sum(flops.forward_flops(config, 64))
  assert mine < counted < 1.15 * mine


def test_flops_of_scoring_8b():
  """N (8 Np + 4 Nh): 1.9e15 for 512 x 64 tokens, and a little attention."""
  config = recipe(calibration__samples=512, calibration__seq_len=64)
  inside, matrix = 6_979_588_096, 128256 * 4096
  assert model_config.count_params(LLAMA_8B) == inside + 2 * matrix
  found = cost.scoring_flops(LLAMA_8B, config)
  assert found == pytest.approx(512 * 64 * (8 * inside + 4 * matrix), rel=0.005)
  config.prune.group_importance = "l1"
  assert cost.scoring_flops(LLAMA_8B, config) < found / 3
  config.prune.method, config.prune.group_importance = "curvature", ""
  grams = 32 * (2 * 4096**2 + 4096**2 + 14336**2)
  assert cost.scoring_flops(LLAMA_8B, config) == pytest.approx(
    512 * 64 * (6 * inside + 4 * matrix + 2 * grams), rel=0.005
  )


# ---- Memory ------------------------------------------------------------------


def test_held_memory_is_what_the_arrays_take():
  config = recipe(train__tokens=1000, train__distill_alpha=0.5)
  config.train.remat = "none"
  mesh = one_device()
  student = cost.evenly(SMALL, config.prune, 150_000)
  held = training_memory.estimated_training(config, SMALL, student, mesh)
  assert held["weights"] == 4 * model_config.count_params(student)
  assert held["optimizer"] == 8 * model_config.count_params(student) + 4
  assert held["teacher"] == 4 * model_config.count_params(SMALL)


def test_weights_are_cut_over_the_devices():
  config = recipe(train__tokens=1000, mesh__fsdp=4, mesh__tensor=2)
  config.train.remat = "none"
  mesh = sharding.make_mesh(1, 4, 2)
  held = training_memory.estimated_training(config, SMALL, SMALL, mesh)
  shapes = model_config.abstract_params(SMALL, jnp.float32)
  zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
  params = jax.device_put(zeros, sharding.param_shardings(zeros, mesh))
  here = sum(
    x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(params)
  )
  assert held["weights"] == here


def test_training_memory():
  """Two and three layers stand for four; the estimate is near.

  Without rematerialisation, which the CPU's compiler undoes.
  """
  settings = {"train__tokens": 1000, "train__remat": "none"}
  config, mesh = recipe(**settings), one_device()
  found = training_memory.training(config, SMALL, SMALL, mesh)
  whole = training_memory.compiled_train(
    config, SMALL, SMALL, SMALL.num_layers, mesh
  )
  assert found["temporary"] == pytest.approx(whole, rel=0.05)
  guess = training_memory.estimated_training(config, SMALL, SMALL, mesh)
  assert 0.75 < sum(guess.values()) / sum(found.values()) < 1.35


def test_stand_ins_in_a_process_of_their_own():
  """16 devices, of which this process has 8."""
  config = recipe(calibration__batch=16, data__batch=16, train__tokens=1000)
  found = memory.measure(config, SMALL, SMALL, 16)
  size = model_config.count_params(SMALL)
  scored, trained = found["scoring"], found["training"]
  assert scored["stacked copy"] == pytest.approx(4 * size / 16, rel=0.05)
  assert trained["optimizer"] == pytest.approx(8 * size / 16, rel=0.05)
  assert scored["temporary"] > 0


@pytest.mark.slow
def test_curvature_and_refit():
  """A refit holds two models, two streams and Gram matrices."""
  config = recipe(
    prune__method="curvature", prune__refit="5", calibration__refit_samples=64
  )
  found = memory.measure(config, SMALL, SMALL, jax.devices()[:1])
  assert found.keys() == {"scoring", "refit"}
  size = 4 * model_config.count_params(SMALL)
  assert found["scoring"]["stacked copy"] >= size
  refit, T = found["refit"], config.calibration.seq_len
  assert refit["weights"] == 2 * size
  a_minibatch = 8 * T * SMALL.hidden_size * 4
  assert refit["streams"] == 2 * 64 * T * SMALL.hidden_size * 4 + a_minibatch
  C = SMALL.kv_groups[0] * SMALL.queries_per_group * SMALL.head_dim
  assert refit["least squares"] == 2 * 4 * (C * C + C * SMALL.hidden_size)
  assert refit["temporary"] >= 4 * C * C  # the factor
  config.prune.refit_all = True
  narrow = dataclasses.replace(
    SMALL,
    kv_groups=(1,) * SMALL.num_layers,
    ffn_widths=(64,) * SMALL.num_layers,
  )
  found = memory.measure(config, narrow, narrow, jax.devices()[:1])["refit"]
  # gate and up, from D channels to twice F
  assert found["least squares"] == 2 * 4 * (64 * 64 + 64 * 128)
  fewer = dataclasses.replace(
    SMALL, ffn_widths=(SMALL.ffn_widths[0] // 2,) * SMALL.num_layers
  )
  gone = model_config.count_params(SMALL) - model_config.count_params(fewer)
  assert cost.prune_steps(SMALL, fewer, SMALL, config.prune) == math.ceil(
    gone / (0.05 * model_config.count_params(SMALL))
  )


@pytest.mark.slow
def test_scoring_memory_does_not_grow_with_the_windows():
  """But for the sums that are handed on, once there is more than a pass."""

  def scored(samples):
    config = recipe(
      prune__method="curvature",
      calibration__samples=samples,
      calibration__pass_tokens=16 * 64,
    )
    return memory.measure(config, SMALL, SMALL, jax.devices()[:1])["scoring"]

  one, few, many = scored(16), scored(32), scored(4096)
  assert few == many
  sizes = SMALL.ffn_widths[0], 4 * 2 * 16, SMALL.hidden_size, SMALL.hidden_size
  grams = 4 * 4 * sum(size**2 for size in sizes)
  assert few["sums between passes"] == grams + 8  # and two counts
  assert "sums between passes" not in one
  assert few["temporary"] < 1.1 * one["temporary"]


def test_batches_that_do_not_fit_the_devices():
  with pytest.raises(UserError, match=r"config\.data\.batch a multiple of 6"):
    memory.measure(recipe(train__tokens=99), SMALL, SMALL, 6)
  with pytest.raises(UserError, match="multiple of 16"):  # from the process
    memory.measure(recipe(train__tokens=99), SMALL, SMALL, 16)
  with pytest.raises(UserError, match="does not match the 6 device"):
    memory.measure(recipe(mesh__tensor=4), SMALL, SMALL, 6)


# ---- The whole ---------------------------------------------------------------


def test_plan_of_the_tiny_model(capsys):
  config = recipe(prune__stages=2, train__tokens=5000)
  found = plan.plan(config, Hardware("v5e", devices=4, mfu=0.5))
  json.dumps(found)
  out = capsys.readouterr().out
  assert f"tiny: {found['params']:,} parameters" in out
  assert "4 x TPU v5e" in out
  assert found["target_params"] == math.floor(found["params"] * 0.8)
  assert found["hours_of"]["training"] == pytest.approx(
    sum(s["train_flops"] for s in found["stages"]) / (4 * 197e12 * 0.5) / 3600
  )
  assert found["hours"] == sum(found["hours_of"].values())
  assert re.search(r"compiling +7 min 00 s", out)  # scoring and two stages
  last = found["stages"][-1]["params"]
  assert found["disk"]["export"] == 4 * last
  assert found["disk"]["original"] == 4 * found["params"]
  size = f"{found['params'] * 4 / 1e6:.2f} MB"
  assert re.search(rf"original on disk +{size}", out)
  assert found["disk"]["checkpoint"] == 12 * found["stages"][0]["params"]
  assert [w for w in found["warnings"] if "needs" in w] == []


def test_plan_says_what_to_change(capsys):
  config = recipe(train__tokens=5000, prune__max_steps=1)
  tiny_memory = Hardware(devices=1, memory=4e6, peak=1e12)
  found = plan.plan(config, tiny_memory)
  text = "\n".join(found["warnings"])
  assert "scoring needs" in text
  assert "training needs" in text
  assert "--config.train.lora_rank=16" in text
  assert "--config.mesh.fsdp=-1" in text
  assert "prune.max_steps=1 ends a stage above its target" in text
  assert "--config.train.dtype=bfloat16" in text
  assert "--config.prune.stream_layers=True" in text
  assert "WARNING: scoring needs" in capsys.readouterr().out


def test_plan_says_what_a_target_buys(monkeypatch, capsys):
  """In every unit, by hand; all limits are kept."""
  monkeypatch.setattr(memory, "measure", lambda *_: {})
  config = recipe(
    prune__ratio=0.3,
    prune__budget="bytes",
    prune__budget_export="q8_0",
    prune__limits="kv_bytes=100000",
    prune__budget_context=64,
  )
  found = plan.plan(config)
  assert found["budget_after"] <= found["budget_target"]
  assert found["budget_target"] <= 0.7 * found["budget_before"]
  every = {row["budget"]: row for row in found["budgets"]}
  assert {*every} == {"params", "flops", "bytes", "kv_bytes"}
  full, _ = plan.original(config)
  whole = full.num_layers * full.kv_groups[0] * full.head_dim
  assert every["kv_bytes"]["before"] == 2 * 2 * 64 * whole
  assert every["kv_bytes"]["after"] <= 100000
  assert every["params"]["before"] == found["params"]
  # With what a file has beside weights.
  assert found["budget_before"] > every["bytes"]["before"]
  out = capsys.readouterr().out
  assert "bytes of q8_0" in out
  assert "at most 100,000.0 of kv_bytes" in out


def test_a_frozen_base_has_the_bytes_of_its_type():
  config = recipe(train__tokens=5000, train__lora_rank=2)
  mesh = sharding.one_device()
  held = lambda: training_memory.held(config, SMALL, SMALL, mesh)["weights"]
  whole, number = held(), model_config.count_params(SMALL)
  config.model.dtype = "bfloat16"
  assert whole - held() == 2 * number
  config.train.lora_base = "int8"
  shapes = model_config.param_shapes(SMALL)["layer_0"]
  inside = sum(math.prod(s) for n, s in shapes.items() if "norm" not in n)
  less = whole - held() - 2 * (number - 4 * inside)
  assert 2.9 * 4 * inside < less < 3 * 4 * inside  # scales take a few


def test_a_plan_times_nothing():
  with pytest.raises(UserError, match="a plan times nothing"):
    plan.plan(recipe(prune__budget="latency"))


def test_hours_are_predicted_from_the_peak(monkeypatch, capsys):
  monkeypatch.setattr(memory, "measure", lambda *_: {"training": {"all": 1}})
  hardware = Hardware(devices=1, memory=4e9, peak=1e9)
  found = plan.plan(recipe(train__hours=0.5), hardware)
  assert 0.2 < found["hours"] <= 0.5
  tokens = sum(stage["train_tokens"] for stage in found["stages"])
  assert tokens > 0
  said = f"0.5 hours: {tokens:,} tokens in {len(found['stages'])} stage(s), all"
  assert said in capsys.readouterr().out
  with pytest.raises(UserError, match="of unknown speed"):
    plan.plan(recipe(train__hours=0.5))


def test_unreachable_target_is_refused():
  with pytest.raises(UserError, match=r"cannot be reached.*208,768 of"):
    plan.plan(recipe(prune__ratio=0.9))


def test_bad_hardware():
  with pytest.raises(UserError, match=r"did you mean NVIDIA H100\?"):
    resolve(Hardware("NVIDIA H10O"))
  with pytest.raises(UserError, match=r"--mfu=1\.5"):
    resolve(Hardware(mfu=1.5))
  for odd, told in (
    (Hardware(mfu=math.nan), "--mfu=nan"),
    (Hardware(devices=-1), "--devices=-1 must be above 0"),
    (Hardware(memory=-5e9), "--memory_gb=-5 must be"),
    (Hardware(memory=math.nan), "--memory_gb=nan must be"),
    (Hardware(memory=1e9, peak=math.inf), "--tflops=inf must be"),
  ):
    with pytest.raises(UserError, match=told):
      resolve(odd)
  assert resolve(Hardware("h200")).memory == 141e9
  here = resolve(Hardware())
  assert here.devices == 8
  assert 1e8 < here.memory < 1e13


def test_a_topology_says_which_devices(monkeypatch):
  slice_ = [types.SimpleNamespace(device_kind="TPU v5 lite")] * 8
  monkeypatch.setattr(compiling, "devices_of", lambda topology: slice_)
  for odd in (Hardware(devices=16), Hardware("NVIDIA H100")):
    odd = dataclasses.replace(odd, topology="v5e:2x4")
    with pytest.raises(UserError, match="leave out --device and --devices"):
      resolve(odd)


def test_a_gguf_and_a_revision(small_model, tmp_path, monkeypatch):
  """As `run` opens them."""
  file = tmp_path / "m.gguf"
  convert.convert(str(small_model), file, "gguf")
  full, folder = plan.original(recipe(model__path=str(file)))
  assert full.units() == load.read_config(str(small_model)).units()
  assert disk.original_bytes(full, folder) > 0
  asked = []

  def fetched(*what, revision):
    asked.append((*what, revision))
    return small_model / "config.json"

  monkeypatch.setattr("huggingface_hub.hf_hub_download", fetched)
  plan.original(recipe(model__path="some/model@v1"))
  plan.original(recipe(model__path="some/model"))
  assert asked == [
    ("some/model", "config.json", "v1"),
    ("some/model", "config.json", None),
  ]


@pytest.mark.parametrize("dtype, size", [("bfloat16", 2), ("auto", 4)])
def test_the_type_of_a_wrapper_not_yet_downloaded(tmp_path, dtype, size):
  """It may be said one level lower."""
  raw = {"model_type": "mistral3", "text_config": {"dtype": dtype}}
  (tmp_path / "config.json").write_text(json.dumps(raw))
  numbers = model_config.count_params(SMALL)
  assert disk.original_bytes(SMALL, tmp_path) == size * numbers


def test_a_model_that_is_not_there():
  with pytest.raises(UserError, match=r"someone/else is not a directory"):
    plan.original(recipe(model__path="someone/else"))


@pytest.mark.slow
def test_8b_on_one_80_gb_device(tmp_path, capsys):
  """From config.json alone; nothing is written."""
  (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B_JSON))
  config = recipe(model__path=str(tmp_path), model__dtype="bfloat16")
  config.calibration.samples, config.calibration.batch = 512, 32
  found = plan.plan(config, Hardware("h100"))
  assert found["params"] == 8_030_261_248
  assert found["disk"]["original"] == 2 * found["params"]  # as config.json says
  need = sum(found["memory"]["scoring"].values())
  # Weights twice, the stream in front of 64 half layers, and some more.
  least = 2 * 16.06e9 + 64 * 512 * 64 * 4096 * 2
  assert least < need < least + 8e9
  assert found["warnings"] == []
  assert [p.name for p in tmp_path.iterdir()] == ["config.json"]
  config.model.dtype = "float32"
  found = plan.plan(config, Hardware("h100"))
  assert "--config.model.dtype=bfloat16" in found["warnings"][0]


@pytest.mark.slow
def test_4b_on_one_24_gb_card(tmp_path):
  """Qwen3-4B, its layers from the host and adapters beside int8; the same with
  all of it on the card does not fit."""
  sizes = {"hidden_size": 2560, "intermediate_size": 9728, "head_dim": 128}
  sizes |= {"num_hidden_layers": 36, "vocab_size": 151936}
  sizes |= {"model_type": "qwen3", "tie_word_embeddings": True}
  sizes |= {"architectures": ["Qwen3ForCausalLM"], "rope_scaling": None}
  (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B_JSON | sizes))
  config = recipe(model__path=str(tmp_path), model__dtype="bfloat16")
  config.prune.method, config.prune.stream_layers = "fisher", True
  config.data.batch, config.data.seq_len = 4, 1024
  train = {"tokens": 10**6, "lora_rank": 16, "lora_base": "int8"}
  config.train = Train(**train, dtype="bfloat16")
  card = Hardware(devices=1, memory=24e9, peak=70e12)
  found = plan.plan(config, card)
  assert found["params"] == 4_022_468_096
  assert found["warnings"] == []
  need = {n: sum(parts.values()) for n, parts in found["memory"].items()}
  assert need["scoring"] < 3e9
  assert need["training"] < 0.9 * 24e9
  config.prune.stream_layers, config.train = False, Train()
  [warning] = plan.plan(config, card)["warnings"]
  assert "stream_layers" in warning


@pytest.mark.slow
def test_8b_on_eight_16_gb_devices(tmp_path):
  (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B_JSON))
  config = recipe(model__path=str(tmp_path), model__dtype="bfloat16")
  config.calibration.samples, config.calibration.batch = 512, 32
  found = plan.plan(config, Hardware("v5e", devices=8))
  assert found["warnings"] == []
  weights = found["memory"]["scoring"]["weights"]
  assert weights == pytest.approx(16.06e9 / 8, rel=0.01)
  config.train.tokens, config.train.dtype = 10**9, "bfloat16"
  found = plan.plan(config, Hardware("v5e", devices=8))
  # Layers are recomputed (auto), so that training fits; scores of its float32
  # weights do not.
  assert sum(found["memory"]["training"].values()) < 0.92 * 16e9
  assert found["memory"]["scoring"]["weights"] == pytest.approx(2 * weights)
  (warning,) = found["warnings"]
  assert warning.startswith("scoring needs")
  assert "--config.calibration.batch=16" in warning


def test_how_many_tokens_fewer():
  """8B on sixteen v5e chips: 34.6 GB beside 5.9, and 14.7 are usable."""
  parts = {"weights": 2e9, "optimizer": 3.9e9, "temporary": 34.6e9}
  sixteen = Hardware(devices=16, memory=16e9)
  config = recipe(data__batch=256, data__seq_len=4096, train__tokens=2**20)
  said = advice.advice(config, "training", parts, sixteen)
  assert said == "--config.train.accumulation=4, or --config.data.seq_len=1024"
  config.data.batch = 32  # two rows a chip
  said = advice.advice(config, "training", parts, sixteen)
  assert said == "--config.data.seq_len=1024"
  assert advice.smaller(1.5, 1) == 2


def test_attention_that_cannot_shrink_is_said():
  one = dataclasses.replace(SMALL, kv_groups=(1,) * 4)
  assert "has 1 KV group(s)" in advice.fixed_attention(Prune(), one)[0]
  assert not advice.fixed_attention(Prune(), SMALL)
  found = advice.fixed_attention(Prune(round_kv_to=4), SMALL)
  assert "has 4 KV group(s), and 4 stay" in found[0]
  assert not advice.fixed_attention(Prune(attention_layers="0:0"), one)


def test_disk_of_a_teachers_likeliest_tokens():
  settings = {"tokens": 1000, "distill_alpha": 0.5, "teacher_cache": 4}
  config = recipe(**{f"train__{n}": x for n, x in settings.items()})
  found = disk.disk(config, [SMALL, SMALL], None)
  # 32 rows of 32 tokens: a digest, and four ids and log-probabilities each.
  assert found["teacher cache"] == 32 * (16 + 32 * 4 * (4 + 2))
  config.train.distill_alpha = 0.0
  assert "teacher cache" not in disk.disk(config, [SMALL, SMALL], None)
