"""What of JAX's private interfaces the package uses: this says what breaks."""

import ast
import inspect
import pathlib

import adapt_pruner_jax
from adapt_pruner_jax.distributed import processes

ROOT = pathlib.Path(adapt_pruner_jax.__file__).parent


def test_the_client_of_jax_has_barriers():
  state = processes.distributed.global_state
  for name in ("client", "process_id", "coordinator_address"):
    assert hasattr(state, name), f"jax._src.distributed.State has no {name}"
  from jax._src.lib import _jax

  client = _jax.DistributedRuntimeClient
  for name in ("set", "dir_get"):
    assert callable(getattr(client, f"key_value_{name}"))
  assert callable(client.blocking_key_value_get)
  assert callable(client.wait_at_barrier)


def test_cudnn_takes_packed_rows():
  """By the names that `models.cudnn` calls it with."""
  from jax._src.cudnn import fused_attention_stablehlo as private

  names = inspect.signature(private.dot_product_attention).parameters
  assert [*names][:9] == [
    *("query", "key", "value", "bias", "mask"),
    *("q_seqlen", "kv_seqlen", "q_offsets", "kv_offsets"),
  ]
  assert {"scale", "mask_type", "sliding_window_length"} <= {*names}
  assert {"CAUSAL", "PADDING_CAUSAL"} <= {*private.MaskType.__members__}


def test_private_names_are_used_in_two_places():
  found = set()
  for file in ROOT.rglob("*.py"):
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
      if isinstance(node, ast.ImportFrom) and node.module:
        names = [node.module]
      elif isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
      else:
        continue
      if any(n == "jax._src" or n.startswith("jax._src.") for n in names):
        found.add(file.name)
  assert found == {"processes.py", "cudnn.py"}


def test_no_handler_runs_in_a_process_that_crashes():
  text = (ROOT / "distributed" / "processes.py").read_text()
  assert "ctypes" not in text
  assert "import signal" not in text
