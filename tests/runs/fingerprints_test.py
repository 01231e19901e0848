"""What is read through a link is part of what a run depends on."""

import shutil
import types

import numpy as np
import pytest
from absl import flags

from adapt_pruner_jax.config import Config
from adapt_pruner_jax.data.tuning_questions import TuningQuestions
from adapt_pruner_jax.distributed import joining
from adapt_pruner_jax.evaluation import flags as evaluation_flags
from adapt_pruner_jax.formats.gguf import directory
from adapt_pruner_jax.formats.hf import cut_vocabulary
from adapt_pruner_jax.runs.fingerprints import (
  weights_fingerprint,
  what_is_evaluated,
  what_is_read,
)


@pytest.mark.parametrize("kind", ["gguf", "cut"])
def test_other_weights_behind_a_link_are_another_model(kind, tmp_path):
  folder, original = tmp_path / "folder", tmp_path / "original"
  folder.mkdir()
  original.mkdir()
  (folder / "config.json").write_text("{}")
  (original / "config.json").write_text("{}")
  weights = original / f"model.{'gguf' if kind == 'gguf' else 'safetensors'}"
  weights.write_bytes(b"one")
  if kind == "gguf":
    (folder / directory.WEIGHTS).symlink_to(weights)
  else:
    (folder / cut_vocabulary.SOURCE).symlink_to(original)
    (folder / cut_vocabulary.KEPT).write_text("[1, 2]")
  before = weights_fingerprint(folder)
  assert weights_fingerprint(folder) == before
  weights.write_bytes(b"two")
  assert weights_fingerprint(folder) != before


def test_an_evaluation_depends_on_flags_model_and_text(small_model, tmp_path):
  """What its processes compare; not who each of them is."""

  def facts(*more):
    values = flags.FlagValues()
    evaluation_flags.define_flags(values)
    joining.define_flags(values)
    files = f"--model={tmp_path / 'M'}", f"--text={tmp_path / 'text'}"
    values(["evaluate", *files, *more])
    return what_is_evaluated(**joining.common(values))

  shutil.copytree(small_model, tmp_path / "M")
  (tmp_path / "text").write_text("one")
  before = facts("--process_id=0", "--coordinator=localhost:1")
  differing = lambda: {k for k, v in before.items() if facts()[k] != v}
  assert facts("--process_id=1", "--coordinator=here:1") == before
  assert facts("--seq_len=8")["flags"] != before["flags"]
  assert not differing()
  (tmp_path / "text").write_text("two")
  assert differing() == {"text"}
  (tmp_path / "M" / "tokenizer_config.json").write_text("{}")
  assert differing() == {"text", "model"}


def test_a_run_depends_on_all_that_is_measured_on(small_model):
  windows = lambda n: types.SimpleNamespace(batch=lambda _: np.full((2, 3), n))
  questions = TuningQuestions(np.ones((1, 4), int), *[np.ones(1)] * 3)
  given = {"calibration": 0, "tuning": 1, "search_data": 2}

  def facts(**other):
    inputs = types.SimpleNamespace(
      recipe=Config(),
      source=small_model,
      tokenizer=None,
      rows=None,
      eval_tokens=np.arange(3),
      **{name: windows(n) for name, n in given.items()},
    )
    inputs.__dict__.update(other)
    return what_is_read(inputs)

  before = facts()
  for name, value, fact in (
    ("calibration", windows(9), "calibration tokens"),
    ("tuning", windows(9), "tuning tokens"),
    ("tuning", questions, "tuning tokens"),
    ("tuning", None, "tuning tokens"),
    ("search_data", windows(9), "search tokens"),
    ("eval_tokens", np.arange(4), "evaluation tokens"),
  ):
    after = facts(**{name: value})
    assert {k for k, v in before.items() if after[k] != v} == {fact}
