"""How much of the distillation's KL a cache of likeliest tokens keeps.

  python benchmarks/teacher_cache.py --teacher=DIR --student=DIR --text=FILE

For each `train.teacher_cache`: bytes of a token on disk, the loss over that of
the whole distribution, and the cosine between the two gradients by the logits;
over --windows windows of the text. Needs the pruned model's directory, as
`adapt-pruner run` leaves it.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from adapt_pruner_jax.data.tokenizer import load_tokenizer
from adapt_pruner_jax.distributed import sharding
from adapt_pruner_jax.formats.hf import load
from adapt_pruner_jax.models.decoder import Decoder
from adapt_pruner_jax.training import losses, teacher_cache

TEMPERATURE = 2.0  # as of the table in docs/accelerators.md
NUMBERS = (1, 4, 16, 32, 64, 128, 256, 1024)


def arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  for name in ("teacher", "student", "text"):
    parser.add_argument(f"--{name}", required=True)
  parser.add_argument("--windows", type=int, default=8)
  parser.add_argument("--tokens", type=int, default=256, help="of a window")
  return parser.parse_args()


@jax.jit
def distances(student_BTV: jax.Array, teacher_BTV: jax.Array) -> jax.Array:
  """[1 + NUMBERS, 2]: KL, and its gradient's cosine with the whole KL's."""
  weights_BT = jnp.ones(student_BTV.shape[:2])

  def whole(student):
    return losses.distillation(student, teacher_BTV, weights_BT, TEMPERATURE)[0]

  def cached(student, number):
    taught = losses.likeliest(teacher_BTV, number, TEMPERATURE)
    taught = taught._replace(log_probs_BTC=taught[1].astype(jnp.float16))
    return losses.distillation_by_likeliest(
      student, taught, weights_BT, TEMPERATURE
    )[0]

  kl, gradient = jax.value_and_grad(whole)(student_BTV)
  found = [(kl, 1.0)]
  for number in NUMBERS:
    one, other = jax.value_and_grad(cached)(student_BTV, number)
    norms = jnp.linalg.norm(other) * jnp.linalg.norm(gradient)
    found.append((one, jnp.vdot(other, gradient) / norms))
  return jnp.array(found)


def main() -> None:
  flags, mesh = arguments(), sharding.one_device()
  pairs = [
    load.load(path, None, mesh, "") for path in (flags.teacher, flags.student)
  ]
  with open(flags.text) as file:
    text = file.read()
  ids = load_tokenizer(Path(flags.teacher)).encode(text[: 40 * flags.tokens**2])
  rows_NT = np.array(ids[: flags.windows * flags.tokens], np.int32)
  rows_NT = rows_NT.reshape(-1, flags.tokens)
  total = 0
  for row_T in rows_NT:
    teacher, student = (
      jax.jit(lambda p, t, c=c: Decoder(c).apply({"params": p}, t)[0])(
        params, row_T[None]
      )
      for c, params in pairs
    )
    total += np.asarray(distances(student, teacher)) / len(rows_NT)
  kl = total[0, 0] / flags.tokens
  print(f"KL, temperature {TEMPERATURE}: {kl:.4f} nats a token")
  for number, (part, cosine) in zip(NUMBERS, total[1:], strict=True):
    size = teacher_cache.record(1, number).itemsize - 16
    share = part / total[0, 0]
    print(f"{number:5} {size:6} bytes  {share:.3f} of the KL  {cosine:.4f}")


if __name__ == "__main__":
  main()
