"""The command line: one clear line for each bad input, nothing half-written."""

import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from adapt_pruner_jax import cli
from adapt_pruner_jax.storage import lock
from tests.small_runs import SMALL

RUN = ["run", "--config=configs/paper.py"]


@pytest.fixture
def command(capsys, monkeypatch, tmp_path):
  """`command(*arguments)`: exit code, standard output and error."""
  monkeypatch.setenv("ADAPT_PRUNER_CACHE", str(tmp_path / "cache"))
  old = jax.config.jax_compilation_cache_dir

  def run(*arguments):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
      cli.main([str(a) for a in arguments])
    return stop.value.code or 0, *capsys.readouterr()

  yield run
  jax.config.update("jax_compilation_cache_dir", old)


@pytest.fixture
def refused(command):
  """`refused(words, *arguments)`: one line that has all the words, exit 1."""

  def run(words, *arguments):
    code, _, said = command(*arguments)
    (line,) = said.splitlines()
    assert (code, line[:7]) == (1, "error: ")
    for word in words:
      assert str(word) in line

  return run


def run_with(model, work, *fields):
  """A valid `run` but for the fields that are given."""
  base = {
    "model.path": model,
    "prune.ratio": 0.3,
    "calibration.source": "embedded",
    "calibration.samples": 8,
    "calibration.seq_len": 16,
    "calibration.batch": 8,
  }
  base |= dict(field.split("=", 1) for field in fields)
  flags = [f"--config.{name}={value}" for name, value in base.items()]
  return [*RUN, f"--workdir={work}", *flags]


BAD_FLAGS = {
  "no command": (["runn"], ["runn", "did you mean run?"]),
  "no workdir": (RUN, ["--workdir"]),
  "no recipe": (
    ["run", "--config=configs/onshot.py", "--workdir=w"],
    ["did you mean oneshot.py?", "configs/accel.py"],
  ),
  "no field": (
    [*RUN, "--workdir=w", "--config.prune.ratoi=0.2"],
    ["prune.ratoi", "did you mean prune.ratio?"],
  ),
  "no number": (
    [*RUN, "--workdir=w", "--config.prune.ratio=much"],
    ["prune.ratio"],
  ),
  "no flag": (["evaluate", "--model=m", "--task=x"], ["task"]),
  "no value": (["evaluate", "model"], ["model", "--name=value"]),
  "verify": (["convert", "--model=x", "--out=y", "--verify"], ["leave out"]),
  "table": (["profile", "--model=x", "--out=gs://b/t.json"], ["on a disk"]),
  "bucket": ([*RUN, "--workdir=ftp://bucket/w"], ["gs://BUCKET/", "s3://"]),
  "no model": (["convert", "--out=x"], ["--model"]),
  "no coordinator": (
    [*RUN, "--workdir=w", "--num_processes=2", "--process_id=1"],
    ["--process_id=1", "--coordinator=HOST:PORT", "--distributed"],
  ),
  "no such process": (
    ["evaluate", "--model=m", "--coordinator=h:1", "--num_processes=2"],
    ["--process_id=-1", "from 0 on"],
  ),
  "no time to connect": (
    ["compare", "--workdir=w", "--connect_seconds=0"],
    ["--connect_seconds=0 must be at least 1"],
  ),
}


@pytest.mark.parametrize("name", BAD_FLAGS)
def test_bad_flags(refused, name, tmp_path, monkeypatch):
  arguments, words = BAD_FLAGS[name]
  before = sorted(tmp_path.iterdir())
  refused(words, *arguments)
  assert sorted(tmp_path.iterdir()) == before


BAD_FIELDS = {
  "missing": (["model.path=/nowhere/at/all"], ["/nowhere/at/all"]),
  "both targets": (
    ["prune.target_params=30000"],
    ["prune.ratio", "prune.target_params", "give one"],
  ),
  "no target": (["prune.ratio=0"], ["no target", "prune.ratio=0.2"]),
  "above": (
    ["prune.ratio=0", "prune.target_params=999999999"],
    ["999,999,999", "42,080"],
  ),
  "below": (["prune.ratio=0", "prune.target_params=10"], ["10", "reach"]),
  "no method": (["prune.method=adept"], ["adept", "did you mean adapt?"]),
  "short text": (["calibration.source=text:{folder}/short.txt"], ["short"]),
  "empty text": (["calibration.source=text:{folder}/empty.txt"], ["empty"]),
  "no UTF-8": (["calibration.source=text:{folder}/latin.txt"], ["UTF-8"]),
  "no text": (["calibration.source=text:{folder}/none.txt"], ["none.txt"]),
  "jsonl": (
    [
      "train.tokens=512",
      "data.seq_len=32",
      "data.source=jsonl:{folder}/broken.jsonl",
    ],
    ["broken.jsonl", "2"],
  ),
  "ids": (["calibration.source=npy:{folder}/ids.npy"], ["ids.npy", "300"]),
  "mesh": (["mesh.data=3", "mesh.fsdp=1"], ["8 device", "mesh.data"]),
  "batch": (
    ["train.tokens=512", "data.seq_len=32", "data.batch=6"],
    ["batch of 6", "8", "data.batch"],
  ),
  "calibration beyond the context": (
    ["calibration.seq_len=65"],
    ["calibration.seq_len=65", "context", "calibration.seq_len=64"],
  ),
  "rows beyond the context": (
    ["train.tokens=512"],
    ["data.seq_len=1024", "data.seq_len=64"],
  ),
  "text beyond the context": (
    ["eval.text=embedded", "eval.seq_len=65"],
    ["eval.seq_len=65"],
  ),
  "rising rate": (
    ["train.tokens=512", "train.learning_rate=1e-6"],
    ["train.min_learning_rate=2e-06", "rise"],
  ),
  "SliceGPT with a refit": (
    ["prune.method=slicegpt", "prune.refit=final"],
    ["SliceGPT", "prune.refit=none"],
  ),
  "refit by the loss, no passes": (
    ["prune.refit=loss"],
    ["prune.refit_passes", "such as 3"],
  ),
  "passes without a refit": (
    ["prune.refit_passes=3"],
    ["prune.refit=final", "loss for these passes alone"],
  ),
  "layers": (["prune.mlp_layers=2:9"], ["2:9"]),
  "no layers": (
    ["prune.mlp_layers=0:0", "prune.attention_layers=1:1"],
    ["no layer is left", "prune.attention_layers"],
  ),
  "no task": (["eval.tasks=arc_esy"], ["arc_esy", "did you mean arc_easy?"]),
  "text as a task": (["eval.tasks=perplexity"], ["eval.text=FILE"]),
}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
  folder = tmp_path_factory.mktemp("texts")
  (folder / "short.txt").write_text("A few words.")
  (folder / "empty.txt").write_text("")
  (folder / "latin.txt").write_bytes("für alle Fälle ".encode("latin-1") * 999)
  (folder / "broken.jsonl").write_text('{"text": "fine"}\n{"text": "bro\n')
  np.save(folder / "ids.npy", np.full((9, 8, 16), SMALL.V + 7, np.int32))
  return folder


@pytest.mark.parametrize("name", BAD_FIELDS)
def test_bad_fields(refused, small_model, tmp_path, texts, name):
  fields, words = BAD_FIELDS[name]
  work = tmp_path / "work"
  fields = [f.replace("{folder}", str(texts)) for f in fields]
  refused(words, *run_with(small_model, work, *fields))
  assert not (work / "model").exists()
  assert not (work / "summary.json").exists()


def test_bad_models(refused, small_model, tmp_path):
  config = json.loads((small_model / "config.json").read_text())

  def changed(name, **fields):
    folder = shutil.copytree(small_model, tmp_path / name)
    text = json.dumps(config | fields)
    (folder / "config.json").write_text(text)
    return folder

  def check(words, folder):
    out = tmp_path / "out"
    arguments = ["convert", f"--model={folder}", f"--out={out}"]
    refused(words, *arguments)
    assert not out.exists()
    assert not list(tmp_path.glob(".out*"))

  check(["bert", "llama"], changed("bert", model_type="bert"))
  check(["attention_sinks"], changed("field", attention_sinks=4))
  pickle = changed("pickle")
  (pickle / "model.safetensors").rename(pickle / "pytorch_model.bin")
  check(["pytorch_model.bin", "save_pretrained"], pickle)
  cut = changed("cut")
  file = cut / "model.safetensors"
  file.write_bytes(file.read_bytes()[:-9])
  check(["model.safetensors", "truncated"], cut)
  missing = changed("missing")
  weights = load_file(missing / "model.safetensors")
  name = "model.layers.1.mlp.up_proj.weight"
  del weights[name]
  save_file(weights, missing / "model.safetensors")
  check([name, "missing"], missing)


@pytest.mark.slow
def test_directories(refused, command, small_model, tmp_path):
  work = tmp_path / "work"
  with lock.lock(work):
    refused(["in use", "process"], *run_with(small_model, work))
  assert [f.name for f in work.iterdir()] == ["run.lock"]
  file = tmp_path / "file"
  file.touch()
  refused(["cannot be written"], *run_with(small_model, file / "work"))
  refused(["adapt-pruner run"], "report", f"--workdir={tmp_path / 'nowhere'}")
  convert = ["convert", f"--model={small_model}", f"--out={tmp_path / 'out'}"]
  assert command(*convert)[0] == 0
  refused(["exists", "overwrite"], *convert)
  assert command(*convert, "--overwrite")[0] == 0
  refused(["no-such"], *convert, "--format=no-such")
  evaluate = ["evaluate", f"--model={small_model}"]
  refused(["--text"], *evaluate)
  refused(["arc_esy"], *evaluate, "--tasks=arc_esy", f"--tasks_dir={tmp_path}")
  text = tmp_path / "text.txt"
  text.write_text("The with statement wraps a block.")
  for kind in ("bf16", "int8"):
    refused(
      ["dtype", "bfloat16"], *evaluate, f"--text={text}", f"--dtype={kind}"
    )
  refused(
    ["gs://"], "compare", "--workdir=ftp://b/w", "--config=configs/paper.py"
  )


def test_ignored_fields(command, refused, small_model, tmp_path):
  """What `run` is told to pass over, the other commands can be told too."""
  folder = shutil.copytree(small_model, tmp_path / "odd")
  config = json.loads((folder / "config.json").read_text())
  text = json.dumps(config | {"a_new_field": 3})
  (folder / "config.json").write_text(text)
  generate = ["generate", f"--model={folder}", "--prompt=The"]
  generate += ["--max_new_tokens=1"]
  refused(["a_new_field", "--ignore_fields=a_new_field"], *generate)
  assert command(*generate, "--ignore_fields=a_new_field")[0] == 0
  (tmp_path / "text.txt").write_text("The with statement wraps a block.")
  evaluate = ["evaluate", f"--model={folder}", f"--text={tmp_path}/text.txt"]
  refused(["a_new_field"], *evaluate)
  assert command(*evaluate, "--ignore_fields=a_new_field")[0] == 0
  convert = ["convert", f"--model={folder}", f"--out={tmp_path / 'out'}"]
  convert += ["--format=hf_uniform", "--ignore_fields=a_new_field"]
  assert command(*convert)[0] == 0


@pytest.mark.slow
def test_run_then_everything_else(command, small_model, tmp_path, monkeypatch):
  work = tmp_path / "work"
  arguments = run_with(small_model, work, "mesh.data=8", "mesh.fsdp=1")
  code, said, _ = command(*arguments)
  assert code == 0
  assert "finished" not in said
  code, said, _ = command(*arguments)  # again
  assert (code, "finished" in said) == (0, True)
  (work / "report.html").unlink()  # as if killed just before it was written
  assert command(*arguments)[0] == 0
  assert (work / "report.html").is_file()
  code, _, said = command(*arguments, "--config.prune.amplitude=0.1")
  assert code == 1
  assert "prune.amplitude: 0.02 -> 0.1" in said

  model = work / "model"
  code, said, _ = command("plan", *arguments[1:2], *arguments[3:])
  assert code == 0
  assert "42,080" in said
  with monkeypatch.context() as patch:  # a shell leaves it to the command
    patch.setenv("HOME", str(tmp_path))
    code, said, _ = command("report", "--workdir=~/work")
  assert code == 0
  assert "report.html" in said
  code, said, _ = command("convert", f"--model={model}", "--verify")
  assert code == 0

  text = tmp_path / "text.txt"
  text.write_text("The with statement wraps a block of code. " * 40)
  out = tmp_path / "out.json"
  code, said, _ = command(
    "evaluate", f"--model={model}", f"--text={text}", f"--out={out}"
  )
  assert code == 0
  assert json.loads(out.read_text()) == json.loads(said)
  generate = ["generate", f"--model={model}", "--prompt=The with statement"]
  first = command(*generate, "--max_new_tokens=8", "--mesh.fsdp=8")
  assert first[0] == 0
  assert first[1].startswith("The with statement")
  assert first == command(*generate, "--max_new_tokens=8")


def test_convert_there_and_back(command, small_model, tmp_path):
  there, back = tmp_path / "orbax", tmp_path / "hf"
  for source, out, format in (
    (small_model, there, "orbax"),
    (there, back, "hf"),
  ):
    arguments = [f"--model={source}", f"--out={out}", f"--format={format}"]
    arguments.append("--mesh.tensor=2")
    assert command("convert", *arguments)[0] == 0
  old = load_file(small_model / "model.safetensors")
  new = load_file(back / "model.safetensors")
  assert old.keys() == new.keys()
  for name, value in old.items():
    np.testing.assert_array_equal(new[name], value, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hf", "orbax", "model.gguf"])
def test_convert_into_a_bucket(command, bucket, small_model, tmp_path, name):
  there, back = bucket / "converted" / name, tmp_path / "back"
  for source, out, format in (
    (small_model, there, name.removeprefix("model.")),
    (there, back, "hf"),
  ):
    arguments = [f"--model={source}", f"--out={out}", f"--format={format}"]
    assert command("convert", *arguments)[0] == 0
  new = load_file(back / "model.safetensors")
  for name, value in load_file(small_model / "model.safetensors").items():
    np.testing.assert_array_equal(new[name], value, err_msg=name)


def test_ctrl_c_is_one_line(command, monkeypatch):
  def convert(*_):
    raise KeyboardInterrupt

  monkeypatch.setitem(cli.COMMANDS, "convert", convert)
  assert command("convert") == (130, "", "interrupted\n")


def test_help(command):
  assert "evaluate" in command("--help")[1]
  for name in cli.COMMANDS:
    code, said, _ = command(name, "--help")
    assert (code, "--" in said) == (0, True)
  assert "--config.prune.ratio" in command("run", "--help")[1]
