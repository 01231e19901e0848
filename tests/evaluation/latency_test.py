import dataclasses

import jax
import numpy as np
import pytest

from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.evaluation import latency
from adapt_pruner_jax.models import decoder
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.models.rope import Rope

CONFIG = ModelConfig(
  family="llama",
  vocab_size=48,
  hidden_size=16,
  queries_per_group=2,
  head_dim=8,
  kv_groups=(2, 0),
  ffn_widths=(20, 13),
  norm_eps=1e-5,
  rope=Rope(),
  context=64,
  tied=True,
  eos_ids=tuple(range(48)),  # which must not end the measurement
)


@pytest.fixture(scope="module")
def measured():
  params = decoder.init_params(CONFIG, jax.random.key(0))
  return latency.measure(CONFIG, params, 3, 20, 10, repeats=2)


def test_measure(measured):
  assert measured["device"] == "1 x cpu"
  assert measured["dtype"] == "float32"
  token_s = measured["decode_ms_per_token"] / 1e3
  prefill_s = measured["prefill_ms"] / 1e3
  assert token_s > 0
  assert measured["decode_tokens_per_second"] == pytest.approx(3 / token_s)
  assert measured["prefill_tokens_per_second"] == pytest.approx(60 / prefill_s)


def test_compare(measured):
  slow = measured | {
    "prefill_ms": 3 * measured["prefill_ms"],
    "decode_ms_per_token": 1.5 * measured["decode_ms_per_token"],
  }
  found = latency.compare(before=slow, after=measured)
  assert found["prefill_speedup"] == pytest.approx(3)
  assert found["decode_speedup"] == pytest.approx(1.5)
  assert "prefill 3.00x" in found["text"]
  assert "decode 1.50x" in found["text"]
  with pytest.raises(UserError, match=r"batch=3 and 1 do not compare"):
    latency.compare(measured, measured | {"batch": 1})


@pytest.mark.parametrize(
  "times, expected",
  [
    # ms at widths 101 (as it is), 104, 96 and 128: what a channel costs decides
    ({101: 2.0, 104: 2.0, 96: 1.9, 128: 1.0}, 128),
    ({101: 2.0, 104: 1.2, 96: 1.9, 128: 2.5}, 8),
    ({101: 1.01, 104: 1.04, 96: 0.96, 128: 1.28}, 1),
  ],
)
def test_advice_follows_the_times(monkeypatch, times, expected):
  config = dataclasses.replace(
    CONFIG, kv_groups=(1, 1, 1), ffn_widths=(0, 101, 90)
  )
  monkeypatch.setattr(
    latency, "_mlp_ms", lambda config, width, *_: times[width]
  )
  found = latency.ffn_advice(config)
  assert found["width"] == 101
  assert found["widths"] == {"1": 101, "8": 104, "32": 96, "128": 128}
  assert found["round_ffn_to"] == expected
  said = f"round_ffn_to={expected} would pay" if expected > 1 else "not pay"
  assert said in found["text"]


def test_advice_measures():
  found = latency.ffn_advice(CONFIG, tokens=4, repeats=1)
  assert found["width"] == 20
  assert all(ms > 0 for ms in found["ms"].values())
  assert "\n" not in found["text"]


@pytest.mark.parametrize(
  "sizes, message",
  [
    ((0, 8, 8), "batch=0"),
    ((1, 40, 30), "longer than the model's context of 64"),
  ],
)
def test_bad_sizes(sizes, message):
  with pytest.raises(UserError, match=message):
    latency.measure(CONFIG, {"embedding": np.zeros(1)}, *sizes)
