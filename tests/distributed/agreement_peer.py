"""One of several processes of agreement_test.py: python FILE PORT N ID."""

import json
import sys
import time

import numpy as np

from adapt_pruner_jax.distributed import agreement, processes, stopping
from adapt_pruner_jax.errors import StoppedError, UserError


def message(action) -> str:
  try:
    action()
  except (UserError, StoppedError) as error:
    return f"{type(error).__name__}: {error}"
  return ""


def refuse(kind):
  def action():
    raise kind("asked" if kind is StoppedError else "no such file")

  return action


def main(port: str, number: str, me: str) -> dict:
  processes.connect(f"127.0.0.1:{port}", int(number), int(me), 60)
  me = int(me)
  mine = {
    "scores": np.array([1 / 3, np.pi]) * (1 + me * 2**-52),
    "masks": {"K": np.array([[True, me == 0]])},
    "number": 2**40 + me,
    "loss": 0.1 + me,
  }
  got = agreement.from_writer(mine)
  found = {
    "scores": got["scores"].tobytes().hex(),
    "masks": got["masks"]["K"].tolist(),
    "numbers": [got["number"], got["loss"]],
    "same": agreement.same({"words": "é" * (100 * me + 1), "null": None}),
    "decided": agreement.decided(lambda: {"me": me}),
    "refused": message(lambda: agreement.decided(refuse(UserError))),
    "stopped": message(lambda: agreement.on_writer(refuse(StoppedError))),
  }
  agreement.require_same({"recipe": {"a": 1, "b": 2}}, "at the start")
  facts = {"recipe": {"seed": me == 2}, "masks": [1], "model": me == 3}
  found["differs"] = message(
    lambda: agreement.require_same(facts, "behind stage 1")
  )
  found["step"] = stop_together(me)
  processes.meet()
  return found


def stop_together(me: int) -> int:
  """Each step takes all of them, and one is asked in the middle."""
  with stopping.stop_signals() as asked:
    for step in range(10_000):
      if asked.now():
        return step
      if me == 1 and step == 20:
        asked.ask()
      time.sleep(0.002 * (me + 1))
      if step % 5 == 0:
        agreement.all_agree(True)  # none is far ahead
  return -1


if __name__ == "__main__":
  print("found " + json.dumps(main(*sys.argv[1:])))
