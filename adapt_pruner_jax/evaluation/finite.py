"""Numbers that are none: what to do about them, in one line."""

from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.models.axes import Params


def not_finite(what: str, params: Params) -> UserError:
  """The error for results that are infinite or NaN.

  Args:
    what: the results, in the plural.
    params: of the model that gave them; float16 is the usual culprit.
  """
  dtype = params["embedding"].dtype
  if dtype == "float16":
    remedy = (
      "this model's activations go beyond float16's range of 65504: use "
      "--dtype=float32 or --dtype=bfloat16"
    )
  else:
    remedy = (
      "the model's weights are damaged or not finite: check the file it came "
      "from, or the training that made it"
    )
  return UserError(f"{what} are not finite in {dtype}: {remedy}")
