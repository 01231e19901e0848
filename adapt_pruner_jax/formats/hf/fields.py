"""Fields of config.json: which map to which of `ModelConfig`, and which do not
matter. Those that are neither are refused by name: a field that changes the
function must never be passed over.
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

from adapt_pruner_jax.errors import UserError, nearest

Raw = Mapping[str, Any]  # a parsed config.json
# Kinds of attention, as `layer_types` and `rope_parameters` name them.
FULL, SLIDING = "full_attention", "sliding_attention"


@dataclasses.dataclass(frozen=True)
class Field:
  """A field of config.json with one of `ModelConfig`, and the way both ways."""

  name: str  # in ModelConfig
  types: tuple[type, ...]  # in config.json
  read: Callable[[Any], Any] = lambda x: x
  write: Callable[[Any], Any] = lambda x: x


def tidy(x: float) -> int | float:
  """`x` as an int if it is one but for rounding."""
  return round(x) if abs(x - round(x)) < 1e-9 * max(1, abs(x)) else x


def _ids(value: int | list[int] | None) -> tuple[int, ...]:
  if value is None:
    return ()
  ids = tuple(value) if isinstance(value, list) else (value,)
  if not all(isinstance(i, int) for i in ids):
    raise TypeError("ids are integers")
  return ids


def _from(least: int) -> Callable[[Any], Any]:
  """Passes on what is at least so much."""

  def read(value: Any) -> Any:
    if value < least:
      raise ValueError(f"less than {least}")
    return value

  return read


def _from_ids(ids: tuple[int, ...]) -> int | list[int] | None:
  return list(ids) if len(ids) > 1 else (ids[0] if ids else None)


# Names in config.json; of two for the same function, the last is written.
ACTIVATIONS = {
  "swish": "silu",
  "silu": "silu",
  "gelu_new": "gelu_tanh",
  "gelu_fast": "gelu_tanh",
  "gelu_pytorch_tanh": "gelu_tanh",
  "gelu": "gelu",
  "relu": "relu",
  "relu2": "relu2",
  "xielu": "xielu",
}
ACTIVATION = Field(
  "activation",
  (str,),
  lambda name: ACTIVATIONS[name],
  lambda name: {v: k for k, v in ACTIVATIONS.items()}[name],
)
NONE = type(None)
NUMBER = (int, float)
SOFTCAP = {
  "types": (*NUMBER, NONE),
  "read": lambda cap: float(cap or 0),
  "write": lambda cap: cap or None,
}

FIELDS = {
  "vocab_size": Field("vocab_size", (int,)),
  "hidden_size": Field("hidden_size", (int,)),
  "rms_norm_eps": Field("norm_eps", NUMBER, lambda x: float(_from(0)(x))),
  "max_position_embeddings": Field("context", (int,), _from(1)),
  "tie_word_embeddings": Field("tied", (bool,)),
  "bos_token_id": Field("bos_id", (int, NONE)),
  "pad_token_id": Field("pad_id", (int, NONE)),
  "eos_token_id": Field("eos_ids", (int, list, NONE), _ids, _from_ids),
  "hidden_act": ACTIVATION,
  "hidden_activation": ACTIVATION,
  "use_parallel_residual": Field("parallel", (bool,)),
  # Experts
  "num_experts": Field("experts", (int,)),
  "num_experts_per_tok": Field("experts_per_token", (int,)),
  "norm_topk_prob": Field("router_norm", (bool,)),
  "router_aux_loss_coef": Field("router_loss", NUMBER, float),
  "output_router_logits": Field("router_loss_on", (bool,)),
  "shared_expert_intermediate_size": Field("shared_width", (int,)),
  "swiglu_limit": Field("swiglu_limit", NUMBER, float),
  "swiglu_alpha": Field("swiglu_alpha", NUMBER, float),
  "logit_scale": Field("logit_scale", NUMBER, float),
  # Gemma
  "query_pre_attn_scalar": Field(
    "attn_scale",
    NUMBER,
    lambda x: math.pow(x, -0.5),
    lambda scale: tidy(scale**-2),
  ),
  "attn_logit_softcapping": Field("attn_softcap", **SOFTCAP),
  "final_logit_softcapping": Field("final_softcap", **SOFTCAP),
  # Granite
  "attention_multiplier": Field("attn_scale", NUMBER, float),
  "embedding_multiplier": Field("embed_scale", NUMBER, float),
  "residual_multiplier": Field("residual_scale", NUMBER, float),
  "logits_scaling": Field(
    "logit_scale", NUMBER, lambda x: 1 / x, lambda scale: tidy(1 / scale)
  ),
}

# Passed over: bookkeeping, and what only training or `generate` reads.
_HARMLESS = """
  _attn_implementation _attn_implementation_autoset _commit_hash
  _flash_attn_2_enabled _name_or_path _sliding_window_pattern
  allow_global_per_layer_attribute_access architectures attention_dropout
  attention_probs_dropout_prob auto_map bad_words_ids begin_suppress_tokens
  cache_implementation chunk_size_feed_forward classifier_dropout
  decoder_start_token_id diversity_penalty do_sample dtype early_stopping
  embd_pdrop embedding_dropout encoder_no_repeat_ngram_size
  exponential_decay_length_penalty finetuning_task forced_bos_token_id
  forced_eos_token_id hidden_dropout hidden_dropout_prob id2label
  initializer_range is_decoder is_llama_config label2id length_penalty
  max_length min_length model_max_length model_type name_or_path
  neftune_noise_alpha no_repeat_ngram_size num_beam_groups num_beams num_labels
  num_return_sequences output_attentions output_hidden_states output_scores
  prefix pretraining_tp problem_type remove_invalid_values repetition_penalty
  resid_pdrop residual_dropout return_dict return_dict_in_generate sep_token_id
  suppress_tokens task_specific_params temperature tf_legacy_loss
  tie_encoder_decoder tie_last_hidden_states tokenizer_class top_k top_p
  torch_dtype torchscript transformers.js_config transformers_version typical_p
  unk_token_id unsloth_fixed unsloth_version use_bfloat16 use_cache
  use_parallel_embedding
"""
# Known to change the function when on; fine when off (0, false, null, empty).
_SWITCHES = """
  add_cross_attention alibi attention_bias cross_attention_hidden_size
  is_encoder_decoder layer_sharing lm_head_bias mlp_bias mrope num_experts
  num_local_experts parallel_attn pruned_heads qk_layer_norms qk_layernorm
  quantization_config rope_interleaved share_embedding sliding_window
  use_bidirectional_attention use_mrope use_qk_norm use_sliding_window
"""
# Fields that no class reads, with what may stand there: what is so anyway.
_TRUE_ANYWAY = {
  "activation": "swiglu",  # Falcon 3
  "normalization_function": "rmsnorm",  # Granite 4
  "attn_output_gate": True,  # Qwen 3.5, as the next one
  "output_gate_type": "swish",  # of its gated delta nets
  "full_attn_mod": 1,  # Phi 4 mini, as the next one
  "interpolate_factor": 1,
}
HARMLESS = frozenset(_HARMLESS.split())
SWITCHES = frozenset(_SWITCHES.split())


def check(raw: Raw, known: Collection[str], anyway: Raw, path: str) -> None:
  """Refuses fields that are neither known nor harmless.

  Args:
    known: fields that are read.
    anyway: fields that are not, with a value that stands for what is so anyway.

  Raises:
    UserError: names the field and how to ignore it.
  """
  for name, value in raw.items():
    if name in known or name in HARMLESS or value is None:
      continue
    if name in SWITCHES and not value:
      continue
    if {**_TRUE_ANYWAY, **anyway}.get(name) == value:
      continue
    shown = str(value) if len(str(value)) < 60 else f"{str(value)[:57]}..."
    kind = "is not supported" if name in SWITCHES else "is not known"
    raise UserError(
      f"{path}: the field {name}={shown} {kind} and may change what the model "
      f"computes{nearest(name, known)}; if you know that it does not, give "
      f"--ignore_fields={name} (of a recipe: "
      f"--config.model.ignore_fields={name})"
    )


def value(raw: Raw, name: str, path: str) -> Any:
  """What `ModelConfig` gets for field `name`, with its type checked.

  Raises:
    UserError: another type, or a value that is not supported.
  """
  field, found = FIELDS[name], raw[name]
  require(found, field.types, name, path)
  if field is ACTIVATION and found not in ACTIVATIONS:
    raise UserError(
      f"{path}: {name}={found} is not supported; "
      f"{' and '.join(ACTIVATIONS)} are"
    )
  try:
    return field.read(found)
  except (ZeroDivisionError, ValueError, TypeError) as error:
    raise UserError(f"{path}: {name}={found!r} makes no sense") from error


def require(found: Any, types: tuple[type, ...], name: str, path: str) -> None:
  """Raises a UserError unless `found` has one of `types`, and is finite."""
  good = isinstance(found, types)
  if isinstance(found, float) and not math.isfinite(found):
    raise UserError(f"{path}: {name}={found} must be finite")
  if isinstance(found, bool) and bool not in types:
    good = False
  if not good:
    allowed = " or ".join("null" if t is NONE else t.__name__ for t in types)
    raise UserError(f"{path}: {name}={found!r} must be {allowed}")


def by_period(found: Any, name: str, L: int, path: str) -> list[bool]:
  """For each layer whether it is none that comes after every so many.

  Args:
    found: how many layers there are from one such to the next.
    name: of its field.
    L: layers.

  Raises:
    UserError: no number of layers.
  """
  require(found, (int,), name, path)
  if found < 1:
    raise UserError(f"{path}: {name}={found} must be 1 or up")
  return [bool((i + 1) % found) for i in range(L)]


def layer_kinds(
  found: Any, allowed: Collection[str], L: int, path: str
) -> list[str]:
  """The kinds of L layers, of `layer_types`.

  Raises:
    UserError: it names fewer, or a kind that is not allowed.
  """
  if not isinstance(found, list) or len(found) < L:
    raise UserError(
      f"{path}: layer_types={found} must name the kinds of {L} layers: "
      f"{' or '.join(allowed)}"
    )
  for i, kind in enumerate(found[:L]):
    if kind not in allowed:
      raise UserError(
        f"{path}: layer {i} is of the kind {kind}, which is not supported; "
        f"{' and '.join(allowed)} {'are' if allowed[1:] else 'is'}"
      )
  return found[:L]


def mapping(raw: Raw, name: str, path: str) -> dict[str, Any]:
  """A field that is an object, or is absent or null."""
  found = raw.get(name)
  if found is None:
    return {}
  require(found, (dict,), name, path)
  return found
