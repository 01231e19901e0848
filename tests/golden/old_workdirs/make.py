"""Makes the killed work directories beside this file, with the old code.

Run with the package of commit ef9d13d, the last one before its files were put
into rooms, on 8 virtual CPU devices:

  cd tests/golden/old_workdirs && XLA_FLAGS=\
--xla_force_host_platform_device_count=8 PYTHONPATH=CHECKOUT python make.py

Two runs are killed with SIGKILL: `pruning` in the prune of its second stage,
`training` in the training of its second stage; killed.tar.gz has what they left
(without the files that nothing in a checkpoint refers to any more).
`NAME-expected` has what the same code made of each when the same command was
given again.
"""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tarfile

import tensorstore as ts

RECIPE = {
  "model.path": "model",
  "prune.ratio": 0.3,
  "prune.stages": 2,
  "calibration.source": "text:text.txt",
  "calibration.samples": 8,
  "calibration.seq_len": 16,
  "calibration.batch": 8,
  "calibration.refit_samples": 16,
  "data.source": "text:text.txt",
  "data.seq_len": 32,
  "data.batch": 8,
  "train.learning_rate": 1e-3,
  "mesh.data": -1,
  "mesh.fsdp": 1,
  "eval.text": "text.txt",
  "eval.seq_len": 64,
  "checkpoint.keep": 1,
  "checkpoint.steps": 2,
  "log.tensorboard": False,
}
RUNS = {
  "pruning": {
    "prune.method": "curvature",
    "prune.curvature_step": 0.03,
    "prune.refit": "2",
  },
  "training": {"prune.step_size": 0.05, "train.tokens": 12 * 256},
}
KEPT = ("model/model.safetensors", "kept.json", "trace.jsonl")


def run(name: str, kill: bool) -> None:
  from adapt_pruner_jax import adapt
  from adapt_pruner_jax.config import Config

  config = Config()
  for field, value in (RECIPE | RUNS[name]).items():
    section, field = field.split(".")
    setattr(getattr(config, section), field, value)
  write_pruning, save_checkpoint = adapt.write_pruning, adapt.save_checkpoint

  def killed_in_a_prune(step, steps, state, setting):
    write_pruning(step, steps, state, setting)
    if name == "pruning" and state.stage == 2 and len(steps) == 3:
      os.kill(os.getpid(), signal.SIGKILL)

  def killed_in_training(checkpoints, state, setting):
    save_checkpoint(checkpoints, state, setting)
    if name == "training" and state.step == 8:
      checkpoints.wait()
      os.kill(os.getpid(), signal.SIGKILL)

  if kill:
    adapt.write_pruning = killed_in_a_prune
    adapt.save_checkpoint = killed_in_training
  adapt.run(config, pathlib.Path(name))


def make_model() -> None:
  import jax

  from adapt_pruner_jax import sharding, tiny
  from adapt_pruner_jax.hf import save

  shape = tiny.Recipe(V=280, D=16, L=2, K=2, G=2, H=4, F=24, context=64)
  tiny.train_tokenizer(pathlib.Path("tokenizer"), shape.V)
  config = tiny.config_of(shape)
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  params = tiny.init_params(config, 0, mesh)
  params = jax.tree.map(lambda x: x * 3, params)  # so that layers differ
  save.save(config, params, pathlib.Path("model"), source="tokenizer")
  shutil.rmtree("tokenizer")


def shrink(checkpoints: pathlib.Path) -> None:
  """Deletes files without which every array is still the same."""

  def read(path: pathlib.Path) -> dict[str, bytes]:
    where = f"file://{path.absolute()}/"
    store = ts.KvStore.open({"driver": "ocdbt", "base": where}).result()
    return {k: store.read(k).result().value for k in store.list().result()}

  shutil.rmtree(checkpoints / "trash", ignore_errors=True)
  for file in checkpoints.rglob("commit_success.txt"):
    file.unlink()
  for state in checkpoints.glob("*/state"):
    whole = read(state)
    for file in [f for f in state.rglob("d/*") if f.is_file()]:
      beside = file.rename(file.with_suffix(".away"))
      try:
        needed = read(state) != whole
      except Exception:
        needed = True
      beside.rename(file) if needed else beside.unlink()


def main() -> None:
  if len(sys.argv) > 1:
    run(sys.argv[1], kill=sys.argv[2] == "kill")
    return
  make_model()
  for name in RUNS:
    command = [sys.executable, __file__, name]
    killed = subprocess.run([*command, "kill"])
    assert killed.returncode == -signal.SIGKILL, killed
    shutil.rmtree(pathlib.Path(name) / "cache")
    (pathlib.Path(name) / "run.lock").unlink()
    shutil.copytree(name, f"{name}-killed")
    subprocess.run([*command, "finish"], check=True)
    expected = pathlib.Path(f"{name}-expected")
    expected.mkdir()
    for file in KEPT:
      shutil.copy(pathlib.Path(name) / file, expected)
    shutil.rmtree(name)
    pathlib.Path(f"{name}-killed").rename(name)
    shrink(pathlib.Path(name) / "checkpoints")
  with tarfile.open("killed.tar.gz", "w:gz") as archive:
    for name in RUNS:
      archive.add(name)
      shutil.rmtree(name)


if __name__ == "__main__":
  main()
