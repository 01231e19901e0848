"""The recipes: every field, and that real models of their sizes trace."""

import dataclasses
import importlib.util
import math
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags

from adapt_pruner_jax import cli
from adapt_pruner_jax.config import (
  OLD_FIELDS,
  Config,
  check,
  difference,
  field_names,
  from_json,
  get,
  recipe_flags,
)
from adapt_pruner_jax.data.sources import parse_sources
from adapt_pruner_jax.distributed import sharding
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.formats.hf import config_json
from adapt_pruner_jax.models import model_config
from adapt_pruner_jax.pruning import scores, surgery
from adapt_pruner_jax.pruning.schedule import stage_targets
from adapt_pruner_jax.pruning.targets import resolve_target
from adapt_pruner_jax.training import optimizer
from adapt_pruner_jax.training.step import make_step

CONFIGS = Path(__file__).resolve().parent.parent / "configs"

# What scripts may rely on; a field that is renamed breaks other people's.
FIELDS = """
  model.path model.dtype model.ignore_fields vocab.keep_tokens vocab.ratio
  vocab.source prune.method prune.target_params prune.ratio prune.budget
  prune.budget_value prune.limits prune.budget_context prune.budget_batch
  prune.budget_export prune.budget_phase prune.budget_table prune.budget_device
  prune.stages prune.step_size prune.max_steps prune.amplitude prune.allotment
  prune.group_importance prune.layer_importance prune.attention_layers
  prune.mlp_layers prune.gqa_fold prune.trim prune.round_ffn_to
  prune.round_kv_to prune.whole_halves prune.attention prune.precision
  prune.refit prune.refit_ridge prune.refit_all prune.refit_passes
  prune.refit_rate prune.refit_batch prune.refit_temperature
  prune.ranking.step_size prune.ranking.cap prune.uniform.steps
  prune.search.steps prune.search.evaluations prune.search.tokens
  prune.search.source prune.llm_pruner.ranking prune.flap.metric
  prune.flap.structure prune.slicegpt.multiple prune.slicegpt.subtract_mean
  prune.minitron.depth prune.surgeon.shots prune.surgeon.damp_a
  prune.surgeon.damp_g prune.surgeon.matrices prune.magnitude.norm
  prune.stream_layers
  calibration.source calibration.samples calibration.seq_len calibration.batch
  calibration.pass_tokens calibration.refit_samples calibration.tuning
  calibration.tokens_per_channel data.source data.seq_len data.batch data.bos
  train.tokens train.hours train.learning_rate train.min_learning_rate
  train.schedule train.data_share train.weight_decay train.dtype train.attention
  train.remat train.scan_layers train.accumulation train.carry_moments
  train.distill_alpha train.distill_temperature train.lora_rank
  train.lora_alpha train.skip_nonfinite
  train.teacher_cache train.gradient_dtype train.moments
  train.lora_base mesh.data mesh.fsdp mesh.tensor mesh.slices mesh.expert
  eval.text eval.answers eval.tasks eval.tasks_dir
  eval.trust_tasks_dir eval.latency eval.seq_len eval.batch checkpoint.steps
  checkpoint.minutes checkpoint.keep log.tensorboard log.trackers
  log.profile_steps
  oneshot_control seed
""".split()  # noqa: SIM905

SLIMPAJAMA = "hf:DKYoon/SlimPajama-6B"
STAGED = {
  "calibration.source": f"{SLIMPAJAMA},limit=20000",
  "data.source": SLIMPAJAMA,
  "data.batch": 128,
  "train.tokens": 5_000_000_000,
  "train.dtype": "bfloat16",
}
BASES = ("paper", "oneshot", "accel")  # they have no target
RECOMMENDED = {
  "prune.method": "curvature",
  "prune.refit": "2",
  "prune.refit_all": True,
}
ONE_SHOT = {
  "prune.method": "fisher",
  "prune.ranking.step_size": 0.2,
  "prune.ranking.cap": 0.8,
  "prune.refit": "loss",
  "prune.refit_passes": 3,
  "prune.refit_rate": 1.5e-4,
  "prune.refit_batch": 1,
  "calibration.samples": 64,
  "calibration.refit_samples": 64,
  "calibration.seq_len": 512,
  "calibration.batch": 4,
}
# The fields in which a recipe differs from the defaults.
RECIPES = {
  "tiny": RECOMMENDED
  | {
    "prune.ratio": 0.4,
    "prune.stages": 4,
    "calibration.samples": 64,
    "data.seq_len": 128,
    "data.batch": 4,
    "train.tokens": 61_440,
    "train.learning_rate": 5e-4,
    "train.min_learning_rate": 5e-5,
    "eval.text": "embedded",
    "oneshot_control": True,
  },
  "paper": {},
  "oneshot": ONE_SHOT,
  "accel": RECOMMENDED | {"prune.stages": 10},
  "mobilellm_350m_to_125m": STAGED
  | {
    "model.path": "facebook/MobileLLM-350M",
    "prune.target_params": 112_347_456,
    "prune.stages": 20,
    "train.min_learning_rate": 0.0,
  },
  "mobilellm_600m_to_350m": STAGED
  | {
    "model.path": "facebook/MobileLLM-600M",
    "prune.target_params": 376_075_200,
    "prune.stages": 9,
  },
  "mobilellm_1b_to_600m": STAGED
  | {
    "model.path": "facebook/MobileLLM-1B",
    "prune.target_params": 603_188_352,
    "prune.stages": 10,
  },
  "qwen25_05b_to_350m": STAGED
  | {
    "model.path": "Qwen/Qwen2.5-0.5B",
    "prune.target_params": 376_075_200,
    "prune.stages": 5,
  },
  "deepseek_r1_qwen_15b_to_1b": STAGED
  | {
    "model.path": "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
    "prune.target_params": 1_005_461_760,
    "prune.stages": 11,
  },
  "llama31_8b_oneshot": {
    "model.path": "meta-llama/Llama-3.1-8B",
    "model.dtype": "bfloat16",
    "prune.ratio": 0.2,
    "calibration.source": f"{SLIMPAJAMA},limit=20000",
  },
  "smollm2_135m": ONE_SHOT
  | {
    "model.path": "HuggingFaceTB/SmolLM2-135M",
    "prune.ratio": 0.2,
    "calibration.source": "hf:Salesforce/wikitext,subset=wikitext-2-raw-v1",
    "eval.text": "embedded",
  },
}
# What the paper says, whatever the defaults are.
PAPER = {
  "prune.method": "adapt",
  "prune.step_size": 0.02,
  "prune.amplitude": 0.02,
  "prune.layer_importance": "cosine",
  "calibration.samples": 512,
  "calibration.seq_len": 64,
  "data.seq_len": 1024,
  "train.learning_rate": 2e-5,
  "train.min_learning_rate": 2e-6,
  "train.schedule": "wsd",
  "train.data_share": "linear",
}
STAGED_NAMES = [n for n in RECIPES if "_to_" in n]


def _mobilellm(layers: int, heads: int, groups: int, width: int) -> dict:
  return {
    "model_type": "mobilellm",
    "architectures": ["MobileLLMForCausalLM"],
    "hidden_size": heads * 64,
    "intermediate_size": width,
    "num_hidden_layers": layers,
    "num_attention_heads": heads,
    "num_key_value_heads": groups,
    "head_dim": 64,
    "vocab_size": 32000,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "share_embedding": True,
    "layer_sharing": False,
    "tie_word_embeddings": False,
  }


def _qwen2(layers: int, heads: int, hidden: int, width: int, tied: bool):
  return {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": hidden,
    "intermediate_size": width,
    "num_hidden_layers": layers,
    "num_attention_heads": heads,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6 if tied else 1e4,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 32768,
    "max_window_layers": layers,
    "tie_word_embeddings": tied,
  }


def _llama(layers: int, heads: int, groups: int, width: int, **more) -> dict:
  return {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "intermediate_size": width,
    "num_hidden_layers": layers,
    "num_attention_heads": heads,
    "num_key_value_heads": groups,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "max_position_embeddings": 8192,
  } | more


# What matters in config.json of the released models, and their parameters.
MODELS = {
  "facebook/MobileLLM-350M": (_mobilellm(32, 15, 5, 2560), 345_355_200),
  "facebook/MobileLLM-600M": (_mobilellm(40, 18, 6, 3072), 603_188_352),
  "facebook/MobileLLM-1B": (_mobilellm(54, 20, 5, 3584), 1_005_461_760),
  "Qwen/Qwen2.5-0.5B": (_qwen2(24, 14, 896, 4864, True), 494_032_768),
  "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": (
    _qwen2(28, 12, 1536, 8960, False),
    1_777_088_000,
  ),
  "meta-llama/Llama-3.1-8B": (
    _llama(
      32,
      32,
      8,
      14336,
      hidden_size=4096,
      vocab_size=128256,
      rope_theta=500000.0,
      rope_scaling={
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
      },
    ),
    8_030_261_248,
  ),
  "HuggingFaceTB/SmolLM2-135M": (
    _llama(
      30,
      9,
      3,
      1536,
      hidden_size=576,
      vocab_size=49152,
      rope_theta=100000,
      tie_word_embeddings=True,
    ),
    134_515_008,
  ),
}


def build(name: str, *argument: str) -> Config:
  """The recipe configs/`name`.py, as the command line loads it."""
  spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config(*argument)


def values(config: Config) -> dict:
  return {name: get(config, name) for name in field_names(config)}


@pytest.mark.parametrize(
  "name, value, words",
  [
    (
      "train.tokens",
      1e9,
      "1000000000.0 is of type float, and must be of type int",
    ),
    ("prune.stages", "4", "'4' is of type str, and must be of type int"),
    ("prune.refit", 2, """2 is of type int, and must be text: "2\""""),
    ("prune.ratio", True, "True is of type bool, and must be of type float"),
    ("prune.trim", 1, "1 is of type int, and must be of type bool"),
  ],
)
def test_values_of_another_type(name, value, words):
  config = Config()
  config.prune.ratio, config.train.learning_rate = 0.2, 1
  check(config)
  section, field = name.split(".")
  setattr(getattr(config, section), field, value)
  with pytest.raises(UserError, match=rf"--config\.{name}={words}"):
    check(config)


def test_a_recipe_behind_a_space():
  values = flags.FlagValues()
  argv = ["--config", "configs/oneshot.py", "--config.prune.ratio=0.25"]
  recipe_flags.define(values, argv)
  values(["adapt-pruner", *argv])
  assert values.config.prune.refit == "loss"
  with pytest.raises(UserError, match=r"--config=nothing\.py: no such file"):
    recipe_flags.define(flags.FlagValues(), ["--config", "nothing.py"])


def test_fields_are_the_contract():
  assert field_names(Config()) == FIELDS


@pytest.mark.parametrize("value, name", [(True, "full"), (False, "none")])
def test_recomputing_was_a_boolean(value, name):
  """In a recipe file, on a command line, and in a work directory."""
  config = Config()
  config.prune.ratio = 0.2
  for given in (value, str(value)):
    config.train.remat = given
    check(config)
    assert config.train.remat == name
  new, old = dataclasses.asdict(config), dataclasses.asdict(config)
  old["train"]["remat"] = value
  assert from_json(old).train.remat == name
  assert not difference(old, new)


def test_old_recipes_are_read():
  """As they stand in the config.json of the first version."""
  assert {*OLD_FIELDS.values()} <= {*field_names(Config())}
  new, old = dataclasses.asdict(Config()), dataclasses.asdict(Config())
  for name, today in OLD_FIELDS.items():
    _, section, field = today.split(".")
    old["prune"][name.removeprefix("prune.")] = new["prune"][section][field]
  for section in ("ranking", "uniform", "llm_pruner", "flap", "slicegpt"):
    del old["prune"][section]
  del old["prune"]["magnitude"], old["prune"]["allotment"]
  old["prune"]["group_importance"] = "taylor"
  assert difference(old, new) == []
  assert from_json(old) == Config()
  old["prune"]["flap_metric"] = "IFV"
  assert difference(old, new) == ["prune.flap.metric: IFV -> WIFV"]
  assert from_json(old).prune.flap.metric == "IFV"
  del old["train"]["carry_moments"]  # as if it came later
  new["train"]["carry_moments"] = False
  line = "train.carry_moments: True -> False"
  assert difference(old, new)[1:] == [line]
  # What it wrote for a default is that, and the same word typed is the same.
  new = dataclasses.asdict(Config())
  old["train"]["carry_moments"] = True
  old["prune"]["flap_metric"] = "WIFV"
  for name in "", "taylor":
    new["prune"]["group_importance"] = name
    assert difference(old, new) == []
  new["prune"]["group_importance"] = "l1"
  line = "prune.group_importance: taylor -> l1"
  assert difference(old, new) == [line]
  # Later versions mean what they wrote.
  new["prune"]["group_importance"] = "taylor"
  assert difference(new, new) == []
  assert from_json(new).prune.group_importance == "taylor"
  line = "prune.group_importance: taylor -> "
  assert difference(new, dataclasses.asdict(Config())) == [line]
  with pytest.raises(UserError, match=r"no config field train\.other"):
    from_json({"train": {"other": 1}})


@pytest.mark.parametrize(
  "field, asked_by",
  [
    ("train.distill_temperature", "train.distill_alpha"),
    ("prune.refit_temperature", "prune.refit_passes"),
  ],
)
def test_temperatures_of_recipes_without_them(field, asked_by):
  """They were 2 when there was no field; it is told where that matters."""
  new, old = dataclasses.asdict(Config()), dataclasses.asdict(Config())
  (section, name), other = field.split("."), asked_by.split(".")[1]
  del old[section][name]
  assert get(from_json(old), field) == 2
  assert get(Config(), field) == 1
  assert difference(old, new) == []
  for recipe in old, new:
    recipe[section][other] = 1
  assert difference(old, new) == [f"{field}: 2.0 -> 1.0"]
  new[section][name] = 2.0
  assert difference(old, new) == []


def test_a_renamed_field(monkeypatch):
  """Mapped where it is stored, refused with its new name where it is typed."""
  monkeypatch.setitem(OLD_FIELDS, "train.rate", "train.learning_rate")
  stored = {"train": {"rate": 0.5}}
  assert from_json(stored).train.learning_rate == 0.5
  line = "train.learning_rate: 0.5 -> 2e-05"
  assert difference(stored, dataclasses.asdict(Config())) == [line]
  argv = ["--config.train.rate=0.5"]
  with pytest.raises(
    UserError, match=r"--config\.train\.rate is now --config\.train\.learning_r"
  ):
    recipe_flags.define(flags.FlagValues(), argv)
  for write in (
    lambda: setattr(Config().train, "rate", 0.5),
    lambda: dataclasses.replace(Config().train, rate=0.5),
  ):
    with pytest.raises(
      UserError, match=r"train\.rate is now train\.learning_r"
    ):
      write()
  with pytest.raises(UserError, match=r"no field train\.tokns.*mean tokens"):
    Config().train.tokns = 1
  with pytest.raises(UserError, match=r"_metric is now prune\.flap\.metric"):
    Config().prune.flap_metric = "IFV"
  with pytest.raises(UserError, match=r"no field prune\.flap\.metrc"):
    Config().prune.flap.metrc = "IFV"


@pytest.mark.parametrize(
  "name, value, told",
  [
    ("checkpoint.minutes", math.inf, "at least 0, finite"),
    ("checkpoint.minutes", math.nan, "at least 0, finite"),
    ("checkpoint.minutes", -1.0, "at least 0, finite"),
    ("train.learning_rate", math.inf, "finite"),
    *(
      ("log.profile_steps", text, "FIRST:END")
      for text in ("10", "13:10", "10:10", "10:13:15", "-1:2", ":", "a:b")
    ),
    ("log.profile_steps", "4:5", "takes 4 train steps"),
    ("log.profile_steps", "3:9", ""),
    ("checkpoint.minutes", 0.0, ""),
  ],
)
def test_odd_values_are_refused(name, value, told):
  config = Config()
  config.prune.ratio = 0.2
  config.train.tokens = 4 * config.data.step_tokens
  section, field = name.split(".")
  setattr(get(config, section), field, value)
  if not told:
    check(config)
    return
  with pytest.raises(UserError, match=told) as refused:
    check(config)
  assert f"--config.{name}={value}" in str(refused.value)


def test_every_recipe_is_in_the_table():
  files = {p.stem for p in CONFIGS.glob("*.py")} - {"__init__"}
  assert files == set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_fields_of_a_recipe(name):
  config = build(name)
  assert values(config) == values(Config()) | RECIPES[name]
  for field in "calibration.source", "data.source":
    parse_sources(get(config, field), field)
  if name in BASES:
    with pytest.raises(UserError, match="prune"):  # bases, without a target
      check(config)
    config.prune.ratio = 0.2
  check(config)


@pytest.mark.parametrize("name", STAGED_NAMES)
def test_paper_settings(name):
  first = {"train.min_learning_rate": 0.0} if "125m" in name else {}
  got = values(build(name))
  want = PAPER | first
  assert {field: got[field] for field in want} == want
  assert build(name).prune.pair() == ("adapt", "taylor")


@pytest.mark.parametrize("name", RECIPES)
def test_docstring_has_the_command_and_the_source(name):
  text = (CONFIGS / f"{name}.py").read_text()
  assert "adapt-pruner run" in text
  if name != "tiny":
    assert f"--config=configs/{name}.py" in text
  if name in STAGED_NAMES:
    assert "Time: " in text
    assert "Source: " in text


@pytest.mark.parametrize("ratio", [0.2, 0.4, 0.6])
def test_ratio_after_a_colon(ratio):
  assert build("llama31_8b_oneshot", str(ratio)).prune.ratio == ratio


def test_colon_on_the_command_line(monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)  # the recipes are found from anywhere
  argv = ["--config=configs/llama31_8b_oneshot.py:0.4", "--config.seed=7"]
  flag_values = flags.FlagValues()
  recipe_flags.define(flag_values, argv)
  cli._parse("run", argv, flag_values)
  config = recipe_flags.recipe(flag_values)
  assert (config.prune.ratio, config.seed) == (0.4, 7)
  with pytest.raises(UserError, match="did you mean llama31_8b_oneshot"):
    recipe_flags.found("--config=configs/llama31_8b_onesho.py:0.4")


# ---- Full-size models, without weights ---------------------------------------


@pytest.mark.parametrize("path", MODELS)
def test_parameters_of_the_released_models(path):
  raw, params = MODELS[path]
  assert model_config.count_params(config_json.read(raw)) == params


def test_paper_counts_the_shared_embedding_twice():
  for raw, params in (
    (_mobilellm(32, 15, 5, 2560), 376_075_200),
    (_mobilellm(30, 9, 3, 1536), 143_067_456),
  ):
    config = dataclasses.replace(config_json.read(raw), tied=False)
    assert model_config.count_params(config) == params
  # The paper's result, 960 channels wide, with its embedding counted once.
  assert 143_067_456 - 32000 * 960 == 112_347_456


def full_size(name: str) -> tuple[Config, model_config.ModelConfig]:
  config = build(name)
  return config, config_json.read(MODELS[config.model.path][0])


FULL = [n for n in RECIPES if n not in ("tiny", *BASES)]
# Fisher scores' step is planned in tests/planning.
BY_TAYLOR = [n for n in FULL if "prune.method" not in RECIPES[n]]


def test_the_350m_recipe_keeps_the_layers_of_the_paper():
  """Counted once, and its docstring says how the paper counts."""
  recipe = build("mobilellm_350m_to_125m")
  assert recipe.prune.target_params == 143_067_456 - 32000 * 960
  said = (CONFIGS / "mobilellm_350m_to_125m.py").read_text()
  assert "keeps the *layers* of the paper's result" in said
  assert "count the shared embedding twice" in said


@pytest.mark.parametrize("name", ["oneshot", "accel"])
def test_the_bases_say_their_method_first(name):
  """And where it was measured."""
  first = (CONFIGS / f"{name}.py").read_text().splitlines()[0]
  assert build(name).prune.method in first.lower()
  assert "measured on" in first


@pytest.mark.parametrize("name", FULL)
def test_targets_are_reachable(name):
  config, full = full_size(name)
  target = resolve_target(full, config.prune)
  size = model_config.count_params(full)
  targets = stage_targets(size, target, config.prune.stages)
  assert len(targets) == config.prune.stages
  assert targets[-1] == target
  if config.prune.stages > 1:  # about 5 % of what was there, the paper says
    drop = (size - target) / config.prune.stages / size
    assert 0.02 < drop < 0.06


def place(tree, shardings):
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    tree,
    shardings,
  )


@pytest.mark.parametrize("name", BY_TAYLOR)
def test_scoring_step_traces(name):
  config, full = full_size(name)
  mesh = sharding.make_mesh()
  dtype = jnp.dtype(
    "float32" if config.train.tokens else config.model.dtype or "float32"
  )
  params = model_config.abstract_params(full, dtype)
  stacked = {n: params[n] for n in model_config.outer_names(full)}
  stacked["layers"] = {
    n: jax.ShapeDtypeStruct((full.num_layers, *x.shape), dtype)
    for n, x in params["layer_0"].items()
  }
  rows = config.calibration.samples // config.calibration.batch
  shape = (rows, config.calibration.batch, config.calibration.seq_len)
  found = jax.eval_shape(
    partial(
      scores.measure_step,
      kind=config.prune.group_importance,
      measure=config.prune.layer_importance,
      mesh=mesh,
      config=surgery.dense(full),
    ),
    stacked=stacked,
    masks={
      u: jax.ShapeDtypeStruct((full.num_layers, w[0]), bool)
      for u, w in full.units().items()
    },
    tokens_MBT=jax.ShapeDtypeStruct(shape, jnp.int32),
    valid_MB=jax.ShapeDtypeStruct(shape[:2], bool),
  )
  assert found["importance_ML"].shape == (rows, full.num_layers)
  assert found["salience"]["q"].shape == (
    full.num_layers,
    full.kv_groups[0],
    full.queries_per_group,
  )
  assert found["salience"]["down"].shape == (
    full.num_layers,
    full.ffn_widths[0],
  )
  assert found["salience"]["q"].dtype == jnp.float32


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL)
def test_train_step_traces(name):
  """Also for one-shot recipes: `compare --recover_tokens` trains them."""
  config, full = full_size(name)
  mesh = sharding.make_mesh()
  params = model_config.abstract_params(full, jnp.float32)
  transform = optimizer.of(config.train)
  state = jax.eval_shape(transform.init, params)
  steps = config.train.tokens // config.data.step_tokens
  schedule = optimizer.schedule(config.train, steps)
  step = make_step(full, config.train, schedule, mesh)
  shape = (config.data.batch, config.data.seq_len)
  names = "tokens_BT", "targets_BT", "segments_BT", "positions_BT"
  batch = {n: jax.ShapeDtypeStruct(shape, jnp.int32) for n in names}
  batch["weights_BT"] = jax.ShapeDtypeStruct(shape, jnp.float32)
  new, new_state, metrics = jax.eval_shape(
    lambda *args: step(*args, 0), params, state, batch
  )
  assert jax.tree.map(lambda x: x.shape, new) == model_config.param_shapes(full)
  assert jax.tree.structure(new_state) == jax.tree.structure(state)
  assert metrics["loss"].shape == ()
  assert all(x.dtype == np.float32 for x in jax.tree.leaves(new))
