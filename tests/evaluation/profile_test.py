"""Latency tables of a small model; what they say is not asserted."""

import dataclasses

import pytest

from adapt_pruner_jax import cli
from adapt_pruner_jax.config import latency_table
from adapt_pruner_jax.evaluation import profile
from tests import small, small_runs


@pytest.mark.slow
@pytest.mark.parametrize("engine", profile.ENGINES)
def test_a_table_of_this_device(engine, tmp_path, capsys):
  """By the command; a second phase is added to the same file."""
  model = small_runs.make_model(tmp_path)
  capsys.readouterr()
  file = tmp_path / "table.json"
  for phase in ("decode", "prefill"):
    with pytest.raises(SystemExit) as ended:
      cli.main(
        [
          *("profile", f"--model={model}", f"--out={file}", "--context=16"),
          *(f"--engine={engine}", f"--phase={phase}", "--repeats=1"),
        ]
      )
    assert not ended.value.code
  table = latency_table.read(str(file))  # checked as it is read
  assert [m["phase"] for m in table["measured"]] == ["decode", "prefill"]
  assert table["device"] == profile.device_name(engine)
  for measured in table["measured"]:
    assert [w for w, _ in measured["attention_ms"]] == [0, 1, 2, 3, 4]
    assert [w for w, _ in measured["mlp_ms"]] == [0, 12, 24, 36, 48]
  with pytest.raises(SystemExit) as ended:
    cli.main(
      [
        "profile",
        f"--model={model}",
        f"--out={file}",
        "--dtype=bfloat16",
        "--context=16",
        "--repeats=1",
        f"--engine={engine}",
      ]
    )
  assert ended.value.code
  assert "whose dtype is float32" in capsys.readouterr().err


@pytest.mark.slow
def test_the_table_adds_up_to_the_model_that_was_timed(monkeypatch):
  """With a clock that adds: what halves take by their widths, and the rest."""
  config = dataclasses.replace(small.CONFIG, window=())
  ms = lambda c: (
    0.46
    + 0.001 * c.vocab_size
    + sum(
      (k > 0) * 0.1 + 0.2 * k + 0.01 * f
      for k, f in zip(c.kv_groups, c.ffn_widths, strict=True)
    )
  )
  monkeypatch.setattr(profile, "_random", lambda config, _: (config, None))
  monkeypatch.setattr(
    profile, "timer", lambda engine, model, case: lambda: ms(model[0])
  )
  table = profile.profile(config, profile.Case("decode", 1, 16))
  (measured,) = table["measured"]
  assert measured["rest_ms"] == pytest.approx(0.5)
  assert measured["output_ms"] == [[0, 0], [40, pytest.approx(0.04)]]
  wide = {0: 0, 1: 0.3, 2: 0.5, 3: 0.7, 4: 0.9}
  assert dict(measured["attention_ms"]) == pytest.approx(wide)
  assert dict(measured["mlp_ms"]) == pytest.approx(
    {0: 0, 10: 0.1, 20: 0.2, 30: 0.3, 40: 0.4}
  )


@pytest.mark.parametrize(
  ("flags", "said"),
  [
    (["--engine=vllm"], "a table of another is written by hand"),
    (["--phase=both"], "not one of decode, prefill"),
    (["--context=100000"], "2 to the model's"),
    (["--repeats=0"], "must be at least 1"),
    (["--dtype=int3"], "int3"),
  ],
)
def test_bad_input(flags, said, tmp_path, capsys):
  model = tmp_path / "model"
  model.mkdir()
  source = small_runs.ROOT / "tests" / "golden" / "uneven_0.1" / "config.json"
  (model / "config.json").write_bytes(source.read_bytes())
  out = tmp_path / "table.json"
  with pytest.raises(SystemExit) as ended:
    cli.main(["profile", f"--model={model}", f"--out={out}", *flags])
  assert ended.value.code
  assert said in capsys.readouterr().err
  assert not out.exists()
