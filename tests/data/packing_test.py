"""Packed rows, their order, and held-out tokens."""

import dataclasses
from itertools import pairwise

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapt_pruner_jax.config import Data
from adapt_pruner_jax.data import order, packing, sources, token_store
from adapt_pruner_jax.models import decoder, model_config
from adapt_pruner_jax.models.rope import Rope
from tests.data.words import BOS, CHAT, END, EOS, WORDS, V, error, ids_of, write


def stream_of(documents, trained=None):
  lengths = np.array([len(d) for d in documents])
  return token_store.Stream(
    tokens=np.concatenate(documents).astype(np.int32),
    starts=np.cumsum(lengths) - lengths,
    trained=trained,
    fingerprint="",
  )


def test_packing_by_hand():
  rows = packing.PackedRows(stream_of([[10, 11, 12], [20, 21, 22, 23, 24]]), 4)
  expected = [
    {
      "tokens_BT": [10, 11, 12, 20],
      "targets_BT": [11, 12, 20, 21],
      "segments_BT": [1, 1, 1, 2],
      "positions_BT": [0, 1, 2, 0],
      "weights_BT": [1, 1, 0, 1],
    },
    {
      "tokens_BT": [21, 22, 23, 0],
      "targets_BT": [22, 23, 24, 0],
      "segments_BT": [1, 1, 1, 0],
      "positions_BT": [0, 1, 2, 0],
      "weights_BT": [1, 1, 1, 0],
    },
  ]
  assert len(rows) == 2
  for row, want in zip(rows, expected, strict=False):
    assert {name: column.tolist() for name, column in row.items()} == want


def test_packing_by_hand_with_a_begin_token():
  """9 begins documents, and rows that go on with one."""
  documents = [[9, 11, 12, 13], [9, 21, 22, 23, 24, 25]]
  rows = packing.PackedRows(stream_of(documents), 3, begin_id=9)
  columns = ("tokens_BT", "targets_BT", "segments_BT", "weights_BT")
  found = [[rows[i][name].tolist() for name in columns] for i in range(4)]
  assert found == [
    # Its last target, 13, is what the next row begins to say.
    [[9, 11, 12], [11, 12, 13], [1, 1, 1], [1, 1, 0]],
    [[9, 13, 9], [13, 9, 21], [1, 1, 2], [1, 0, 1]],
    [[9, 22, 23], [22, 23, 24], [1, 1, 1], [1, 1, 1]],
    [[9, 0, 0], [25, 0, 0], [1, 0, 0], [1, 0, 0]],
  ]
  assert len(rows) == 4
  assert rows[1]["positions_BT"].tolist() == [0, 1, 0]
  assert rows[2]["positions_BT"].tolist() == [0, 1, 2]


@settings(max_examples=150, deadline=None)
@given(
  st.lists(st.integers(1, 12), min_size=1, max_size=20),
  st.integers(2, 9),
  st.integers(0, 2**32 - 1),
)
def test_packing_properties_with_a_begin_token(lengths, T, seed):
  """Every other token is learnt exactly once, from those before it in its row
  and document."""
  # Every token is a number of its own, a thousand a document, but the first.
  documents = [
    np.append(0, 1000 * d + np.arange(n)) for d, n in enumerate(lengths, 1)
  ]
  stream = stream_of(documents)
  trained = np.random.default_rng(seed).random(len(stream.tokens)) < 0.5
  packed = packing.PackedRows(stream, T, begin_id=0)
  rows = [packed[i] for i in range(len(packed))]
  flat = {n: np.concatenate([r[n] for r in rows]) for n in rows[0]}
  learnt = flat["targets_BT"][flat["weights_BT"] > 0]
  np.testing.assert_array_equal(learnt, stream.tokens[stream.tokens > 0])
  for row in rows:
    assert row["tokens_BT"].shape == (T,)
    inside = row["segments_BT"] > 0
    tokens, segments = row["tokens_BT"][inside], row["segments_BT"][inside]
    targets = row["targets_BT"][inside]
    starts = np.append(1, np.diff(segments)) > 0
    # Each document of a row starts with the begin token, and has no other.
    np.testing.assert_array_equal(tokens == 0, starts)
    counts = row["weights_BT"][inside] > 0
    follows = counts & ~starts
    np.testing.assert_array_equal(tokens[follows] + 1, targets[follows])
    for s in np.unique(segments):
      at = row["positions_BT"][inside][segments == s]
      np.testing.assert_array_equal(at, np.arange(len(at)))
      inner = tokens[(segments == s) & (tokens > 0)]
      assert len(np.unique(inner // 1000)) <= 1
  # What is not trained loses its weight and nothing else.
  masked = packing.PackedRows(
    dataclasses.replace(stream, trained=trained), T, begin_id=0
  )
  flat = [masked[i] for i in range(len(masked))]
  learnt = np.concatenate([r["targets_BT"][r["weights_BT"] > 0] for r in flat])
  np.testing.assert_array_equal(
    learnt, stream.tokens[trained & (stream.tokens > 0)]
  )


def test_packing_learns_what_the_assistant_says():
  said = np.array([0, 1, 1, 0, 1, 1], bool)
  rows = packing.PackedRows(stream_of([[1, 2, 3], [4, 5, 6]], said), 5)
  assert rows[0]["weights_BT"].tolist() == [1, 1, 0, 1, 1]
  none = np.zeros(6, bool)
  rows = packing.PackedRows(stream_of([[1, 2, 3], [4, 5, 6]], none), 5)
  assert not rows[0]["weights_BT"].any()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=20), st.integers(2, 9))
def test_packing_properties(lengths, T):
  # Every token is a number of its own, a thousand a document.
  documents = [1000 * d + np.arange(n) for d, n in enumerate(lengths, 1)]
  stream = stream_of(documents)
  if len(stream.tokens) < 2:
    return
  packed = packing.PackedRows(stream, T)
  rows = [packed[i] for i in range(len(packed))]
  flat = {n: np.stack([r[n] for r in rows]) for n in rows[0]}
  real = flat["segments_BT"] > 0
  # No token is lost, doubled or moved; the last one is only a target.
  np.testing.assert_array_equal(flat["tokens_BT"][real], stream.tokens[:-1])
  np.testing.assert_array_equal(flat["targets_BT"][real], stream.tokens[1:])
  # Learnt is everything but the first token of each document, once.
  learnt = flat["targets_BT"][flat["weights_BT"] > 0]
  np.testing.assert_array_equal(
    learnt, np.concatenate([d[1:] for d in documents])
  )
  for row in rows:
    inside = row["segments_BT"] > 0
    document = row["tokens_BT"][inside] // 1000
    segment = row["segments_BT"][inside]
    # A segment is a document, and numbers grow by one from 1.
    assert segment[0] == 1
    np.testing.assert_array_equal(np.diff(segment), np.diff(document) != 0)
    for s in np.unique(segment):
      positions = row["positions_BT"][inside][segment == s]
      np.testing.assert_array_equal(positions, np.arange(len(positions)))
    # Nothing is learnt across documents.
    counts = row["weights_BT"] > 0
    np.testing.assert_array_equal(
      row["tokens_BT"][counts] + 1, row["targets_BT"][counts]
    )
    for name, column in row.items():
      assert column.shape == (T,), name
      assert not column[~inside].any(), name


@pytest.mark.slow
def test_packed_documents_do_not_see_each_other():
  """Logits of a packed row are those of its documents alone."""
  config = model_config.ModelConfig(
    family="llama",
    vocab_size=V,
    hidden_size=16,
    queries_per_group=2,
    head_dim=4,
    kv_groups=(2, 1),
    ffn_widths=(24, 16),
    norm_eps=1e-5,
    rope=Rope(),
    context=64,
    tied=True,
  )
  params = decoder.init_params(config, jax.random.key(0))
  random = np.random.default_rng(0)
  documents = [random.integers(0, V, n) for n in (5, 3, 7, 2)]
  row = packing.PackedRows(stream_of(documents), 16)[0]
  apply = decoder.Decoder(config).apply
  packed, _ = apply(
    {"params": params},
    row["tokens_BT"][None],
    row["segments_BT"][None],
    row["positions_BT"][None],
  )
  assert row["segments_BT"].tolist() == [1] * 5 + [2] * 3 + [3] * 7 + [4]
  alone = [apply({"params": params}, d[None])[0][0] for d in documents]
  alone = np.concatenate(alone)[:16]  # the last token is only a target
  np.testing.assert_allclose(packed[0], alone, atol=1e-6)


@pytest.fixture
def documents(tmp_path):
  """A source of 300 documents of different lengths, 24 rows of 128."""
  random = np.random.default_rng(0)
  rows = [
    {"text": " ".join(random.choice(WORDS, random.integers(1, 16)))}
    for _ in range(300)
  ]
  return f"jsonl:{write(tmp_path / 'documents.jsonl', rows)}"


def opened(source, words, batch=8, seq_len=128, seed=0, **kwargs):
  config = Data(source=source, seq_len=seq_len, batch=batch)
  return packing.train_data(config, words, V, seed, **kwargs)


def assert_same(a, b):
  assert a.keys() == b.keys()
  for name in a:
    np.testing.assert_array_equal(a[name], b[name], name)


def test_train_batches(words, documents):
  batch = opened(documents, words).batch(0)
  assert set(batch) == {
    "tokens_BT",
    "targets_BT",
    "segments_BT",
    "positions_BT",
    "weights_BT",
  }
  for name, array in batch.items():
    assert array.shape == (8, 128)
    assert array.dtype == (np.float32 if name == "weights_BT" else np.int32)


def test_train_epochs_are_permutations(unbegun, documents):
  words = unbegun
  train = opened(documents, words, batch=1)
  stream = token_store.tokenise(
    sources.parse_sources(documents, "data.source")[0], words, V
  )
  packed = packing.PackedRows(stream, 128)
  rows = len(packed)
  want = sorted(packed[i]["tokens_BT"].tobytes() for i in range(rows))
  epochs = [
    [train.batch(e * rows + i)["tokens_BT"].tobytes() for i in range(rows)]
    for e in range(3)
  ]
  for epoch in epochs:
    assert sorted(epoch) == want
  assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
  assert train.num_tokens == len(stream.tokens)


def test_train_resumes_at_any_step(words, documents):
  whole = opened(documents, words)
  run = [next(b) for b in [whole.batches(0)] for _ in range(10)]
  resumed = opened(documents, words).batches(7)
  for batch in run[7:]:
    assert_same(next(resumed), batch)


def test_train_rows_start_with_the_begin_token(words, unbegun, documents):
  batch = opened(documents, words).batch(0)
  assert (batch["tokens_BT"][:, 0] == BOS).all()
  first = (batch["segments_BT"] > 0) & (batch["positions_BT"] == 0)
  np.testing.assert_array_equal(batch["tokens_BT"] == BOS, first)
  learnt = batch["targets_BT"][batch["weights_BT"] > 0]
  assert BOS not in learnt
  assert EOS in learnt
  without = opened(documents, unbegun).batch(0)
  assert not (without["tokens_BT"][:, 0] == BOS).all()


def test_train_seed(words, documents):
  a, b = (opened(documents, words, seed=s) for s in (0, 1))
  assert (a.batch(0)["tokens_BT"] != b.batch(0)["tokens_BT"]).any()
  assert a.fingerprint == b.fingerprint


def test_train_mixture(tmp_path, words):
  low = write(tmp_path / "low.txt", " ".join(WORDS[:20] * 30))
  high = write(tmp_path / "high.txt", " ".join(WORDS[20:] * 90))
  spec = f"text:{low},weight=0.7,text:{high},weight=0.3"
  train = opened(spec, words, batch=10, seq_len=16)
  batches = [train.batch(step) for step in range(100)]
  of_high = [(b["tokens_BT"] >= ids_of("w20")[0]).any(-1) for b in batches]
  assert np.mean(of_high) == pytest.approx(0.3, abs=0.01)
  # Not in blocks: every batch has its share.
  assert all(1 <= h.sum() <= 5 for h in of_high)
  assert_same(opened(spec, words, 10, 16).batch(99), batches[99])


def test_each_process_builds_its_rows(words, documents):
  mine = opened(documents, words, places=(2, 5)).batch(3)
  for name, whole in opened(documents, words).batch(3).items():
    np.testing.assert_array_equal(mine[name][[2, 5]], whole[[2, 5]])
    assert mine[name].shape == whole.shape
    assert not mine[name][[0, 1, 3, 4, 6, 7]].any()


class Numbers(list):
  seq_len = order.BLOCK_TOKENS // 4  # blocks of four rows


@pytest.mark.parametrize(("rows", "batch"), [(103, 8), (50, 7)])
def test_order_in_runs(rows, batch):
  """Each row once an epoch, by one place, in blocks; epochs differ."""
  made = order.InRuns([Numbers(range(rows))], [1.0], 3, batch)
  seen = []
  for place in range(batch):
    mine = [made[step * batch + place] for step in range(2 * rows)]
    length = (place + 1) * rows // batch - place * rows // batch
    epochs = [mine[e * length : (e + 1) * length] for e in range(3)]
    seen.append(epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    # What it reads next is, for the most part, near what it has just read.
    jumps = [min(abs(a - b), rows - abs(a - b)) for a, b in pairwise(mine)]
    assert np.mean(np.array(jumps) < 4) > 0.55
  for epoch in range(3):
    found = [row for epochs in seen for row in epochs[epoch]]
    assert sorted(found) == list(range(rows))
  again = order.InRuns([Numbers(range(rows))], [1.0], 3, batch)
  assert [again[i] for i in (0, 77, 1234)] == [made[i] for i in (0, 77, 1234)]
  other = order.InRuns([Numbers(range(rows))], [1.0], 4, batch)
  assert [other[i] for i in range(20)] != [made[i] for i in range(20)]


def test_order_in_runs_of_a_mixture():
  sources = [Numbers(range(800)), Numbers(range(1000, 1080)), Numbers([7000])]
  made = order.InRuns(sources, [0.7, 0.2, 0.1], 0, 8)
  steps = [[made[s * 8 + p] for p in range(8)] for s in range(100)]
  share = lambda rows: np.mean(np.array(rows) < 800)
  assert share(steps) == pytest.approx(0.7, abs=0.01)
  for rows in (*steps, *zip(*steps, strict=True)):  # of a batch, of a place
    assert share(rows) == pytest.approx(0.7, abs=0.15)
  large = [row for rows in steps for row in rows if row < 800]
  assert len(set(large)) == len(large)  # 560 of 800: none comes twice
  small = [row for rows in steps for row in rows if 1000 <= row < 7000]
  assert max(map(small.count, small)) - min(map(small.count, small)) <= 1


def test_long_sources_are_read_in_runs(words, documents, monkeypatch):
  whole = opened(documents, words)
  monkeypatch.setattr(order, "LONG", 1000)
  train = opened(documents, words, batch=1)
  assert train.fingerprint != whole.fingerprint  # and no old run goes on so
  packed = packing.PackedRows(train.streams[0], 128, words.begin_id)
  want = sorted(packed[i]["tokens_BT"].tobytes() for i in range(len(packed)))
  found = [train.batch(i)["tokens_BT"].tobytes() for i in range(len(packed))]
  assert sorted(found) == want


def test_train_from_cache_is_the_same(tmp_path, words, documents):
  plain = opened(documents, words)
  for _ in range(2):
    cached = opened(documents, words, cache_dir=tmp_path / "cache")
    assert_same(plain.batch(3), cached.batch(3))
    assert plain.fingerprint == cached.fingerprint


def test_train_assistant_only(tmp_path, words):
  path = write(tmp_path / "a.jsonl", [{"messages": CHAT}] * 5)
  config = Data(f"jsonl:{path},loss=assistant", seq_len=64, batch=1)
  batch = packing.train_data(config, words, V + 2, 0).batch(0)
  learnt = batch["targets_BT"][batch["weights_BT"] > 0].tolist()
  turns = [*ids_of("w3"), END, *ids_of("w5", "w6"), END]
  assert len(learnt) > len(turns)
  assert set(learnt) == set(turns)


def test_train_errors(tmp_path, words, documents):
  with error("npy is for calibration only"):
    opened("npy:a.npy", words)
  path = write(tmp_path / "empty.jsonl", "\n")
  with error("is empty"):
    opened(f"jsonl:{path}", words)
  bare = dataclasses.replace(words, eos_token=None)
  path = write(tmp_path / "short.jsonl", [{"text": "w1"}])
  assert opened(f"jsonl:{path}", bare, 1, 4).batch(0)["weights_BT"].sum() == 1


def test_heldout_tokens(words):
  text = "w1 w2\nw3"
  got = packing.heldout_tokens(text, words, V)
  assert got.dtype == np.int32
  assert got.tolist() == [BOS, *ids_of("w1", "w2", "w3")]
  with error("eval.text has 1 tokens"):
    packing.heldout_tokens("", words, V)
