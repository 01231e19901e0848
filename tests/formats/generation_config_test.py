"""Truth: Transformers' own generate on the same directory."""

import json
import shutil

import pytest

from adapt_pruner_jax.data.tokenizer import load_tokenizer
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.evaluation import generate
from adapt_pruner_jax.formats.hf import load
from adapt_pruner_jax.formats.hf.generation_config import end_tokens

# "Once upon a time" goes on with tokens 432, 383, 286, ..., 270 as the 17th.
CASES = {
  "a list": ({"eos_token_id": [410, 270]}, 2, (410, 270), 17),
  "one": ({"eos_token_id": 421}, 270, (421,), 8),
  "no file": (None, [270, 410], (270, 410), 17),
  "no file, one": (None, 421, (421,), 8),
}


def directory(shared_data, folder, generation, eos):
  """stories260K with other end tokens."""
  source = shared_data / "models" / "stories260K"
  shutil.copytree(source, folder, dirs_exist_ok=True)
  path = folder / "generation_config.json"
  if generation is None:
    path.unlink()
  else:
    path.write_text(json.dumps(generation))
  values = json.loads((folder / "config.json").read_text())
  values["eos_token_id"] = eos
  (folder / "config.json").write_text(json.dumps(values))
  return folder


def opened(folder):
  config, params = load.load(folder, "float32")
  tokenizer = load_tokenizer(folder)
  return config, params, tokenizer, end_tokens(folder, config, tokenizer)


@pytest.mark.parametrize("case", CASES)
def test_ends_where_transformers_ends(shared_data, tmp_path, case):
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  generation, eos, ids, length = CASES[case]
  folder = directory(shared_data, tmp_path, generation, eos)
  config, params, tokenizer, found = opened(folder)
  assert found == ids
  prompt = tokenizer.encode("Once upon a time")
  (new,) = generate.generate(config, params, [prompt], 30, eos_ids=found)
  assert len(new) == length
  peer = transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32
  )
  with torch.no_grad():
    expected = peer.generate(
      torch.tensor([prompt]), max_new_tokens=30, do_sample=False
    )
  assert new == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
  "generation, eos, ids",
  [
    ({}, 7, (7,)),  # names none: Transformers never ends, config.json is asked
    ({"eos_token_id": None}, [7, 8], (7, 8)),
    ({"eos_token_id": []}, 7, (7,)),
    ({"eos_token_id": -1}, -1, (2,)),  # the tokenizer's
    (None, None, (2,)),
    ({"eos_token_id": [9, 9, 4]}, 7, (9, 4)),
  ],
)
def test_who_is_asked(shared_data, tmp_path, generation, eos, ids):
  folder = directory(shared_data, tmp_path, generation, eos)
  config, _, _, found = opened(folder)
  assert found == ids
  assert end_tokens(None, config, None) == tuple(
    i for i in config.eos_ids if i >= 0
  )


@pytest.mark.parametrize(
  "text, message",
  [
    ('{"eos_token_id": "</s>"}', "eos_token_id='</s>' must be a token id"),
    ('{"eos_token_id": [1, true]}', "must be a token id or a list"),
    ("{", "is damaged, it is not JSON"),
  ],
)
def test_damaged(shared_data, tmp_path, text, message):
  folder = directory(shared_data, tmp_path, {}, 2)
  (folder / "generation_config.json").write_text(text)
  with pytest.raises(UserError, match=message):
    opened(folder)
