"""Faults, tried: kill -9 at random moments, and damage to every kind of file.

  python benchmarks/faults.py --kills=20 --tries=8 --out=docs/faults.md

--kills: a run of 4 stages on a small random model is killed, and the same
command goes on, until it has been killed so often; runs that end are compared
bit for bit with one that nothing happened to. --tries: a bit is flipped in, or
the end cut off, a copy of each kind of file, and what reads it runs on it.
--bucket_kills: of four processes, see `bucket_faults.py`. "LOST" is a result
that differs and that nothing spoke of. --out replaces the tables in that file.
"""

import argparse
import contextlib
import datetime
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import bucket_faults

os.environ |= {
  "JAX_PLATFORMS": "cpu",
  "HF_HUB_OFFLINE": "1",
  "OMP_NUM_THREADS": "1",
  # A process that goes on should not compile what the one before it did.
  "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
}
ROOT = Path(__file__).resolve().parent.parent
RECIPE = {
  "prune.ratio": 0.4,
  "prune.stages": 4,
  "prune.ranking.step_size": 0.02,  # several refits in a stage
  "calibration.samples": 8,
  "calibration.seq_len": 16,
  "calibration.batch": 4,
  "data.seq_len": 32,
  "data.batch": 8,
  "train.tokens": 32 * 256,
  "train.learning_rate": 1e-3,
  "checkpoint.steps": 3,
  "log.tensorboard": False,
}


def command(
  work: Path | str, model: Path, data: Path, more: dict | None = None
) -> list[str]:
  fields = (
    RECIPE
    | (more or {})
    | {
      "model.path": model,
      "data.source": f"jsonl:{data}",
      "calibration.source": f"jsonl:{data}",
    }
  )
  return [
    *(sys.executable, "-m", "adapt_pruner_jax", "run"),
    *("--config=configs/accel.py", f"--workdir={work}"),
    *(f"--config.{name}={value}" for name, value in fields.items()),
  ]


def make_inputs(folder: Path) -> tuple[Path, Path]:
  """A small random model with a tokenizer, and texts."""
  import jax

  from adapt_pruner_jax.data import sources
  from adapt_pruner_jax.distributed import sharding
  from adapt_pruner_jax.formats.hf import save
  from adapt_pruner_jax.runs import tiny_model
  from adapt_pruner_jax.storage import json_files

  recipe = tiny_model.Recipe(V=300, D=32, L=3, K=4, G=2, H=8, F=48, context=64)
  tiny_model.train_tokenizer(folder / "tokenizer", recipe.V)
  config = tiny_model.config_of(recipe)
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  params = jax.tree.map(
    lambda x: x * 3, tiny_model.init_params(config, 0, mesh)
  )
  model = folder / "source"
  save.save(config, params, model, source=folder / "tokenizer")
  text = sources.embedded_text("heldout")
  rows = [{"text": text[i : i + 400]} for i in range(0, 40_000, 400)]
  json_files.rewrite_lines(folder / "texts.jsonl", rows)
  return model, folder / "texts.jsonl"


def run(arguments: list[str]) -> tuple[int, str]:
  """Exit code and output of a command."""
  done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
  return done.returncode, done.stdout + done.stderr


def run_here(arguments: list[str]) -> tuple[int, str]:
  """The same in this process, which has imported and compiled what it takes."""
  from adapt_pruner_jax import cli

  text, code = io.StringIO(), 0
  with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
    try:
      cli.main(arguments[3:])  # without python -m adapt_pruner_jax
    except SystemExit as end:
      code = end.code or 0
    except Exception:
      traceback.print_exc()
      code = 1
  return code, text.getvalue()


def weights(work: Path) -> bytes | None:
  file = work / "model" / "model.safetensors"
  return file.read_bytes() if file.exists() else None


# ---- Kills -------------------------------------------------------------------


def kills(
  count: int, make: Callable[[Path], list[str]], folder: Path, whole: Path
) -> list[tuple]:
  """Kills runs at random moments; rows of (phase, times, lost)."""
  rng = random.Random(0)
  seconds = _seconds(make, folder)
  counts: dict[str, int] = {}
  ended = lost = done = 0
  while done < count:
    work = folder / f"killed-{ended}"
    while done < count and not (work / "summary.json").exists():
      phase = _killed(make(work), work, rng.uniform(0, seconds))
      if phase:
        done += 1
        counts[phase] = counts.get(phase, 0) + 1
        print(f"kill {done} of {count}: {phase}", flush=True)
    code, output = run(make(work))
    ended += 1
    if code or weights(work) != weights(whole):
      lost += 1
      print(f"LOST in {work}: exit code {code}\n{output}", flush=True)
  print(f"{done} kills of {ended} runs, {lost} of them lost", flush=True)
  rows = [(f"`kill -9` {p}", n, "") for p, n in sorted(counts.items())]
  verdict = f"LOST {lost}" if lost else "nothing lost, equal bit for bit"
  return [*rows, (f"`kill -9`, {ended} runs in all", done, verdict)]


def _seconds(make: Callable[[Path], list[str]], folder: Path) -> float:
  """How long a run takes that finds everything compiled."""
  begun = time.monotonic()
  code, output = run(make(folder / "timed"))
  assert code == 0, output
  return time.monotonic() - begun


def _killed(arguments: list[str], work: Path, seconds: float) -> str:
  """Starts a run and kills it then; the phase it was in, "" if it had ended."""
  with tempfile.TemporaryFile("w+") as output:
    process = subprocess.Popen(
      arguments, cwd=ROOT, stdout=output, stderr=output
    )
    with contextlib.suppress(subprocess.TimeoutExpired):
      process.wait(seconds)
      return ""
    process.send_signal(signal.SIGKILL)
    process.wait()
    output.seek(0)
    return _phase(output.read(), work)


def _phase(output: str, work: Path) -> str:
  if any((work / "checkpoints").glob("*orbax-checkpoint-tmp*")):
    return "while a checkpoint was saved"
  phases = {
    "exporting": "in the export",
    "pruning": "in a prune",
    "recovery": "in training",
    "done": "between stages",
  }
  for line in reversed(output.splitlines()):
    for word, phase in phases.items():
      if word in line:
        return phase
  return "while it started"


# ---- Damage ------------------------------------------------------------------


def flip(file: Path, rng: random.Random) -> None:
  data = bytearray(file.read_bytes())
  data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
  file.write_bytes(data)


def truncate(file: Path, rng: random.Random) -> None:
  file.write_bytes(file.read_bytes()[: rng.randrange(file.stat().st_size)])


def damages(
  name: str,
  tries: int,
  origin: Path,
  pattern: str,
  check: Callable[[Path], str],
) -> Iterator[tuple]:
  """Damages copies of a directory; a row for each sort of damage.

  Args:
    pattern: of the files to damage, one at random each time.
    check: reads the copy; "detected", "harmless" or "LOST".
  """
  rng = random.Random(1)
  for damage in (flip, truncate):
    found: dict[str, int] = {}
    for number in range(tries):
      with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / origin.name
        shutil.copytree(origin, copy)
        found_files = [f for f in sorted(copy.glob(pattern)) if f.is_file()]
        file = rng.choice([f for f in found_files if f.stat().st_size])
        damage(file, rng)
        verdict = check(copy)
        found[verdict] = found.get(verdict, 0) + 1
        print(f"{name}: {damage.__name__} {number}: {verdict}", flush=True)
    verdicts = ", ".join(f"{n} {v}" for v, n in sorted(found.items()))
    what = "a flipped bit" if damage is flip else "cut off"
    yield f"{what}: {name}", tries, verdicts


def interrupted(make: Callable[[Path], list[str]], work: Path) -> Path:
  """A run that was killed in the prune of its last stage."""
  process = subprocess.Popen(
    make(work), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
  )
  while process.poll() is None:
    if _stage_in_prune(work) == 4:
      process.send_signal(signal.SIGKILL)
    time.sleep(0.01)
  assert process.returncode < 0, "it ended before it could be killed"
  return work


def _stage_in_prune(work: Path) -> int:
  """The stage whose prune is under way; 0 = none."""
  try:
    saved = json.loads((work / "pruning.json").read_text())
  except FileNotFoundError:
    return 0
  return saved["content"]["stage"]


def newest(work: Path) -> int:
  """Number of the newest checkpoint; 0 if there is none."""
  numbers = (path.name for path in work.glob("checkpoints/*"))
  return max((int(name) for name in numbers if name.isdigit()), default=0)


def all_damages(
  tries: int, whole: Path, cut: Path, make: Callable[[Path], list[str]]
) -> Iterator[tuple]:
  from adapt_pruner_jax.errors import UserError
  from adapt_pruner_jax.formats import orbax
  from adapt_pruner_jax.runs import tiny_model

  def verified(copy: Path) -> str:
    try:
      orbax.verify(str(copy))
    except UserError:
      return "detected"
    return "LOST"

  def continued(copy: Path) -> str:
    code, output = run_here(make(copy))
    if code:
      plain = "Traceback" not in output and "error: " in output
      return "detected" if plain else "LOST (traceback)"
    if weights(copy) != weights(whole):
      return "LOST"
    return "detected, run went on" if "damaged" in output else "harmless"

  model = whole / "model"
  for pattern in ("*.safetensors", "config.json", "tokenizer.json", "*.py"):
    yield from damages(
      f"`model/{pattern}` (`convert --verify`)", tries, model, pattern, verified
    )
  few = max(1, tries // 4)  # each is a run
  last = f"checkpoints/{newest(cut)}"
  for name, pattern in {
    "the newest checkpoint's arrays": f"{last}/state/**/d/*",
    "the newest checkpoint's `meta`": f"{last}/meta/metadata",
    "`pruning.json`": "pruning.json",
    "`trace.jsonl`": "trace.jsonl",
    "`metrics.jsonl`": "metrics.jsonl",
    "`config.json`": "config.json",
  }.items():
    yield from damages(name, few, cut, pattern, continued)
  home = os.environ["ADAPT_PRUNER_CACHE"]

  def tokenised_again(copy: Path) -> str:
    work = copy.parent / "work"
    shutil.copytree(cut, work)
    os.environ["ADAPT_PRUNER_CACHE"] = str(copy.parent)
    try:
      return continued(work)
    finally:
      os.environ["ADAPT_PRUNER_CACHE"] = home

  kept = Path(home) / "tokens"
  yield from damages("the token cache", few, kept, "*/*", tokenised_again)
  recipe = tiny_model.Recipe(V=300, D=16, L=1, K=2, G=1, H=8, F=16, steps=2)
  cached = tiny_model.base_model(cut.parent / "tiny", lambda _: None, recipe)

  def made_again(copy: Path) -> str:
    return "LOST" if tiny_model.is_intact(copy) else "detected"

  yield from damages("the cached tiny model", tries, cached, "*.*", made_again)


# ---- The tables --------------------------------------------------------------


def report(part: str, rows: list[tuple], options: str, out: str | None) -> str:
  """A table, also put between `<!-- part -->` and `<!-- /part -->`."""
  today = datetime.date.today().isoformat()
  text = "\n".join(
    [
      f"`python benchmarks/faults.py {options} --out=docs/faults.md`, {today}:",
      "",
      "| fault | tried | outcome |",
      "|---|---:|---|",
      *(f"| {fault} | {tried} | {outcome} |" for fault, tried, outcome in rows),
    ]
  )
  if out:
    file, (begin, end) = Path(out), (f"<!-- {part} -->", f"<!-- /{part} -->")
    before, rest = file.read_text().split(begin)
    after = rest.split(end)[1]
    file.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}")
  return text


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--kills", type=int, default=0)
  parser.add_argument("--tries", type=int, default=0, help="of each damage")
  parser.add_argument("--out", help="Markdown file that gets the tables")
  parser.add_argument("--bucket_kills", type=int, default=0)
  parser.add_argument("--bucket", choices=("s3", "gs"), default="s3")
  flags = parser.parse_args()
  with tempfile.TemporaryDirectory(prefix="faults-") as name:
    folder = Path(name)
    cache = os.environ.setdefault("ADAPT_PRUNER_CACHE", str(folder / "cache"))
    os.environ["JAX_COMPILATION_CACHE_DIR"] = f"{cache}/jax"
    model, data = make_inputs(folder)
    make, rows = (lambda work: command(work, model, data)), []
    if count := flags.bucket_kills:
      fewer = lambda work: command(work, model, data, bucket_faults.FIELDS)[3:]
      rows += bucket_faults.kills(count, flags.bucket, fewer, folder)
      said = f"--bucket_kills={count} --bucket={flags.bucket}"
      print(report(f"{flags.bucket} bucket", rows, said, flags.out))
    if flags.kills or flags.tries:
      rows += on_a_disk(flags, make, folder)
  if any("LOST" in outcome for *_, outcome in rows):
    sys.exit("something was lost")


def on_a_disk(
  flags: argparse.Namespace, make: Callable[[Path], list[str]], folder: Path
) -> list[tuple]:
  """Kills of one process, and damage."""
  whole = folder / "whole"
  code, output = run(make(whole))
  assert code == 0, output
  rows = []
  if flags.kills:
    rows += kills(flags.kills, make, folder, whole)
    print(report("kills", rows, f"--kills={flags.kills}", flags.out))
  if flags.tries:
    cut = interrupted(make, folder / "cut")
    found = []
    for row in all_damages(flags.tries, whole, cut, make):
      found.append(row)
      text = report("damage", found, f"--tries={flags.tries}", flags.out)
    rows += found
    print(text)
  return rows


if __name__ == "__main__":
  main()
