"""Truth: lm-eval's own HF model, in torch, on the same weights."""

import json
import pathlib
import subprocess
import sys
import types

import jax
import numpy as np
import pytest

pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance

from adapt_pruner_jax.data.tokenizer import load_tokenizer
from adapt_pruner_jax.distributed import sharding
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.evaluation import (
  evaluate,
  generate,
  lm_eval_model,
  lm_eval_run,
  scoring_rows,
)
from adapt_pruner_jax.evaluation.questions import Questions
from adapt_pruner_jax.formats.hf import load
from adapt_pruner_jax.models import axes, decoder, model_config
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.models.rope import Rope

# Windows, two ropes, a softcap, a layer without heads.
ODD = ModelConfig(
  family="gemma2",
  vocab_size=48,
  hidden_size=16,
  queries_per_group=2,
  head_dim=8,
  kv_groups=(2, 0, 1),
  ffn_widths=(12, 9, 7),
  norm_eps=1e-5,
  rope=Rope(),
  local_rope=Rope(theta=100.0),
  window=(3, 3, 0),
  context=64,
  tied=True,
  attn_softcap=5.0,
  final_softcap=9.0,
)
CHOICE_TASKS = ["arc_easy", "hellaswag", "piqa", "winogrande"]
WANTED = {
  **dict.fromkeys([*CHOICE_TASKS, "arc_challenge", "openbookqa", "boolq"]),
  "mmlu_anatomy": 5,  # longer than the context: cut from the left
}


@pytest.fixture(scope="module")
def stories(shared_data):
  path = shared_data / "models" / "stories260K"
  config, params = load.load(path, "float32")
  return path, config, params, load_tokenizer(path)


@pytest.fixture(scope="module")
def ours(stories):
  _, config, params, tokenizer = stories
  return lm_eval_model.JaxLM(config, params, tokenizer, batch=8)


@pytest.fixture(scope="module")
def theirs(stories):
  torch = pytest.importorskip("torch")
  torch.set_num_threads(1)
  from lm_eval.models.huggingface import HFLM

  class Cut(HFLM):
    """Scores the end of an answer longer than the context; HFLM stops there,
    with an assertion. The rest of the cutting is its own."""

    def _loglikelihood_tokens(self, requests, **rest):
      longest = self.max_length
      cut = [(t, c + s[:-longest], s[-longest:]) for t, c, s in requests]
      return super()._loglikelihood_tokens(cut, **rest)

  return Cut(
    pretrained=str(stories[0]), device="cpu", dtype="float32", batch_size=8
  )


@pytest.fixture(scope="module")
def questions(shared_data):
  return str(shared_data / "eval")


def check_same(mine, other):
  """Every log-likelihood and every metric of two raw results."""
  assert mine["samples"].keys() == other["samples"].keys()
  for name, samples in mine["samples"].items():
    for a, b in zip(samples, other["samples"][name], strict=True):
      assert a["arguments"] == b["arguments"]
      for x, y in zip(a["filtered_resps"], b["filtered_resps"], strict=True):
        assert x[0] == pytest.approx(y[0], abs=1e-3)
        assert x[1] == y[1]
    assert mine["results"][name] == other["results"][name]


def test_equals_the_hf_model(ours, theirs, questions):
  asked = Questions(questions, limit=6)
  found = lm_eval_run.run(WANTED, ours, asked)
  check_same(found, lm_eval_run.run(WANTED, theirs, asked))
  assert found["n-shot"]["mmlu_anatomy"] == 5


@pytest.mark.slow
def test_equals_the_hf_model_on_all_questions(ours, theirs, questions):
  asked = Questions(questions)
  wanted, missing = lm_eval_run.expand(["commonsense"], asked)
  assert missing == {"commonsense": ["social_iqa"]}
  found = lm_eval_run.run(wanted, ours, asked)
  check_same(found, lm_eval_run.run(wanted, theirs, asked))
  scores = lm_eval_run.summary(found, ["commonsense"], missing)
  assert scores["tasks"]["openbookqa"]["n"] == 500


LONG = 74  # PIQA's question whose answers have 618 and 624 tokens


def test_answers_longer_than_the_context(
  stories, ours, theirs, questions, tmp_path, caplog
):
  """Their ends equal the HF model's, and the task is named and counted."""
  lines = (pathlib.Path(questions) / "piqa.jsonl").read_text().splitlines()
  some = "\n".join(lines[LONG - 1 : LONG + 2])
  (tmp_path / "piqa.jsonl").write_text(some)
  asked = Questions(str(tmp_path))
  found = lm_eval_run.run({"piqa": None}, ours, asked)
  check_same(found, lm_eval_run.run({"piqa": None}, theirs, asked))
  lm = lm_eval_run.open_lm(*stories[1:])
  found = lm_eval_run.evaluate_tasks(lm, ["piqa"], asked)
  assert (found["tasks"]["piqa"]["n"], found["tasks"]["piqa"]["truncated"]) == (
    3,
    2,
  )
  assert "task piqa: 2 of 6 requests" in caplog.text
  asked = Questions(questions, limit=2)
  found = lm_eval_run.evaluate_tasks(ours, ["arc_easy"], asked)
  assert found["tasks"]["arc_easy"]["truncated"] == 0


def requests(kind, arguments):
  return [
    Instance(kind, {}, args, i, ("asked", i, 1))
    for i, args in enumerate(arguments)
  ]


def test_rolling_equals_the_hf_model(ours, theirs, shared_data):
  """A text of several windows, a short one, and a middling one."""
  text = (shared_data / "text" / "tinystories_heldout.txt").read_text()
  asked = [(text[:4000],), ("One day",), (text[5000:5700],)]
  found = ours.loglikelihood_rolling(requests("loglikelihood_rolling", asked))
  expected = theirs.loglikelihood_rolling(
    requests("loglikelihood_rolling", asked), disable_tqdm=True
  )
  assert found == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize(
  "pair", [("", "Once upon a time"), ("Once ", "upon a time")]
)
def test_edges_of_a_context_equal_the_hf_model(ours, theirs, pair):
  """One at a time: of pairs that share all tokens but the split, the HF model
  of lm-eval 0.4.13 gives the shorter answer another's log-likelihood."""
  ((total, greedy),) = ours.loglikelihood(requests("loglikelihood", [pair]))
  ((expected, same),) = theirs.loglikelihood(
    requests("loglikelihood", [pair]), disable_tqdm=True
  )
  assert total == pytest.approx(expected, abs=1e-3)
  assert greedy == same


def test_generation_equals_the_hf_model(ours, theirs):
  settings = {"until": [".", "\n"], "max_gen_toks": 40}
  asked = [
    ("Once upon a time", settings),
    ("The dog", {"until": ["zzz"], "max_gen_toks": 20}),
    ("The cat", {"until": "zzz", "max_new_tokens": 9}),  # as some tasks say it
    ("Tom was", {"max_tokens": 7, "do_sample": False, "temperature": 0.7}),
    ("Lily and Tom " * 100 + "went to", settings),  # cut from the left
  ]
  found = ours.generate_until(requests("generate_until", asked))
  expected = theirs.generate_until(
    requests("generate_until", asked), disable_tqdm=True
  )
  assert found == expected
  assert found[0].startswith(", there was a little girl named Lily")


@pytest.fixture(scope="module")
def odd_params():
  rng = np.random.default_rng(0)
  return axes.map_named(
    lambda name, _, leaf: np.float32(
      name.endswith("norm") + 0.3 * rng.normal(size=leaf.shape)
    ),
    model_config.abstract_params(ODD, np.float32),
  )


class Letters:
  """A tokenizer that is never asked."""

  bos_id = eos_id = bos_token = None
  encode = staticmethod(list)


def test_without_an_end_token_none_ends_an_answer(odd_params):
  """Not token 0, which stands for one where a prefix is needed."""
  words = Letters()
  words.backend = types.SimpleNamespace(get_added_tokens_decoder=dict)
  lm = lm_eval_model.JaxLM(ODD, odd_params, words)
  assert lm.eos_ids == ()
  assert lm._end_tokens([]) == ()
  words.eos_id = 3
  assert lm._end_tokens([]) == (3,)


PAIRS = [
  ([1, 2, 3, 4, 5], [6, 7, 8]),
  ([1, 2, 3, 4, 5], [9]),
  ([1, 2, 3, 4, 5], [6, 7, 1, 2, 40]),
  ([7], [8, 9]),
  ([3] * 70, [2, 4]),  # cut to the last 63
  ([5, 6], [7, 8] * 33),  # 66 tokens, of which the last 64 are scored
]


@jax.jit
def forward(params, row):
  logits, _ = decoder.Decoder(ODD).apply({"params": params}, row)
  return jax.nn.log_softmax(logits[0])


def alone(params, prefix, said):
  """One pair by the plain forward, padded on the right."""
  tokens_T = (prefix + said)[-ODD.context - 1 :][:-1]
  row = np.zeros((1, ODD.context), np.int32)
  row[0, : len(tokens_T)] = tokens_T
  said = said[-ODD.context :]
  log_probs = np.asarray(forward(params, row))[: len(tokens_T)][-len(said) :]
  total = sum(log_probs[i, token] for i, token in enumerate(said))
  return total, log_probs.argmax(-1).tolist() == said


def test_branches_do_not_see_each_other(odd_params):
  scorer = lm_eval_model.JaxLM(ODD, odd_params, Letters(), batch=2)
  found = scorer.score(PAIRS)
  for pair, (total, greedy) in zip(PAIRS, found, strict=True):
    expected = alone(odd_params, *pair)
    assert total == pytest.approx(expected[0], rel=1e-5)
    assert greedy == expected[1]


def test_greedy_is_told(odd_params):
  new = generate.generate(ODD, odd_params, [[1, 2, 3]], 4)[0]
  scorer = lm_eval_model.JaxLM(ODD, odd_params, Letters(), batch=2)
  other = [(new[0] + 1) % ODD.vocab_size, *new[1:]]
  found = scorer.score([([1, 2, 3], new), ([1, 2, 3], other)])
  assert [greedy for _, greedy in found] == [True, False]


def test_mesh_and_batch_do_not_matter(odd_params):
  expected = lm_eval_model.JaxLM(ODD, odd_params, Letters(), batch=2).score(
    PAIRS
  )
  mesh = sharding.make_mesh(2, 2, 2)
  placed = jax.device_put(
    odd_params, sharding.param_shardings(odd_params, mesh)
  )
  scorer = lm_eval_model.JaxLM(ODD, placed, Letters(), batch=3, mesh=mesh)
  assert scorer.batch == 4
  for a, b in zip(scorer.score(PAIRS), expected, strict=True):
    assert a[0] == pytest.approx(b[0], rel=1e-5)
    assert a[1] == b[1]


def test_rows_share_a_context():
  rows = scoring_rows.make_rows(PAIRS, ODD.context)
  lengths = [5 + 2 + 0 + 4, 2, 63 + 1, 64]
  assert [len(row.tokens) for row in rows] == lengths
  assert rows[0].positions == [0, 1, 2, 3, 4, 5, 6, 5, 6, 7, 8]
  assert rows[0].branches == [0] * 5 + [1] * 2 + [2] * 4
  # The first token of each choice is predicted by the end of the context.
  assert [q for q in rows[0].queries if q[0] == 4] == [
    (4, 6, 0),
    (4, 9, 1),
    (4, 6, 2),
  ]


def test_rows_of_their_own():
  """Of models with memories, which cannot go on in several ways at once."""
  shared = scoring_rows.make_rows(PAIRS, ODD.context)
  alone = scoring_rows.make_rows(PAIRS, ODD.context, shared=False)
  assert len(alone) == len({q[2] for row in shared for q in row.queries})
  assert max(map(max, (row.branches for row in alone))) <= 1


def test_short_groups_join_longer_ones():
  rows = [scoring_rows.Row([0] * n, [], [], []) for n in (5, 40, 41, 90, 100)]
  found = scoring_rows.by_length(rows, 2)
  assert [(T, [len(r.tokens) for r in some]) for T, some in found] == [
    (48, [5, 40, 41]),
    (128, [90, 100]),
  ]


def test_token_outside_the_vocabulary(odd_params):
  scorer = lm_eval_model.JaxLM(ODD, odd_params, Letters())
  with pytest.raises(UserError, match="token id 48 is outside the model's"):
    scorer.score([([1], [48])])


@pytest.mark.slow
def test_evaluate_dispatches(stories, questions, tmp_path):
  """A preset, a task, perplexity and latency, against the same model."""
  path = str(stories[0])
  (tmp_path / "text.txt").write_text("One day, Lily saw a big dog. " * 20)
  found = evaluate.evaluate(
    path,
    ["commonsense", "perplexity", "latency"],
    text=str(tmp_path / "text.txt"),
    tasks_dir=questions,
    baseline=path,
    limit=4,
    mesh=sharding.make_mesh(devices=jax.devices()[:1]),
  )
  json.dumps(found)
  assert found["params"] == 260_032
  assert found["lm_eval"] == "0.4.13"
  preset = found["presets"]["commonsense"]
  assert preset["missing"] == ["social_iqa"]
  assert len(preset["tasks"]) == 6
  assert preset["mean"] == pytest.approx(
    np.mean(list(preset["tasks"].values()))
  )
  entry = found["tasks"]["arc_easy"]
  assert entry["n"] == 4
  assert len(entry["prompt_hash"]) == 64
  assert {"acc", "acc_norm", "acc_norm_stderr", "source"} <= entry.keys()
  zero = {"difference": 0.0, "low": 0.0, "high": 0.0}
  assert found["difference"]["presets"]["commonsense"] == zero
  assert found["difference"]["tasks"]["piqa"]["acc"] == zero
  assert found["baseline"]["tasks"]["arc_easy"] == entry
  assert found["perplexity"] == found["baseline"]["perplexity"]
  assert found["words"] == 140
  assert found["speedup"]["decode_speedup"] > 0


def test_interval_of_the_difference():
  """Against the normal approximation, 1.96 standard errors."""
  rng = np.random.default_rng(1)
  mine, other = (rng.random((2, 4000)) < [[0.6], [0.5]]).astype(float)

  def raw(values):
    samples = [
      {"doc_id": i, "metrics": ["acc"], "acc": v} for i, v in enumerate(values)
    ]
    return {"samples": {"winogrande": samples}, "group_subtasks": {}}

  found = lm_eval_run.differences(raw(mine), raw(other), ["commonsense"])
  gains = mine - other
  error = 1.96 * gains.std() / np.sqrt(len(gains))
  for entry in (
    found["tasks"]["winogrande"]["acc"],
    found["presets"]["commonsense"],
  ):
    assert entry["difference"] == pytest.approx(gains.mean())
    assert entry["low"] == pytest.approx(gains.mean() - error, abs=1e-3)
    assert entry["high"] == pytest.approx(gains.mean() + error, abs=1e-3)


def test_difference_of_a_task_whose_answers_are_found_in_two_ways():
  ways = ("strict-match", 0.0), ("flexible-extract", 1.0)
  samples = [
    {"doc_id": i, "filter": way, "metrics": ["exact_match"], "exact_match": v}
    for way, v in ways
    for i in range(10)
  ]
  raw = {"samples": {"gsm8k": samples}, "group_subtasks": {}}
  found = lm_eval_run.differences(raw, raw, [])["tasks"]["gsm8k"]
  zero = {"difference": 0.0, "low": 0.0, "high": 0.0}
  assert found == {f"exact_match_{way}": zero for way, _ in ways}


HIDE_TORCH = """
import sys
from importlib.machinery import PathFinder

class Without:
  find_distributions = PathFinder.find_distributions
  invalidate_caches = PathFinder.invalidate_caches

  @classmethod
  def find_spec(cls, name, path=None, target=None):
    if name.split(".")[0] not in ("torch", "accelerate", "peft"):
      return PathFinder.find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Without
from adapt_pruner_jax.evaluation import evaluate
found = evaluate.evaluate(
  sys.argv[1], ["arc_easy"], tasks_dir=sys.argv[2], limit=2
)
assert "torch" not in sys.modules
print(found["tasks"]["arc_easy"]["n"])
"""


def test_without_torch(stories, questions, subprocess_env):
  done = subprocess.run(
    [sys.executable, "-c", HIDE_TORCH, str(stories[0]), questions],
    env=subprocess_env(1),
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr[-2000:]
  assert done.stdout.split()[-1] == "2"
