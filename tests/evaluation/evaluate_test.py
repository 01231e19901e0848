"""What `adapt-pruner evaluate` and `generate` say, and where they stop."""

import contextlib
import json
import shutil

import jax
import pytest
from safetensors.numpy import load_file, save_file

from adapt_pruner_jax import cli
from adapt_pruner_jax.data.tokenizer import load_tokenizer
from adapt_pruner_jax.distributed import sharding
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.evaluation import evaluate, generate
from adapt_pruner_jax.formats.hf import load

TEXT = "One day, Lily saw a big dog. " * 20


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
def text(tmp_path):
  (tmp_path / "text.txt").write_text(TEXT)
  return str(tmp_path / "text.txt")


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
  folder = tmp_path_factory.mktemp("questions")
  row = {"question": "What says meow?", "choices": ["a cat", "it"], "answer": 0}
  (folder / "arc_easy.jsonl").write_text(4 * (json.dumps(row) + "\n"))
  return str(folder)


@pytest.fixture(scope="module")
def stories(shared_data):
  return shared_data / "models" / "stories260K"


@pytest.fixture(scope="module")
def loud(stories, tmp_path_factory):
  """The same with an MLP whose activations are beyond float16, not float32."""
  folder = tmp_path_factory.mktemp("loud")
  shutil.copytree(stories, folder, dirs_exist_ok=True)
  tensors = load_file(folder / "model.safetensors")
  for name in ("gate", "up"):
    tensors[f"model.layers.1.mlp.{name}_proj.weight"] *= 1e3
  save_file(tensors, folder / "model.safetensors", {"format": "pt"})
  return folder


# ---- Progress ----------------------------------------------------------------


class Recorder:
  """A phase that keeps what it is told."""

  def __init__(self):
    self.seen = []

  @contextlib.contextmanager
  def __call__(self, title, total, unit):
    told = []
    self.seen.append((title, total, unit, told))
    yield type("Told", (), {"update": staticmethod(told.append)})


def test_how_far_it_is(stories, text, questions):
  pytest.importorskip("lm_eval")
  phase = Recorder()
  found = evaluate.evaluate(
    str(stories),
    ["perplexity", "arc_easy"],
    text=text,
    seq_len=64,
    batch=2,
    tasks_dir=questions,
    mesh=sharding.one_device(),
    phase=phase,
  )
  (reading, scoring) = phase.seen
  title, total, unit, told = reading
  assert (title, unit) == ("perplexity", "tokens")
  assert total == len(load_tokenizer(stories).encode(TEXT)) == told[-1]
  assert found["tokens"] == total - 1  # all but the begin token
  assert told == sorted(set(told))
  assert len(told) == -(-total // 128)
  assert scoring[:3] == ("tasks: score", 8, "requests")
  assert scoring[3][-1] == 8


def test_how_far_generation_and_windows_are(stories):
  pytest.importorskip("lm_eval")
  from lm_eval.api.instance import Instance

  from adapt_pruner_jax.evaluation import lm_eval_run

  phase = Recorder()
  config, params = load.load(stories, "float32")
  lm = lm_eval_run.open_lm(
    config, params, load_tokenizer(stories), 2, phase=phase
  )
  settings = {"until": ["."], "max_gen_toks": 8}
  requests = [
    Instance("generate_until", {}, (said, settings), i, ("asked", i, 1))
    for i, said in enumerate(("The dog", "Lily", "Once upon"))
  ]
  lm.generate_until(requests)
  lm.loglikelihood_rolling(
    [Instance("loglikelihood_rolling", {}, (TEXT * 4,), 0, ("asked", 0, 1))]
  )
  assert phase.seen[0] == ("tasks: generate", 3, "requests", [2, 3])
  title, total, unit, told = phase.seen[1]
  assert (title, unit, told[-1]) == ("tasks: score", "windows", total)
  assert total > 1


def test_the_result_is_alone_on_stdout(command, stories, text, questions):
  pytest.importorskip("lm_eval")
  code, out, said = command(
    *("evaluate", f"--model={stories}", f"--text={text}", "--seq_len=64"),
    *("--tasks=perplexity,arc_easy", f"--tasks_dir={questions}", "--limit=2"),
  )
  assert code == 0
  found = json.loads(out)
  assert found["tasks"]["arc_easy"]["n"] == 2
  tokens = len(load_tokenizer(stories).encode(TEXT))
  assert f"perplexity: {tokens:,} / {tokens:,} tokens" in said
  assert "tasks: score: 4 / 4 requests, " in said


# ---- Not finite --------------------------------------------------------------


@pytest.mark.slow
def test_what_float16_cannot_hold(command, loud, text, questions):
  """In float32 the same is a number."""
  pytest.importorskip("lm_eval")
  asked = {
    "perplexity": ["--tasks=perplexity", f"--text={text}", "--seq_len=64"],
    "tasks": ["--tasks=arc_easy", f"--tasks_dir={questions}"],
  }
  for given in asked.values():
    arguments = ["evaluate", f"--model={loud}", *given]
    code, out, said = command(*arguments, "--dtype=float16")
    assert (code, out) == (1, "")
    line = said.splitlines()[-1]
    assert line.startswith("error: ")
    assert "are not finite in float16" in line
    assert "--dtype=float32 or --dtype=bfloat16" in line
    for dtype in ("float32", "bfloat16"):
      code, out, _ = command(*arguments, f"--dtype={dtype}")
      assert code == 0
      assert "Infinity" not in out
      assert "NaN" not in out
  code, out, said = command(
    *("generate", f"--model={loud}", "--prompt=Once", "--dtype=float16")
  )
  assert (code, out) == (1, "")
  assert "logits are not finite in float16" in said


def test_weights_that_are_not_finite(stories, text):
  config, params = load.load(stories, "float32")
  ruined = params | {"final_norm": params["final_norm"] * float("nan")}
  with pytest.raises(UserError, match=r"not finite in float32: the model's w"):
    generate.generate(config, ruined, [[1, 2, 3]], 4)


def test_a_word_as_long_as_the_text(stories, tmp_path):
  """Languages without spaces: there is no perplexity by word then."""
  (tmp_path / "text.txt").write_text("Zq7Xw" * 200)
  found = evaluate.evaluate(
    str(stories), ["perplexity"], text=str(tmp_path / "text.txt"), seq_len=64
  )
  assert found["words"] == 1
  assert found["word_perplexity"] is None
  assert found["perplexity"] > 1


# ---- End tokens --------------------------------------------------------------


def test_generate_ends_at_what_the_directory_lists(command, stories, tmp_path):
  """Token 421 is the eighth; that it is Transformers' end too,
  generation_config_test says."""
  folder = tmp_path / "model"
  shutil.copytree(stories, folder)
  arguments = ["generate", f"--model={folder}", "--prompt=Once upon a time"]
  arguments += ["--max_new_tokens=30"]
  _, longer, _ = command(*arguments)
  path = folder / "generation_config.json"
  path.write_text(json.dumps({"eos_token_id": [5, 421]}))
  code, shorter, _ = command(*arguments)
  assert code == 0
  assert longer.startswith(shorter.rstrip("\n"))
  encode = load_tokenizer(folder).encode
  assert (
    len(encode(shorter.rstrip("\n"))) == len(encode("Once upon a time")) + 8
  )
