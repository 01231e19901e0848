"""Examples, chats and end tokens. Truth: lm-eval's own command and HF model."""

import hashlib
import json
import shutil

import pytest

pytest.importorskip("lm_eval")
import lm_eval.tasks
from lm_eval.api.instance import Instance

from adapt_pruner_jax.data.tokenizer import load_tokenizer
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.evaluation import evaluate, lm_eval_model, lm_eval_run
from adapt_pruner_jax.evaluation.questions import Questions
from adapt_pruner_jax.formats.hf import load

CHAT = """{{ bos_token }}{% for m in messages %}\
{% if m['role'] == 'system' and no_system %}\
{{ raise_exception('no system') }}{% endif %}\
[{{ m['role'] }}] {{ m['content'] }}{{ eos_token }}
{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"""
TRIMS = CHAT.replace("m['content']", "m['content'] | trim")
REFUSES = "{% set no_system = true %}" + CHAT

CHOICES = """task: pets
dataset_path: json
dataset_kwargs:
  data_files: {test: FOLDER/rows.jsonl, train: FOLDER/shots.jsonl}
test_split: test
fewshot_split: train
output_type: multiple_choice
description: "Choose an answer. "
doc_to_text: "Q: {{question}}\\nA:"
doc_to_target: answer
doc_to_choice: choices
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
ANSWERS = """task: tales
dataset_path: json
dataset_kwargs:
  data_files: {test: FOLDER/rows.jsonl, train: FOLDER/shots.jsonl}
test_split: test
fewshot_split: train
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
gen_prefix: "Once upon a time "
generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 24}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
ROWS = [
  ("What says meow?", ["a cat", "a dog", "the sun"], 0),
  ("Who runs in the park?", ["a tree", "the dog", "a hat"], 1),
  ("What did Lily see?", ["the moon.", "a big red ball", "it"], 1),
  ("Who is sad?", ["Tom", "a stone", "the sky"], 0),
]


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
  """Two tasks as YAML, with examples to show."""
  folder = tmp_path_factory.mktemp("questions")
  rows = [
    json.dumps({"question": q, "choices": c, "answer": a}) + "\n"
    for q, c, a in ROWS
  ]
  (folder / "rows.jsonl").write_text("".join(rows))
  (folder / "shots.jsonl").write_text("".join(rows[::-1]))
  for name, text in (("pets", CHOICES), ("tales", ANSWERS)):
    (folder / f"{name}.yaml").write_text(text.replace("FOLDER", str(folder)))
  return str(folder)


def copy(shared_data, folder, template="", **generation):
  """stories260K with a chat template, or other end tokens."""
  source = shared_data / "models" / "stories260K"
  shutil.copytree(source, folder, dirs_exist_ok=True)
  if template:
    (folder / "chat_template.jinja").write_text(template)
  if generation:
    path = folder / "generation_config.json"
    path.write_text(json.dumps(generation))
  return folder


def ours(folder, batch=4):
  config, params = load.load(folder, "float32")
  return lm_eval_run.open_lm(config, params, load_tokenizer(folder), batch)


def theirs(folder, batch=1):
  torch = pytest.importorskip("torch")
  torch.set_num_threads(1)
  from lm_eval.models.huggingface import HFLM

  return HFLM(
    pretrained=str(folder), device="cpu", dtype="float32", batch_size=batch
  )


@pytest.fixture(scope="module")
def models(shared_data, tmp_path_factory):
  """A pair of models for each chat template."""
  found = {}
  for name, template in (
    ("plain", CHAT),
    ("trims", TRIMS),
    ("refuses", REFUSES),
  ):
    folder = copy(shared_data, tmp_path_factory.mktemp(name), template)
    found[name] = ours(folder), theirs(folder)
  return found


def test_what_stands_before_a_text_is_the_tokenizers(shared_data, tmp_path):
  """Of Qwen's it is its end: only config.json names a beginning."""
  folder = copy(shared_data, tmp_path, "")
  path = folder / "tokenizer_config.json"
  settings = json.loads(path.read_text()) | {"bos_token": None}
  path.write_text(json.dumps(settings))
  lm, peer = ours(folder), theirs(folder)
  assert lm.model_config.bos_id != lm.eot_token_id
  assert lm.prefix_token_id == peer.prefix_token_id == lm.eot_token_id


WAYS = {
  "examples": {"num_fewshot": 2, "system_instruction": "Be brief. "},
  "chat": {"apply_chat_template": True},
  "chat with examples": {
    "num_fewshot": 2,
    "apply_chat_template": True,
    "system_instruction": "Be brief.",
  },
  "one turn": {
    "num_fewshot": 2,
    "apply_chat_template": True,
    "fewshot_as_multiturn": False,
  },
}


def by_lm_eval(model, folder, asked):
  """What `lm_eval run` does with these flags."""
  return lm_eval.simple_evaluate(
    model,
    tasks=["pets", "tales"],
    task_manager=lm_eval.tasks.TaskManager(
      include_path=folder, include_defaults=False
    ),
    num_fewshot=asked.num_fewshot,
    apply_chat_template=asked.apply_chat_template,
    system_instruction=asked.system_instruction or None,
    fewshot_as_multiturn=asked.multiturn,
    bootstrap_iters=0,
  )


@pytest.mark.parametrize(
  "name, way",
  [
    *(("plain", way) for way in WAYS),
    ("trims", "chat with examples"),
    ("refuses", "chat with examples"),
  ],
)
def test_equals_lm_eval_with_its_hf_model(models, questions, name, way):
  """Prompts, log-likelihoods, texts and metrics, question by question."""
  lm, peer = models[name]
  asked = Questions(questions, **WAYS[way])
  raw = lm_eval_run.run({"pets": None, "tales": None}, lm, asked)
  expected = by_lm_eval(peer, questions, asked)
  assert raw["samples"].keys() == {"pets", "tales"}
  for task, samples in raw["samples"].items():
    for a, b in zip(samples, expected["samples"][task], strict=True):
      assert a["arguments"] == b["arguments"]
    values = {
      k: v for k, v in raw["results"][task].items() if "stderr" not in k
    }
    others = expected["results"][task]
    assert values == {k: others[k] for k in values}
    assert raw["n-shot"][task] == expected["n-shot"][task]
  answers = [raw["samples"]["pets"], expected["samples"]["pets"]]
  for a, b in zip(*answers, strict=True):
    for (total, greedy), (other, same) in zip(
      a["filtered_resps"], b["filtered_resps"], strict=True
    ):
      assert total == pytest.approx(other, abs=1e-3)
      assert greedy == same
  tales = [
    [s["filtered_resps"] for s in r["samples"]["tales"]]
    for r in (raw, expected)
  ]
  assert tales[0] == tales[1]
  prompt = raw["samples"]["tales"][0]["arguments"][0][0]
  assert prompt.rstrip().endswith("Once upon a time")
  if asked.apply_chat_template:
    assert prompt.startswith("<s>[")
    assert "[assistant] Once" in prompt
  if name == "refuses":
    assert "Be brief" not in prompt
  elif asked.system_instruction:
    assert "Be brief" in prompt


def test_how_questions_were_put_is_in_the_result(models, questions):
  lm, _ = models["plain"]
  asked = Questions(questions, num_fewshot=1, apply_chat_template=True, limit=2)
  found = lm_eval_run.evaluate_tasks(lm, ["pets"], asked)
  assert found["tasks"]["pets"]["num_fewshot"] == 1
  template = hashlib.sha256(CHAT.encode()).hexdigest()
  assert found["prompts"].pop("chat_template") == template
  assert found["prompts"] == {
    "apply_chat_template": True,
    "system_instruction": "",
    "fewshot_as_multiturn": True,
  }


def test_a_model_without_a_chat_template(shared_data, questions):
  path = str(shared_data / "models" / "stories260K")
  with pytest.raises(UserError, match=r"--apply_chat_template: .*stories260K"):
    evaluate.evaluate(
      path, ["pets"], tasks_dir=questions, apply_chat_template=True
    )


@pytest.mark.parametrize(
  "asked, message",
  [
    ({"num_fewshot": -1}, "--num_fewshot=-1 must be"),
    ({"fewshot_as_multiturn": True}, "needs --apply_chat_template"),
    ({"limit": -1}, "--limit=-1"),
  ],
)
def test_bad_questions(questions, asked, message):
  with pytest.raises(UserError, match=message):
    evaluate.evaluate("nowhere", ["pets"], tasks_dir=questions, **asked)


def test_examples_without_a_task():
  with pytest.raises(UserError, match="--num_fewshot is about tasks"):
    evaluate.evaluate("m", ["perplexity"], text="t.txt", num_fewshot=3)


# ---- Ends --------------------------------------------------------------------


def asked(kind, *arguments):
  return [
    Instance(kind, {}, args, i, ("asked", i, 1))
    for i, args in enumerate(arguments)
  ]


def test_generation_ends_as_the_hf_model(shared_data, tmp_path):
  """At what generation_config.json lists; config.json says 2."""
  folder = copy(shared_data, tmp_path, eos_token_id=[410, 270])
  settings = {"until": [], "max_gen_toks": 40}
  prompts = [("Once upon a time", settings), ("The dog", settings)]
  found = ours(folder).generate_until(asked("generate_until", *prompts))
  expected = theirs(folder).generate_until(
    asked("generate_until", *prompts), disable_tqdm=True
  )
  assert found == expected
  assert len(load_tokenizer(folder).encode_plain(found[0])) < 25


def test_stop_strings_that_are_special_tokens(shared_data, tmp_path):
  """They are not in the text; the HF model stops at them all the same."""
  copy(shared_data, tmp_path)
  path = tmp_path / "tokenizer.json"
  values = json.loads(path.read_text())
  (word,) = (t for t, i in values["model"]["vocab"].items() if i == 421)
  values["added_tokens"].append(
    values["added_tokens"][0] | {"id": 421, "content": word, "special": True}
  )
  path.write_text(json.dumps(values))
  settings = {"until": [word], "max_gen_toks": 40}
  requests = asked("generate_until", ("Once upon a time", settings))
  (found,) = ours(tmp_path).generate_until(requests)
  (expected,) = theirs(tmp_path).generate_until(requests, disable_tqdm=True)
  assert found == expected
  assert len(found) < 30


# ---- Nothing to predict ------------------------------------------------------


def test_an_empty_continuation_is_certain(models):
  """Alone and among others, whose scores it leaves alone."""
  lm, _ = models["plain"]
  certain = (0.0, True)
  assert lm.score([([1, 2, 3], [])]) == [certain]
  assert lm.score([]) == []
  pairs = [([1, 2, 3], [4, 5]), ([1, 2, 3], []), ([1, 9], [7])]
  found = lm.score(pairs)
  assert found[1] == certain
  others = lm.score([pairs[0], pairs[2]])
  assert found[0] == pytest.approx(others[0], abs=1e-5)
  assert found[2] == pytest.approx(others[1], abs=1e-5)
  texts = [("Once upon", ""), ("", ""), ("Once upon", " a time")]
  found = lm.loglikelihood(asked("loglikelihood", *texts))
  assert found[:2] == [certain, certain]
  assert found[2][0] < 0


def test_a_context_of_blanks_is_an_empty_one(models):
  """Blanks go over to the continuation. Without a begin token nothing is left
  in front of it, and the token behind nothing was predicted by the padding."""
  lm, _ = models["plain"]

  class Bare:
    """A tokenizer that adds no begin token."""

    bos_id, bos_token, eos_id, special_tokens = 1, None, 2, ()
    encode = staticmethod(lambda text: lm.words.encode_plain(text))
    encode_plain = encode

  bare = lm_eval_model.JaxLM(lm.model_config, lm.params, Bare())
  ((total, _),) = bare.loglikelihood(asked("loglikelihood", ("  ", "dog")))
  ids = lm.words.encode_plain("  dog")
  assert total == pytest.approx(lm.score([([1], ids)])[0][0], abs=1e-4)
