"""Between formats, through files and the command line, and bad input."""

import dataclasses
import hashlib
import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy

from adapt_pruner_jax import cli
from adapt_pruner_jax.distributed import sharding
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.formats import convert, opening
from adapt_pruner_jax.formats.gguf import writer
from adapt_pruner_jax.formats.hf import card, files, load, parameters, save
from adapt_pruner_jax.formats.orbax import is_orbax
from adapt_pruner_jax.models import model_config
from tests import small


@pytest.fixture(scope="module", autouse=True)
def compile_fast():
  """Most of the time goes into compiling programs that run once."""
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)


def same(one, two):
  return jax.tree.all(jax.tree.map(np.array_equal, one, two))


def command(capsys, *options):
  """Runs `adapt-pruner convert`; gives the exit code and what was said."""
  with pytest.raises(SystemExit) as ended:
    cli.main(["convert", *map(str, options)])
  out, err = capsys.readouterr()
  return ended.value.code, out + err


def refusal(capsys, *options):
  code, said = command(capsys, *options)
  assert code == 1
  assert said.startswith("error: ")
  assert said.count("\n") == 1
  return said


def flip(file, at=-1):
  content = bytearray(file.read_bytes())
  content[at] ^= 1
  file.write_bytes(content)


def damage(orbax):
  """Flips a bit amid the bytes of the arrays; gives the file."""
  data = max(orbax.glob("params/d/*"), key=lambda f: f.stat().st_size)
  flip(data, data.stat().st_size // 2)
  return data


@pytest.fixture(scope="module")
def written(tmp_path_factory):
  """An uneven model in bfloat16, with something of a tokenizer."""
  root = tmp_path_factory.mktemp("convert")
  (root / "parent").mkdir()
  (root / "parent" / "special_tokens_map.json").write_text("{}")
  params = small.random_params(small.CONFIG, dtype=jax.numpy.bfloat16)
  path = root / "hf"
  save.save(
    small.CONFIG, params, path, source=root / "parent", say=lambda _: None
  )
  return path, params


@pytest.fixture(scope="module")
def orbax(written, tmp_path_factory):
  out = tmp_path_factory.mktemp("orbax") / "model"
  convert.convert(str(written[0]), out, "orbax")
  return out


@pytest.fixture
def broken(orbax, tmp_path):
  """A copy to break."""
  return shutil.copytree(orbax, tmp_path / "model")


def test_there_and_back_is_byte_identical(written, orbax, tmp_path, capsys):
  path, _ = written
  back = tmp_path / "back"
  code, _ = command(capsys, f"--model={orbax}", f"--out={back}")
  assert code == 0
  one, two = ((p / "model.safetensors").read_bytes() for p in (path, back))
  assert one == two
  assert (back / "special_tokens_map.json").read_text() == "{}"
  assert (back / "config.json").read_bytes() == (
    path / "config.json"
  ).read_bytes()


@pytest.mark.parametrize("format", ["hf", "orbax"])
def test_what_came_with_the_parent_goes_along(written, tmp_path, format):
  """End tokens of `generate`, the licence, and all chat templates."""
  parent = shutil.copytree(written[0], tmp_path / "parent")
  files = {
    "generation_config.json": '{"eos_token_id": [7, 9]}',
    "LICENSE": "You may.",
    "tokenizer.json": "{}",
    "chat_template.jinja": "plain",
    "additional_chat_templates/tool_use.jinja": "tools",
  }
  (parent / "additional_chat_templates").mkdir()
  for name, text in files.items():
    (parent / name).write_text(text)
  convert.convert(str(parent), tmp_path / "out", format)
  convert.convert(str(tmp_path / "out"), tmp_path / "hf", "hf")
  for folder in (tmp_path / "out", tmp_path / "hf"):
    for name, text in files.items():
      assert (folder / name).read_text() == text, name
    card.verify(folder)


def test_from_file_to_file(written, tmp_path, monkeypatch):
  """No parameter goes to a device."""
  path, params = written
  monkeypatch.setattr(parameters.Stored, "place_on", None)
  convert.convert(str(path), tmp_path / "same", "hf")
  one, two = (p / "model.safetensors" for p in (path, tmp_path / "same"))
  assert one.read_bytes() == two.read_bytes()
  convert.convert(str(path), tmp_path / "u", "hf_uniform", dtype="float32")
  convert.convert(str(path), tmp_path / "gguf", "gguf")
  monkeypatch.undo()
  _, again = load.load(tmp_path / "u")
  F = small.CONFIG.ffn_widths[1]
  found = again["layer_1"]["gate"][:, :F]
  assert np.array_equal(found, params["layer_1"]["gate"].astype(np.float32))


@pytest.mark.parametrize(
  "changes",
  [
    {"kv_groups": (0, 2, 3), "ffn_widths": (24, 0, 17)},
    {"residual": ((16, 12, 10), (10, 9, 11), (11, 8, 7))},
  ],
  ids=["no attention", "SliceGPT"],
)
def test_orbax_holds_what_others_cannot(changes, tmp_path):
  config = dataclasses.replace(small.CONFIG, **changes)
  params = small.random_params(config)
  convert.write(config, params, tmp_path / "model", "orbax")
  found, again, _ = opening.open_model(str(tmp_path / "model"))
  assert found == config
  assert same(again, params)


def test_orbax_on_a_mesh_and_in_another_dtype(written, orbax):
  mesh = sharding.make_mesh(2, 2, 2)
  config, params, _ = opening.open_model(str(orbax), "float32", mesh=mesh)
  assert config == small.CONFIG
  expected = jax.tree.map(lambda x: x.astype(np.float32), written[1])
  assert same(params, expected)
  placed = sharding.param_shardings(params, mesh)
  assert params["layer_1"]["q"].sharding == placed["layer_1"]["q"]


@pytest.mark.parametrize(
  "content",
  [
    "",
    "{",
    "[]",
    "7",
    "{}",
    '{"model": {}}',
    '{"model": {"V": 3}, "dtype": "float32"}',
    '{"model": [], "dtype": "float32", "fingerprints": {}}',
    "dtype",
    "fingerprints",
  ],
)
def test_a_damaged_manifest_is_one_line(broken, capsys, tmp_path, content):
  """Also if SHA256SUMS was made anew."""
  file = broken / files.MANIFEST
  if content in ("dtype", "fingerprints"):
    raw = json.loads(file.read_text()) | {content: "years"}
    content = json.dumps(raw)
  file.write_text(content)
  card.write_sums(broken)
  text = refusal(capsys, f"--model={broken}", f"--out={tmp_path / 'out'}")
  assert str(file) in text


def test_damaged_arrays_are_refused(broken, capsys, tmp_path):
  """Wherever the bit is flipped, as long as it is in an array's bytes."""
  data = damage(broken)
  out = tmp_path / "out"
  said = refusal(capsys, f"--model={broken}", f"--out={out}")
  assert f"{broken / 'params'} is damaged" in said
  assert not out.exists()
  assert str(data) in refusal(capsys, f"--model={broken}", "--verify")


def test_nothing_else_is_said_of_damage(broken, tmp_path):
  """Orbax's other reads end later, and each would complain of it."""
  damage(broken)
  program = """
import gc, pathlib, sys
from adapt_pruner_jax.formats import convert
from adapt_pruner_jax.errors import UserError
for _ in range(5):
  try:
    convert.convert(sys.argv[1], pathlib.Path(sys.argv[2]), "hf")
  except UserError as error:
    print(error, file=sys.stderr)
  gc.collect()
"""
  line = [sys.executable, "-c", program, broken, tmp_path / "out"]
  done = subprocess.run(line, capture_output=True, text=True)
  for said in done.stderr.splitlines():
    assert "is damaged" in said
  assert done.stderr.count("\n") == 5


def test_damaged_manifest_is_refused(broken, capsys, tmp_path):
  """Also where it stays valid JSON, and would be another function."""
  file = broken / files.MANIFEST
  out = f"--out={tmp_path / 'out'}"
  text = file.read_text()
  changed = text.replace('"norm_eps": 1e-05', '"norm_eps": 1e-04')
  assert changed != text
  for content in (changed, text[:-9]):
    file.write_text(content)
    said = refusal(capsys, f"--model={broken}", out)
    assert f"{file} was changed" in said
  (broken / card.SUMS).unlink()
  assert "has no SHA256SUMS" in refusal(capsys, f"--model={broken}", out)


def test_verify(broken, capsys):
  code, said = command(capsys, f"--model={broken}", "--verify")
  assert code == 0
  assert "all files are as they were written" in said
  verify = (f"--model={broken}", "--verify")
  (broken / "more.json").write_text("{}")
  assert "more.json is not in SHA256SUMS" in refusal(capsys, *verify)
  (broken / "more.json").unlink()
  (broken / "special_tokens_map.json").write_text("[]")
  assert "special_tokens_map.json was changed" in refusal(capsys, *verify)
  (broken / "special_tokens_map.json").unlink()
  assert "special_tokens_map.json is missing" in refusal(capsys, *verify)
  nothing = f"--model={broken / 'nothing'}"
  assert "does not exist" in refusal(capsys, nothing, "--verify")


def test_sums_are_those_of_sha256sum(orbax):
  for line in (orbax / card.SUMS).read_text().splitlines():
    digest, name = line.split("  ")
    content = (orbax / name).read_bytes()
    assert hashlib.sha256(content).hexdigest() == digest
  assert " params/" in (orbax / card.SUMS).read_text()


def test_sums_do_not_lead_out(broken):
  sums = broken / card.SUMS
  for name in ("../secret", "/etc/passwd"):
    sums.write_text(f"{'0' * 64}  {name}\n")
    with pytest.raises(UserError, match="SHA256SUMS is damaged"):
      card.verify(broken)


def test_nothing_is_overwritten(written, tmp_path, capsys):
  path, _ = written
  model_flag = f"--model={path}"
  for format in convert.FORMATS:
    out = tmp_path / format
    out.write_text("mine")
    said = refusal(capsys, model_flag, f"--out={out}", f"--format={format}")
    assert "exists" in said
    assert "--overwrite" in said
    assert out.read_text() == "mine"
  home = tmp_path / "home"
  home.mkdir()
  (home / "thesis").write_text("years")
  for format in convert.FORMATS:
    options = (f"--out={home}", f"--format={format}", "--overwrite")
    said = refusal(capsys, model_flag, *options)
    assert ("not a model directory" in said) or ("is a directory" in said)
    assert (home / "thesis").read_text() == "years"
  assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
    [*convert.FORMATS, "home"]
  )


def test_overwriting(written, tmp_path):
  """With leave, and then the new one is there."""
  path, _ = written
  for format in ("orbax", "gguf"):
    out = tmp_path / format
    convert.convert(str(path), out, format)
    if format == "orbax":
      (out / "mark").write_text("old")
    else:
      out.write_bytes(b"old")
    convert.convert(str(path), out, format, overwrite=True)
    assert not (out / "mark").exists()
    assert out.is_dir() or out.stat().st_size > 1000
  for format in ("hf", "orbax"):  # one in place of the other
    convert.convert(str(path), tmp_path / "orbax", format, overwrite=True)
    assert is_orbax(str(tmp_path / "orbax")) == (format == "orbax")


@pytest.mark.parametrize("format", ["orbax", "gguf"])
def test_interrupted_writing_leaves_nothing(
  format, written, tmp_path, monkeypatch
):
  def stop(*_, **__):
    raise KeyboardInterrupt

  monkeypatch.setattr(card, "write_sums", stop)
  monkeypatch.setattr(writer, "compare", stop)
  with pytest.raises(KeyboardInterrupt):
    convert.convert(str(written[0]), tmp_path / "out", format)
  assert list(tmp_path.iterdir()) == []


def test_what_is_refused_and_what_can(written, tmp_path, capsys):
  path, _ = written
  options = (f"--model={path}", f"--out={tmp_path / 'out'}")
  said = refusal(capsys, *options, "--format=ggfu")
  assert "did you mean gguf" in said
  said = refusal(capsys, *options, "--dtype=q8_0")
  assert "float32, bfloat16, float16" in said
  assert "gguf" in said
  said = refusal(capsys, *options, "--format=gguf", "--dtype=q4_k")
  assert "f32, f16, bf16, q8_0" in said
  assert "needs --out" in refusal(capsys, options[0])
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
  "changes, format, can",
  [
    ({"residual": ((16, 9, 9),) * 3}, "hf", "orbax"),
    ({"residual": ((16, 9, 9),) * 3}, "hf_uniform", "orbax"),
    ({"residual": ((16, 9, 9),) * 3}, "gguf", "orbax"),
    ({"kv_groups": (0, 0, 0)}, "hf_uniform", "--format=hf"),
    ({"kv_groups": (0, 2, 3)}, "gguf", "--format=hf"),
    ({"family": "gemma2"}, "gguf", "--format=hf_uniform"),
    ({"family": "olmo2", "qk_norm": "all"}, "hf_uniform", "--format=hf"),
    ({"family": "mistral", "o_bias": True}, "hf_uniform", "--format=hf"),
  ],
)
def test_a_refusal_names_a_format_that_can(changes, format, can, tmp_path):
  config = dataclasses.replace(small.CONFIG, **changes)
  params = model_config.abstract_params(config, np.float32)
  with pytest.raises(UserError, match=can):
    convert.write(config, params, tmp_path / "out", format)
  assert list(tmp_path.iterdir()) == []


def test_a_run_is_converted(shared_data, tmp_path, capsys):
  """A real model as a run leaves it: everything that its family allows."""
  source = shared_data / "models" / "stories260K"
  config, params = load.load(source)
  small_config = dataclasses.replace(
    config, kv_groups=(2, *config.kv_groups[1:])
  )
  layer = params["layer_0"]
  layer |= {name: layer[name][:, :2] for name in "qkv"} | {"o": layer["o"][:2]}
  run = tmp_path / "run"
  facts = {"method": "adapt", "model": "someone/stories"}
  save.save(
    small_config, params, run / "model", source=source, say=lambda _: None
  )
  (run / "summary.json").write_text(json.dumps(facts))
  said = refusal(capsys, f"--model={run}", f"--out={tmp_path / 'x'}")
  assert f"its model is {run / 'model'}" in said
  for format in convert.FORMATS:
    out = tmp_path / format
    options = (f"--model={run / 'model'}", f"--out={out}")
    code, said = command(capsys, *options, f"--format={format}")
    assert code == 0, said
    if format == "gguf":
      assert out.read_bytes()[:4] == b"GGUF"
      continue
    assert (out / "tokenizer.json").is_file()
    code, said = command(capsys, f"--model={out}", "--verify")
    assert code == 0, said
    if format != "orbax":
      text = (out / "README.md").read_text()
      assert "base_model: someone/stories" in text
      tensors = safetensors.numpy.load_file(out / "model.safetensors")
      heads = 8 if format == "hf_uniform" else 4
      q = tensors["model.layers.0.self_attn.q_proj.weight"]
      assert q.shape == (heads * config.head_dim, config.hidden_size)
