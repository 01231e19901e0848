"""Asked to stop where nobody knows of a run: at each batch, layer or tensor."""

import signal

import jax
import numpy as np
import pytest

from adapt_pruner_jax.distributed import agreement, sharding, stopping
from adapt_pruner_jax.errors import StoppedError
from adapt_pruner_jax.evaluation import perplexity
from adapt_pruner_jax.formats.hf import load, save
from adapt_pruner_jax.pruning import refit, refit_loss, surgery


@pytest.fixture
def asked():
  """A run is under way, and was asked to stop."""
  with stopping.stop_signals() as found:
    found.ask()
    yield found


def test_without_a_run_and_in_one_that_goes_on(asked):
  with stopping.stop_signals():  # another one, within
    stopping.moment()
  for _ in range(2):
    with pytest.raises(StoppedError, match="the same command continues"):
      stopping.moment()
  with pytest.raises(StoppedError):  # what one process does for all
    agreement.on_writer(stopping.moment)
  stopping._under_way.remove(asked)
  stopping.moment()
  stopping._under_way.append(asked)


@pytest.fixture
def interruptible():
  """What a shell starts in the background is not."""
  old = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, old)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_asks_and_a_second_one_ends():
  with stopping.stop_signals() as found:
    signal.raise_signal(signal.SIGINT)
    assert found.now()
    with pytest.raises(KeyboardInterrupt):
      signal.raise_signal(signal.SIGINT)
  with pytest.raises(KeyboardInterrupt):  # as before it
    signal.raise_signal(signal.SIGINT)


def test_seen_in_every_phase(small_model, tmp_path):
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  config, params = pair = load.load(str(small_model), mesh=mesh)
  tokens_NT = np.zeros((8, 16), np.int32)
  everything, out = surgery.everything(config), tmp_path / "model"
  phases = [
    lambda: load.load(str(small_model), mesh=mesh),
    lambda: perplexity.perplexity(config, params, tokens_NT[0], 16, 8, mesh),
    lambda: refit.refit(pair, pair, everything, tokens_NT, 8, mesh=mesh),
    lambda: next(refit_loss._batches(lambda _: tokens_NT, 4, 1, 0)),
    lambda: save.save(config, params, out, source=small_model),
  ]
  with stopping.stop_signals() as asked:
    asked.ask()
    for work in phases:
      with pytest.raises(StoppedError):
        work()
  assert not list(tmp_path.iterdir())
