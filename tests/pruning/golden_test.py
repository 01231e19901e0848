"""The pruning core against traces of the authors' own code, step by step.

`golden/adapt_pruner` holds recordings of their PyTorch pruner on small models.
"""

import functools
import hashlib
import json
import pathlib

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from adapt_pruner_jax.config import Prune
from adapt_pruner_jax.distributed import sharding
from adapt_pruner_jax.formats.hf import load, save
from adapt_pruner_jax.models import axes, model_config
from adapt_pruner_jax.models.decoder import Decoder
from adapt_pruner_jax.pruning import methods, scores, surgery
from adapt_pruner_jax.pruning.task import PruneTask

ROOT = pathlib.Path(__file__).parent.parent / "golden" / "adapt_pruner"
CASES = sorted(path.name for path in ROOT.iterdir())


class Case:
  """One recording: its settings, starting model and steps."""

  def __init__(self, name):
    self.folder = ROOT / name
    self.trace = json.loads((self.folder / "trace.json").read_text())
    self.settings = self.trace["settings"]
    self.base = ROOT / self.trace["base_model_case"]
    self.calibration = np.load(self.folder / "calib.npy")
    self.scores = load_file(self.folder / "scores.safetensors")

  def model(self):
    return load.load(str(self.base), dtype="float32")

  def recipe(self, **changes):
    s = self.settings
    kind = s["importance"]
    if kind == "taylor" and s["taylor"] == "vectorize":
      kind = "taylor_vectorize"
    values = {
      "step_size": s["pruning_ratio"] / s["iterative_steps"],
      "max_steps": s["iterative_steps"],
      "amplitude": s["amplitude"] if s["adaptive"] else 0.0,
      "group_importance": kind,
      "layer_importance": s["layer_importance"] or "cosine",
      "attention_layers": "{}:{}".format(*s["attention_layers"]),
      "mlp_layers": "{}:{}".format(*s["mlp_layers"]),
      "gqa_fold": "reference",
      "trim": False,
    }
    return Prune(**values | changes)


@functools.cache
def case_run(name):
  """The recording, our model after the run, and our steps."""
  case = Case(name)
  config, params = case.model()
  found = []
  pruned = methods.prune(
    PruneTask(
      config,
      params,
      case.recipe(),
      lambda step: case.calibration[step],
      target=case.settings["target_param_num"],
      batch=case.settings["batch_size"],
      log=lambda record, step: found.append(step),
    )
  )
  return case, config, pruned, found


@pytest.mark.parametrize("name", CASES)
def test_losses_and_importances(name):
  case, _, _, found = case_run(name)
  for step, want in zip(found, case.trace["steps"], strict=True):
    if losses := want["minibatch_losses"]:
      np.testing.assert_allclose(step.losses_M, losses, rtol=1e-5)
    if "layer_importance_raw" in want:
      raw = want["layer_importance_raw"]
      np.testing.assert_allclose(step.importance_L, raw, rtol=1e-5)
    for module in want["modules"]:
      unit = "K" if module["kind"] == "attention" else "F"
      if "relative_importance" in module:
        got = step.relative[unit][module["layer"]]
        assert got == pytest.approx(module["relative_importance"], abs=2e-4)
      got = step.sparsity[unit][module["layer"]]
      assert got == pytest.approx(module["target_sparsity"], abs=2e-5)


@pytest.mark.parametrize("name", CASES)
def test_scores(name):
  case, _, _, found = case_run(name)
  compared = 0
  masks = None
  for step in found:
    before = masks
    for key, want in case.scores.items():
      number, layer, kind = key.split(".")
      if int(number[4:]) != step.number or kind == "attn_channels":
        continue
      unit = {"attn": "K", "mlp": "F"}[kind]
      got = step.scores[unit][int(layer[5:])]
      if before is not None:
        got = got[before[unit][int(layer[5:])]]
      # |sum| may cancel to next to nothing, where float32 has no more digits.
      np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6 * want.max())
      compared += 1
    masks = step.masks
  assert compared > len(found)


@pytest.mark.parametrize("name", CASES)
def test_every_removed_unit(name):
  case, config, pruned, found = case_run(name)
  before = surgery.to_masks(surgery.everything(config), config)
  for step, want in zip(found, case.trace["steps"], strict=True):
    for module in want["modules"]:
      unit = "K" if module["kind"] == "attention" else "F"
      layer = module["layer"]
      gone = np.flatnonzero(before[unit][layer] & ~step.masks[unit][layer])
      assert gone.tolist() == (module.get("units_removed_original") or [])
    width = surgery.widths(step.masks)
    assert width["K"].tolist() == want["n_kv_heads"]
    assert width["F"].tolist() == want["ffn_size"]
    assert step.params == want["param_count"]
    before = step.masks
  final = case.trace["final"]
  assert model_config.count_params(pruned.config) == final["param_count"]
  assert len(found) == final["steps_run"]
  for layer, kept in enumerate(final["kept_original"]):
    assert pruned.kept["K"][layer].tolist() == kept["kv_heads"]
    assert pruned.kept["F"][layer].tolist() == kept["ffn_channels"]


@pytest.mark.parametrize("name", CASES)
def test_final_logits(name):
  case, _, pruned, _ = case_run(name)
  ids = np.load(case.folder / "eval_ids.npy")
  decoder = Decoder(pruned.config)
  logits, _ = jax.jit(decoder.apply)({"params": pruned.params}, ids)
  want = np.load(case.folder / "logits.npy")
  np.testing.assert_allclose(logits, want, atol=1e-4)


@pytest.mark.parametrize("name", ["B_llama_gqa", "C_qwen2_gqa", "D_clip"])
def test_final_weights_are_the_same_bytes(name, tmp_path):
  case, _, pruned, _ = case_run(name)
  save.save(pruned.config, pruned.params, tmp_path / "out")
  got = {}
  for file in (tmp_path / "out").glob("*.safetensors"):
    got |= load_file(file)
  want = case.trace["pruned_sha256_float32"]
  for tensor, digest in want.items():
    if tensor == "lm_head.weight" and pruned.config.tied:
      continue
    data = got[tensor].astype("<f4").tobytes()
    assert hashlib.sha256(data).hexdigest() == digest, tensor


@pytest.mark.parametrize(
  "name", ["B_llama_gqa", "C_qwen2_gqa", "D_magnitude_l2"]
)
def test_aligned_fold_removes_what_the_heads_attend_with(name):
  case = Case(name)
  config, params = case.model()
  # Up to the first step that removes a head both folds do the same.
  key = "would_remove_if_contiguous_current"
  steps = case.trace["steps"]
  first = next(s for s in steps if any(key in m for m in s["modules"]))
  pruned = methods.prune(
    PruneTask(
      config,
      params,
      case.recipe(gqa_fold="aligned", max_steps=first["step"]),
      lambda step: case.calibration[step],
      batch=case.settings["batch_size"],
    )
  )
  for module in first["modules"]:
    if key in module:
      kept = pruned.kept["K"][module["layer"]]
      gone = set(range(config.kv_groups[0])) - set(kept.tolist())
      assert gone == set(module[key])


def test_one_executable_for_all_steps_of_all_stages():
  case = Case("B_llama_gqa")
  config, params = case.model()
  recipe = case.recipe(max_steps=3)
  scores.measure_step.clear_cache()
  full, kept = config, None
  for stage in range(3):
    done = methods.prune(
      PruneTask(
        config,
        params,
        recipe,
        lambda step, stage=stage: case.calibration[stage],
        batch=case.settings["batch_size"],
        full=full,
        kept=kept,
      )
    )
    config, params, kept = done.config, done.params, done.kept
  assert config.ffn_widths != full.ffn_widths
  assert scores.measure_step._cache_size() == 1


def test_eight_devices_remove_the_same():
  case, _, want, _ = case_run("C_qwen2_gqa")
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  config, params = case.model()
  params = jax.device_put(params, sharding.param_shardings(params, mesh))
  pruned = methods.prune(
    PruneTask(
      config,
      params,
      case.recipe(max_steps=4),
      lambda step: case.calibration[step],
      batch=case.settings["batch_size"],
      mesh=mesh,
    )
  )
  for got, expected in zip(pruned.trace, want.trace[:4], strict=True):
    assert got["params"] == expected["params"]
    assert got["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    widths = [(x["kv_groups"], x["ffn"]) for x in got["layers"]]
    assert widths == [(x["kv_groups"], x["ffn"]) for x in expected["layers"]]


def test_params_letters_cover_every_tensor():
  config, params = Case("A_llama_mha_all").model()
  names = set()
  axes.map_named(lambda name, *_: names.add(name), params)
  assert names == set(model_config.outer_names(config)) | set(
    model_config.layer_names(config)
  )
