"""What is read through a link is part of what a run depends on."""

import pytest

from adapt_pruner_jax.formats.gguf import directory
from adapt_pruner_jax.formats.hf import cut_vocabulary
from adapt_pruner_jax.runs.fingerprints import weights_fingerprint


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
