"""A work directory in a bucket: S3 and Cloud Storage, served on loopback."""

import json
import os
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from adapt_pruner_jax.data import files, order, shards, sources, token_store
from adapt_pruner_jax.data.tokenizer import load_tokenizer
from adapt_pruner_jax.distributed import agreement
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.formats.hf import load
from adapt_pruner_jax.storage import (
  bucket_lock,
  bucket_path,
  download,
  json_files,
  places,
  publish,
)
from adapt_pruner_jax.storage.outbox import Outbox
from tests import small_runs

ROWS = [{"a": i} for i in range(5)]


@pytest.fixture
def place(bucket, request):
  """A place in the bucket that only this test has."""
  return bucket / request.node.originalname


def test_a_bucket_has_what_was_written(place):
  assert not place.exists()
  assert list(place.iterdir()) == []
  publish.write_text(place / "a" / "x.json", "[1]")
  assert place.is_dir()
  assert (place / "a" / "x.json").is_file()
  assert [p.name for p in place.iterdir()] == ["a"]
  assert json_files.read_json(place / "a" / "x.json") == [1]
  with pytest.raises(FileExistsError):
    (place / "a" / "x.json").create(b"")
  publish.remove(place / "a")
  publish.remove(place / "a")
  assert not place.exists()


def test_a_directory_is_whole_or_says_that_it_is_not(place, monkeypatch):
  def write(names):
    with publish.directory(place, replace=True) as folder:
      for name in names:
        (folder / name).write_text(name)

  write(["config.json", "old"])
  write(["config.json", "new"])
  assert {*place.files()} == {"config.json", "new"}
  copy = load.resolve(str(place))
  assert (copy / "new").read_text() == "new"
  assert load.resolve(str(place)) == copy  # read once
  (place / "new").write_bytes(b"changed behind our back")
  assert (load.resolve(str(place)) / "new").read_text().startswith("changed")
  with monkeypatch.context() as patch:
    real = places.bucket().put

    def put(local, path):
      if path.name == "new":
        raise UserError("cut off")
      real(local, path)

    patch.setattr(places.bucket(), "put", put)
    with pytest.raises(UserError, match="cut off"):
      write(["config.json", "new"])
  with pytest.raises(UserError, match="is not whole"):
    load.resolve(str(place))
  publish.require_free(place, overwrite=True, marks=("config.json",))
  write(["config.json"])
  assert {*place.files()} == {"config.json"}


def test_rows_are_small_objects_and_then_one(place):
  outbox, path = Outbox(), place / "rows.jsonl"
  parts = path.with_name("rows.jsonl.parts")
  for row in ROWS[:3]:
    outbox.append(path, row)
  # The first at once, the others in ten seconds.
  assert json_files.read_lines(path) == ROWS[:1]
  assert outbox.rows(path) == ROWS[:3]
  assert not path.exists()
  outbox.append(path, ROWS[3])
  outbox.merge()
  assert path.read_bytes().decode() == "".join(
    json.dumps(row) + "\n" for row in ROWS[:4]
  )
  assert not parts.exists()
  # Another process, killed between writing anew and removing the parts.
  other = Outbox()
  other.append(path, ROWS[4])
  path.write_bytes(path.read_bytes().replace(b"3", b"7"))
  assert len(list(parts.iterdir())) == 1
  assert json_files.read_lines(path)[-1] == {"a": 7}
  Outbox().rewrite(path, ROWS)
  assert json_files.read_lines(path) == ROWS
  assert not parts.exists()


def test_the_newest_content_counts(place):
  outbox = Outbox()
  for row in ROWS:
    outbox.replace(place / "x.json", row)
  assert json_files.read_json(place / "x.json") == ROWS[0]
  outbox.flush()
  assert json_files.read_json(place / "x.json") == ROWS[-1]
  outbox.replace(place / "x.json", {})
  outbox.remove(place / "x.json")
  outbox.flush()
  assert not (place / "x.json").exists()


OWNER = """
import sys, time
from adapt_pruner_jax.storage import bucket_lock, places
bucket_lock.BEAT, bucket_lock.DEAD = 0.5, 3
here = bucket_lock._here
if "elsewhere" in sys.argv:
  bucket_lock._here = lambda: here() | {"boot": "another machine"}
with bucket_lock.lock(places.to_path(sys.argv[1]), "run.lock"):
  print("owner", flush=True)
  time.sleep(60)
"""


def owner(place, *more):
  """A process that holds the lock."""
  process = subprocess.Popen(
    [sys.executable, "-c", OWNER, str(place), *more],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  assert process.stdout.readline() == "owner\n", process.stderr.read()
  return process


def test_of_many_at_a_time_one_creates_the_lock(place):
  def create(number):
    return bucket_lock._create(place / "lock", b"%d" % number)

  with ThreadPoolExecutor(8) as threads:
    made = list(threads.map(create, range(8)))
  assert sum(made) == 1
  assert (place / "lock").read_bytes() == b"%d" % made.index(True)
  # A request that was repeated, as the answer to the first was lost.
  assert create(made.index(True))


def test_names_that_are_patterns_are_refused(bucket):
  with (
    pytest.raises(UserError, match=r"may not have \* \? or \["),
    bucket_lock.lock(bucket / "run[1]", "run.lock"),
  ):
    pass


def test_a_lock_that_was_changed_behind_our_back(place, monkeypatch):
  monkeypatch.setattr(bucket_lock, "DEAD", 0.5)
  for name, content in {"a": b"no JSON", "b": b"[1]", "c": b"{}"}.items():
    (place / name / "000000001").write_bytes(content)
    (place / name / "notes.txt").write_bytes(content)
    begun = time.monotonic()
    with bucket_lock.lock(place, name):  # nobody shows there
      assert time.monotonic() - begun > 0.5
  listed = [["000000001"], []]  # and by then the next owner has removed it
  monkeypatch.setattr(bucket_lock, "_numbers", lambda _: listed.pop(0))
  assert bucket_lock._take(place, place / "other").name == "000000002"


ONLY_S3 = pytest.mark.parametrize("bucket_server", ["s3"], indirect=True)


@ONLY_S3
@pytest.mark.slow
def test_one_owner_at_a_time(place, monkeypatch):

  monkeypatch.setattr(bucket_lock, "BEAT", 0.5)
  monkeypatch.setattr(bucket_lock, "DEAD", 3)
  first = owner(place, "elsewhere")
  with (
    pytest.raises(UserError, match=f"process {first.pid} on"),
    bucket_lock.lock(place, "run.lock"),
  ):
    pass
  first.kill()
  begun = time.monotonic()  # of another machine: it has to be waited for
  with bucket_lock.lock(place, "run.lock"):
    assert 2 < time.monotonic() - begun < 10
    # Whoever was taken for dead, and is not, ends.
  second = owner(place, "elsewhere")
  (place / "run.lock" / "000000099").create(b'{"free": true}')
  assert second.wait(20) == 1
  assert "was taken over by another run" in second.stderr.read()
  third = owner(place)
  third.kill()
  third.wait()
  begun = time.monotonic()
  with bucket_lock.lock(place, "run.lock"):
    assert time.monotonic() - begun < 2  # one of this machine is not there


REFUSED = """
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.storage import lock, places
try:
  with lock.lock(places.to_path({place!r})):
    print("taken")
except UserError as error:
  print(error)
"""


@ONLY_S3
@pytest.mark.slow
@pytest.mark.parametrize(
  ("place", "unset", "expected"),
  [
    ("s3://bucket/x", "AWS_ENDPOINT_URL", "cannot be reached"),
    ("s3://bucket/x", "AWS_ACCESS_KEY_ID", "aws configure"),
    ("s3://no-bucket/x", "", "there is no bucket s3://no-bucket"),
  ],
)
def test_bad_buckets_are_named(bucket, tmp_path, place, unset, expected):
  env = os.environ | {"AWS_MAX_ATTEMPTS": "1", "HOME": str(tmp_path)}
  if unset == "AWS_ENDPOINT_URL":
    env[unset] = "http://127.0.0.1:9"
  elif unset:
    env = {k: v for k, v in env.items() if "ACCESS_KEY" not in k}
  done = subprocess.run(
    [sys.executable, "-c", textwrap.dedent(REFUSED.format(place=place))],
    env=env,
    capture_output=True,
    text=True,
    timeout=60,
  )
  assert expected in done.stdout, done.stderr
  assert done.stdout.count("\n") == 1


@pytest.mark.parametrize(
  ("name", "expected"),
  [
    ("401", "no credentials that it takes"),
    ("403", "not allowed"),
    ("507", "the bucket is full, or its quota is used up"),
    ("quota", "the bucket is full, or its quota is used up"),
    ("clock", "not taken for this machine's clock"),
    ("expired", "no credentials that it takes"),
    ("region", "in another region"),
  ],
)
def test_a_bucket_that_takes_nothing_is_said_at_once(
  place, fault, name, expected
):
  path = place / "x"
  path.write_bytes(b"old")
  fault(name, 60, "PUT,POST")
  with pytest.raises(UserError, match=expected) as refused:
    publish.write_text(path, "new")
  assert "\n" not in str(refused.value)
  fault(name, 0, "NONE")
  assert path.read_bytes() == b"old"


@pytest.mark.slow
def test_a_bucket_that_is_away_for_a_while(place, fault):
  path = place / "x"
  path.write_bytes(b"old")
  fault("503", 2, "PUT,GET,HEAD,POST")
  path.write_bytes(b"new")
  fault("429", 2, "PUT,GET,HEAD,POST")
  assert path.read_bytes() == b"new"


def test_what_is_in_no_bucket_is_named(bucket):
  absent = f"{bucket.bucket}-that-is-absent/x.txt"
  with pytest.raises(UserError, match="does not exist"):
    download.copy(places.to_path(absent))
  with pytest.raises(UserError, match="no such object, or no such bucket"):
    list(files.lines(absent))


def test_texts_and_tokens_in_a_bucket(place, small_model, tmp_path):
  texts = ["one text", "another text", "a third one"]
  for i, text in enumerate(texts):
    row = json.dumps({"text": text}).encode() + b"\n"
    (place / "texts" / f"{i}.jsonl").write_bytes(row)
    (tmp_path / f"{i}.jsonl").write_bytes(row)
  names = [p.name for p in files.files_of("jsonl", str(place / "texts"))]
  assert names == ["0.jsonl", "1.jsonl", "2.jsonl"]
  some = files.files_of("jsonl", str(place / "texts" / "[01].jsonl"))
  assert [p.name for p in some] == names[:2]
  tokenizer = load_tokenizer(small_model)

  def stream_of(name, cache):
    (source,) = sources.parse_sources(f"jsonl:{name}", "data.source")
    return token_store.tokenise(source, tokenizer, small_runs.SMALL.V, cache)

  def tokens(name, cache):
    return np.array(stream_of(name, cache).tokens[:])

  want = tokens(tmp_path, tmp_path / "cache")
  np.testing.assert_array_equal(tokens(place / "texts", place / "cache"), want)
  files_there = (place / "cache").files()
  found_shards = [n for n in files_there if n.endswith(".safetensors")]
  assert len(found_shards) == 1
  # Another machine takes what is there.
  before = (place / "cache" / found_shards[0]).version()
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("ADAPT_PRUNER_CACHE", str(tmp_path / "elsewhere"))
    found = tokens(place / "texts", place / "cache")
    np.testing.assert_array_equal(found, want)
    assert (place / "cache" / found_shards[0]).version() == before
    # Of a long stream it reads what it needs, where it is.
    patch.setattr(shards.InBucket, "PIECE", 8)
    patch.setattr(order, "LONG", 1)
    patch.setattr(agreement, "on_writer", lambda action: action() and None)
    patch.setattr(agreement, "same", lambda v: [v[0], 1, len(want)])
    asked = []
    read = bucket_path.BucketPath.read_range
    patch.setattr(
      bucket_path.BucketPath,
      "read_range",
      lambda *a: asked.append(a) or read(*a),
    )
    stream = stream_of(place / "texts", place / "cache")
    header = len(asked)
    np.testing.assert_array_equal(stream.tokens[5:9], want[5:9])
    assert len(asked) == header + 3
    np.testing.assert_array_equal(stream.tokens[np.array([7, 5])], want[[7, 5]])
    assert len(asked) == header + 3
    changed = place / "cache" / found_shards[0]
    changed.write_bytes(changed.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="was changed while it was read"):
      stream.tokens[0:2]
