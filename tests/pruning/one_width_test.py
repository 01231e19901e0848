"""As many units of each layer, by hand."""

import numpy as np
import pytest

from adapt_pruner_jax.config import Prune, Ranking
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.models import model_config
from adapt_pruner_jax.pruning import one_width, surgery
from tests import small

CONFIG = small.CONFIG.with_units({"K": (4, 4, 4), "F": (40, 40, 40)})
GROUP, CHANNEL = (model_config.unit_cost(CONFIG, 0)[u] for u in "KF")


def even_scores():
  """Every unit costs 10 per parameter."""
  return {
    "K": np.full((3, 4), 10.0 * GROUP),
    "F": np.full((3, 40), 10.0 * CHANNEL),
  }


def choose(scores, remove, masks=None, prunable=None, cap=1.0, **fields):
  masks = masks or surgery.to_masks(surgery.everything(CONFIG), CONFIG)
  prunable = prunable or {u: np.ones(3, bool) for u in "KF"}
  settings = Prune(ranking=Ranking(cap=cap), **fields)
  aim = surgery.count(CONFIG, masks) - remove
  args = CONFIG, scores, masks, prunable, aim, settings
  found = one_width.choose(*args)
  return {u: n.tolist() for u, n in found.items()}


def test_the_pair_that_loses_least():
  scores = even_scores()
  for layer, unit in enumerate((3, 7, 0)):
    scores["F"][layer, unit] = 2.0 * CHANNEL
  scores["K"][:, 1] = [1.0 * GROUP, 1.0 * GROUP, 4.0 * GROUP]
  assert choose(scores, 1) == {"K": [0] * 3, "F": [1] * 3}
  assert choose(scores, 3 * CHANNEL) == {"K": [0] * 3, "F": [1] * 3}
  # Groups cost 2 a parameter here, a second channel 10.
  assert choose(scores, 3 * GROUP) == {"K": [1] * 3, "F": [0] * 3}
  found = choose(scores, 3 * GROUP + 1)
  assert found == {"K": [1] * 3, "F": [1] * 3}
  found = choose(scores, 3 * GROUP + 3 * CHANNEL + 1)
  assert found == {"K": [1] * 3, "F": [2] * 3}


def test_caps_blocks_and_layers_that_stay():
  scores = even_scores()
  # A quarter of each is no end that is met: both go as far as they may.
  assert choose(scores, 10**6, cap=0.25) == {"K": [1] * 3, "F": [10] * 3}
  found = choose(scores, 10**6, round_ffn_to=16)
  assert found == {"K": [3] * 3, "F": [24] * 3}  # 16 left
  scores["K"] *= 100
  found = choose(scores, 1, round_ffn_to=16)
  assert found == {"K": [0] * 3, "F": [8] * 3}  # 32 left
  first = {u: np.array([True, False, False]) for u in "KF"}
  found = choose(scores, 2 * CHANNEL, prunable=first)
  assert found == {"K": [0] * 3, "F": [2, 0, 0]}
  only = {"K": np.ones(3, bool), "F": np.zeros(3, bool)}
  found = choose(scores, 1, prunable=only)
  assert found == {"K": [1] * 3, "F": [0] * 3}


def test_layers_of_several_widths_are_refused():
  masks = surgery.to_masks(surgery.everything(CONFIG), CONFIG)
  masks["F"][0, 3] = False
  with pytest.raises(UserError, match="have 39, 40 MLP channels"):
    choose(even_scores(), 1, masks=masks)
