"""Where a model is found: paths, links, the hub and its cache."""

import json
import shutil

import jax
import numpy as np
import pytest

from adapt_pruner_jax.data import tokenizer
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.formats import convert, opening, orbax
from adapt_pruner_jax.formats.hf import load, save
from adapt_pruner_jax.runs import tiny_model
from tests import small

CONFIG = small.CONFIG


@pytest.fixture(scope="module")
def written(tmp_path_factory):
  """A model and its directory."""
  path = tmp_path_factory.mktemp("finding") / "model"
  params = small.random_params(CONFIG)
  save.save(CONFIG, params, path, say=lambda _: None)
  return path, params


@pytest.fixture
def broken(written, tmp_path):
  """A copy to break."""
  return shutil.copytree(written[0], tmp_path / "model")


def refusal(path):
  with pytest.raises(UserError) as caught:
    load.load(path)
  text = str(caught.value)
  assert "\n" not in text
  return text


def same(one, two):
  return jax.tree.all(jax.tree.map(np.array_equal, one, two))


@pytest.mark.parametrize(
  "name",
  [
    "config.json",
    "model.safetensors",
    "LICENSE",
    "README.md",
    "tokenizer.json",
    "additional_chat_templates/tool_use.jinja",
  ],
)
def test_links_out_of_the_directory(broken, tmp_path, name):
  """They would be copied into the export, whatever they lead to."""
  secret = tmp_path / "secret"
  (broken / name).parent.mkdir(exist_ok=True)
  if (broken / name).exists():
    (broken / name).rename(secret)
  else:
    secret.write_text("years")
  (broken / name).symlink_to(secret)
  with pytest.raises(UserError, match=r"is a link to .*secret, outside of"):
    convert.convert(str(broken), tmp_path / "out", "hf")
  assert not (tmp_path / "out").exists()
  if name.endswith(("tokenizer.json", ".jinja")):
    if name != "tokenizer.json":
      tiny_model.train_tokenizer(tmp_path / "made", 300)
      made = tmp_path / "made" / "tokenizer.json"
      shutil.copyfile(made, broken / "tokenizer.json")
    with pytest.raises(UserError, match="is a link to"):
      tokenizer.load_tokenizer(broken)
  # Inside of it they may lead anywhere.
  (broken / name).unlink()
  secret.rename(broken / "elsewhere")
  (broken / name).symlink_to(broken / "elsewhere")
  if name != "tokenizer.json":  # which that is not
    convert.convert(str(broken), tmp_path / "out", "hf")
    copied = (tmp_path / "out" / name).read_bytes()
    if name not in ("config.json", "README.md"):  # which are made anew
      assert copied == (broken / "elsewhere").read_bytes()


@pytest.fixture
def hub(written, tmp_path, monkeypatch):
  """A cache that `from_pretrained` of Transformers has filled, offline."""
  cache = tmp_path / "hub"
  commits = {"main": "a" * 40, "v2": "b" * 40}
  repository = cache / "models--someone--small"
  listed = {}
  for revision, commit in commits.items():
    snapshot = repository / "snapshots" / commit
    for folder in (snapshot, repository / "blobs", repository / "refs"):
      folder.mkdir(parents=True, exist_ok=True)
    (repository / "refs" / revision).write_text(commit)
    for file in written[0].iterdir():
      listed[file.name] = {"size": file.stat().st_size, "blob_id": file.name}
      if file.name not in ("README.md", "SHA256SUMS"):
        shutil.copyfile(file, repository / "blobs" / file.name)
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    for name in ("LICENSE", "trainer_state.json"):
      listed[name] = {"size": 1, "blob_id": name}
    tree = repository / "trees" / f"{commit}.json"
    tree.parent.mkdir(exist_ok=True)
    tree.write_text(json.dumps({"format_version": 1, "files": listed}))
  other = repository / "snapshots" / commits["v2"] / "config.json"
  raw = json.loads(other.read_text()) | {"rms_norm_eps": 1e-3}
  other.unlink()
  other.write_text(json.dumps(raw))
  import huggingface_hub

  monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
  return repository


@pytest.mark.parametrize("marked", [True, False])
def test_a_hub_cache_whose_repositories_share_files(hub, written, marked):
  """As huggingface_hub 2 leaves it: links to links."""
  shared = hub.parent / "blobs"
  for number, blob in enumerate((hub / "blobs").iterdir()):
    place = shared / "ab" / f"ab{number:062x}"
    place.parent.mkdir(parents=True, exist_ok=True)
    blob.rename(place)
    blob.symlink_to(f"../../blobs/ab/{place.name}")
  if not marked:  # not the hub's
    assert "outside of its directory" in refusal("someone/small")
    return
  (shared / ".huggingface-shared-blobs").write_text("1\n")
  _, params = load.load("someone/small")
  assert same(params, written[1])
  inner = hub / "snapshots" / ("a" * 40) / "inner"  # a model in a subfolder
  inner.mkdir()
  for file in [*inner.parent.glob("*.*")]:
    (inner / file.name).symlink_to(f"../{file.name}")
  assert same(load.load(inner)[1], written[1])


def test_a_hub_cache_without_card_and_licence(hub, written):
  import huggingface_hub

  with pytest.raises(Exception, match="LICENSE"):
    huggingface_hub.snapshot_download("someone/small")
  config, params = load.load("someone/small")
  assert config == CONFIG
  assert same(params, written[1])
  snapshot = hub / "snapshots" / ("a" * 40)
  assert f"give its hub id or one of {snapshot}, " in refusal(hub)
  assert load.read_config(snapshot) == CONFIG
  config, _ = load.load("someone/small@v2")
  assert config.norm_eps == 1e-3
  assert load.read_config(f"someone/small@{'b' * 40}").norm_eps == 1e-3
  assert "someone/small@v3 is not a directory" in refusal("someone/small@v3")
  gone = hub / "snapshots" / ("a" * 40) / "model.safetensors"
  gone.unlink()
  assert "model.safetensors" in refusal("someone/small")


def test_what_is_downloaded():
  from huggingface_hub.utils import filter_repo_objects

  wanted = [
    *("config.json", "model-00001-of-00002.safetensors", "tokenizer.model"),
    *("LICENSE", "additional_chat_templates/tool_use.jinja"),
  ]
  others = [
    *("onnx/config.json", "original/tokenizer.model", "awq/model.safetensors"),
    *("adapter/config.json", "consolidated.safetensors", "model.bin"),
  ]
  found = filter_repo_objects(
    [*wanted, *others],
    allow_patterns=load.DOWNLOADED,
    ignore_patterns=load.NOT_DOWNLOADED,
  )
  assert list(found) == wanted


def test_home_in_a_path(written, monkeypatch, tmp_path):
  monkeypatch.setenv("HOME", str(written[0].parent))
  assert load.read_config("~/model") == CONFIG
  assert opening.open_model("~/model")[2] == written[0]
  convert.convert("~/model", "~/again", "orbax")
  assert opening.open_model("~/again")[0] == CONFIG
  orbax.verify("~/again")


def test_paths(tmp_path, written):
  assert "does not exist" in refusal(tmp_path / "nothing")
  assert "is a file" in refusal(written[0] / "config.json")
  text = refusal("nobody/no-such-model")  # offline in tests
  assert "nobody/no-such-model is not a directory" in text
  assert "network" in text
