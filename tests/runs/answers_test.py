"""Truth: Transformers' generate, and agreement computed by hand."""

import json
import math

import jax
import numpy as np
import pytest

from adapt_pruner_jax.config import Config
from adapt_pruner_jax.data import prompts
from adapt_pruner_jax.data.sources import parse_sources
from adapt_pruner_jax.data.tokenizer import load_tokenizer
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.evaluation import answer_agreement, answers
from adapt_pruner_jax.formats.hf import load
from adapt_pruner_jax.models.decoder import Decoder
from adapt_pruner_jax.runs import answers as run_answers
from adapt_pruner_jax.runs import run
from tests import small, small_runs

ASKED = ["What is a list?", "Why?", "Name a number.", "What does del do?"]


@pytest.fixture(scope="module")
def chat_model(small_model, tmp_path_factory):
  import shutil

  folder = tmp_path_factory.mktemp("chat") / "model"
  shutil.copytree(small_model, folder)
  (folder / "chat_template.jinja").write_text(small_runs.CHAT_TEMPLATE)
  return folder


@pytest.fixture(scope="module")
def opened(chat_model):
  config, params = load.load(str(chat_model), "float32", small.one_device())
  return config, params, load_tokenizer(chat_model)


def asked(opened, folder, tmp_path, options="", eos=None):
  config, _, tokenizer = opened
  file = tmp_path / "prompts.jsonl"
  if not file.exists():
    file.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in ASKED))
  spec = f"self:{file},split=all,max_new_tokens=8,batch=3{options}"
  (source,) = parse_sources(spec, "data.source")
  found = answers.request(
    source, config, folder, tokenizer, ("x",), tmp_path / "cache"
  )
  # A random model ends where it is told that it has ended.
  object.__setattr__(found, "eos_ids", eos or found.eos_ids)
  return found


def some_eos(opened, chat_model, tmp_path):
  """A token that some answers hold."""
  found = asked(opened, chat_model, tmp_path, ",seed=9")
  row = answers._answered(found, 0, *opened[:2], None)[0]
  return (row["answer_tokens"][4],)


@pytest.mark.slow
def test_answers_are_transformers_greedy_ones_and_go_on_after_a_kill(
  opened, chat_model, tmp_path, monkeypatch
):
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  eos = some_eos(opened, chat_model, tmp_path)
  found = asked(opened, chat_model, tmp_path, eos=eos)
  calls = []
  real = answers._answered
  monkeypatch.setattr(
    answers, "_answered", lambda *a: calls.append(a[1]) or real(*a)
  )

  def killed():
    if calls:
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    answers.write(found, *opened[:2], stop_if_asked=killed)
  assert not answers.is_written(found)
  answers.write(found, *opened[:2])
  assert calls == [0, 1]  # the first group was not answered again
  assert answers.is_written(found)
  model = transformers.AutoModelForCausalLM.from_pretrained(chat_model)
  rows = answers.read(found)
  assert [r["messages"][0]["content"] for r in rows] == ASKED
  for row in rows:
    prompt = torch.tensor([row["prompt_tokens"]])
    mask = torch.ones_like(prompt)
    made = model.generate(
      prompt,
      attention_mask=mask,
      max_new_tokens=8,
      do_sample=False,
      eos_token_id=list(eos),
      pad_token_id=0,
    )[0, prompt.shape[1] :].tolist()
    assert row["answer_tokens"] == made
    assert row["ended"] == (made[-1] in eos)


@pytest.mark.slow
def test_agreement_is_what_a_hand_finds(opened):
  config, params, _ = opened
  other = jax.tree.map(lambda x: x * 1.1, params)
  rng = np.random.default_rng(0)
  draw = lambda n: rng.integers(3, config.vocab_size, n).tolist()
  rows = [
    {"prompt_tokens": draw(n), "answer_tokens": draw(m)}
    for n, m in ((3, 5), (7, 2), (2, 9))
  ]
  kl, same, count = 0.0, 0, 0
  for row in rows:
    ids = np.array([row["prompt_tokens"] + row["answer_tokens"]])
    first = len(row["prompt_tokens"]) - 1
    logits = [
      np.asarray(Decoder(config).apply({"params": p}, ids)[0], np.float64)
      for p in (params, other)
    ]
    logs = [
      x - np.log(np.exp(x).sum(-1, keepdims=True))
      for x in (y[0, first:-1] for y in logits)
    ]
    kl += (np.exp(logs[0]) * (logs[0] - logs[1])).sum()
    same += (logs[0].argmax(-1) == logs[1].argmax(-1)).sum()
    count += len(logs[0])
  found = answer_agreement.answer_agreement(
    (config, params), (config, other), rows, 2
  )
  assert found["answer_tokens"] == count == 16
  assert math.isclose(found["answer_kl"], kl / count, rel_tol=1e-4)
  assert found["answer_agreement"] == pytest.approx(same / count)


def test_a_model_that_does_not_stop_is_refused(
  opened, chat_model, tmp_path, monkeypatch
):
  """After a few answers, and when the same command is given again."""
  found = asked(opened, chat_model, tmp_path, eos=(opened[0].vocab_size,))
  with monkeypatch.context() as patch:
    patch.setattr(answers, "ENOUGH", 2)
    with pytest.raises(UserError, match="does not stop: none of its 3"):
      answers.write(found, *opened[:2])
    assert len([*tmp_path.rglob("part-*")]) == 1
    patch.setattr(answers, "_answered", None)
    with pytest.raises(UserError, match="does not stop: none of its 3"):
      answers.write(found, *opened[:2])
  with pytest.raises(UserError, match="does not stop: none of its 4"):
    answers.write(found, *opened[:2])


@pytest.mark.parametrize(
  "row, message",
  [
    ('{"text": "a"}', "one of prompt and messages"),
    ('{"prompt": "a", "completion": "b"}', "'completion'"),
    ('{"prompt": " "}', "asks nothing"),
    ("", "no prompts"),
  ],
)
def test_bad_prompts_are_named(opened, chat_model, tmp_path, row, message):
  (tmp_path / "prompts.jsonl").write_text(row + "\n")
  with pytest.raises(UserError, match=message):
    asked(opened, chat_model, tmp_path)


def test_no_chat_template(small_model):
  (source,) = parse_sources("self", "data.source")
  with pytest.raises(UserError, match="no chat template"):
    prompts.read_prompts(source, load_tokenizer(small_model))


def test_our_prompts_and_held_out_ones(opened, chat_model, tmp_path):
  config, _, tokenizer = opened
  read = lambda spec, name: prompts.read_prompts(
    parse_sources(spec, name)[0], tokenizer
  )
  held_out, rest = read("self", "eval.answers"), read("self", "data.source")
  assert len(held_out) + len(rest) == len(read("self,split=all", "")) > 100
  recipe = Config()
  recipe.train.tokens = 100
  recipe.data.source = "self,split=all,max_new_tokens=1,limit=9"
  recipe.eval.answers = "self,split=all,max_new_tokens=1,limit=9"
  with pytest.raises(UserError, match="9 prompts in common"):
    run_answers.check(
      *(recipe, config, chat_model, tokenizer), lambda: ("x",), tmp_path
    )


@pytest.mark.slow
def test_a_run_learns_and_is_measured_on_answers(
  opened, chat_model, tmp_path, monkeypatch
):
  config, params, tokenizer = opened
  # Half of all tokens end an answer, so that a random model does stop.
  eos = list(range(0, config.vocab_size, 2))
  settings = json.dumps({"eos_token_id": eos})
  (chat_model / "generation_config.json").write_text(settings)
  recipe = small_runs.recipe(chat_model, stages=1, tokens=1024)
  file = tmp_path / "prompts.jsonl"
  rows = [json.dumps({"prompt": f"Why {i}?"}) for i in range(40)]
  file.write_text("\n".join(rows))
  how = f"self:{file},max_new_tokens=16"
  recipe.data.source = recipe.eval.answers = how
  recipe.calibration.source = f"{how},loss=all"
  recipe.eval.text = ""
  summary = run.run(recipe, tmp_path / "run")
  assert 0 < summary["answer_kl"] < 100
  assert 0 <= summary["answer_agreement"] <= 1
  kept = list((tmp_path / "run" / "cache").glob("answers-*.jsonl"))
  assert len(kept) == 2
  assert "KL to the original" in (tmp_path / "run/report.html").read_text()
  # The second time nothing is answered.
  monkeypatch.setattr(answers, "write", None)
  again = run.run(recipe, tmp_path / "run", overwrite=True)
  assert again["answer_kl"] == summary["answer_kl"]
