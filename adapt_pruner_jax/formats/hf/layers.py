"""Layers of unequal size in config.json, and biases that a class has not.

`per_layer_config` has the sizes of each layer, under the name by which
Transformers knows such a field from version 5.15 on.
"""

from typing import Any

from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.formats.hf import carried, kinds
from adapt_pruner_jax.formats.hf.families import FAMILIES
from adapt_pruner_jax.formats.hf.family import Family
from adapt_pruner_jax.formats.hf.fields import NONE, Raw, mapping, require
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.models.second_kinds import WideHeads

HEADS, GROUPS, WIDTH = SIZES = (
  "num_attention_heads",
  "num_key_value_heads",
  "intermediate_size",
)
# Of a layer: which halves it does not have.
SKIP, HALVES = "skip", ("attention", "mlp")
# Fields of such an export: sizes by layer, and the modules below a layer that
# have a bias that the family's class has not.
OWN = ("per_layer_config", "extra_biases")
BIASES = {"attention_bias", "mlp_bias", "attention_out_bias"}
BIASES |= {"use_qkv_bias", "use_bias"}
EXTRA_BIASES = {"o": "o_bias", "down": "down_bias"}
# Larger ones are damage, and would fill the memory before it shows.
MAX_LAYERS, MAX_SIZE = 10_000, 2**31 - 1


def is_stock(config: ModelConfig) -> bool:
  """Whether the family's class in Transformers can hold the model."""
  widths = config.ffn_widths
  widths = widths[:1] if carried.is_double(config) else widths
  modules = *groups_by_kind(config), widths
  if not all(len({*sizes}) == 1 and sizes[0] for sizes in modules):
    return False
  if extra_biases(config) or (config.wide and len({*config.heads()}) > 1):
    return False
  return heads_are_legal(config, config.most_groups(0))


def groups_by_kind(config: ModelConfig) -> list[tuple[int, ...]]:
  """KV groups of the layers of each kind, of the second if there are any."""
  pairs = [*zip(config.kv_groups, config.kinds(), strict=True)]
  by_kind = [tuple(k for k, here in pairs if here == kind) for kind in (0, 1)]
  return by_kind if any(config.kinds()) else by_kind[:1]


def heads_are_legal(config: ModelConfig, groups: int) -> bool:
  """Whether the family's config class takes this many KV groups."""
  heads, D = groups * config.queries_per_group, config.hidden_size
  # Phi 3 counts the factors of its rope so, Cohere 2 the channels of a head.
  longrope = config.rope.kind == "longrope" and config.family == "phi3"
  if longrope or config.family == "cohere2":
    return D // heads == config.head_dim
  # Whose `o`, or norms over all heads, are as if heads filled D.
  if config.family in ("gpt_neox", "helium", "olmoe", "stablelm"):
    return heads * config.head_dim == D
  return not FAMILIES[config.family].divides or D % heads == 0


def extra_biases(config: ModelConfig) -> list[str]:
  """Modules below a layer with a bias that the family's class has not."""
  family = FAMILIES[config.family]
  stock = read_biases(write_biases(config), family) | family.fixed
  return [
    family.module_of(matrix)
    for matrix, name in EXTRA_BIASES.items()
    if getattr(config, name) and not stock[name]
  ]


def read_biases(raw: Raw, family: Family) -> dict[str, bool]:
  """The fields of `ModelConfig` that say which matrices have a bias."""
  every = bool(raw.get("use_bias"))
  attention = every or bool(
    raw.get("attention_bias") or raw.get("use_qkv_bias")
  )
  mlp = every or bool(raw.get("mlp_bias"))
  extra = raw.get("extra_biases") or ()
  out = raw.get("attention_out_bias", attention and family.bias_of_o)
  return {
    "qkv_bias": attention,
    "o_bias": bool(out) or family.module_of("o") in extra,
    "gate_up_bias": mlp,
    "down_bias": mlp or family.module_of("down") in extra,
  }


def check_biases(raw: Raw, family: Family, path: str) -> None:
  """Raises a UserError unless `read_biases` can read them."""
  for name in BIASES & {*family.fields}:
    require(raw[name], (bool, NONE), name, path)
  extra = raw.get("extra_biases")
  require(extra, (list, NONE), "extra_biases", path)
  known = [family.module_of(matrix) for matrix in EXTRA_BIASES]
  for module in extra or ():
    if module not in known:
      raise UserError(
        f"{path}: extra_biases names {module}, which has none in "
        f"{family.module}; {' and '.join(known)} may have"
      )


def write_biases(config: ModelConfig) -> dict[str, bool]:
  """The inverse, in as far as the family's class has such fields."""
  known = FAMILIES[config.family].fields
  biases = {
    "attention_bias": config.qkv_bias,
    "mlp_bias": config.gate_up_bias,
    "attention_out_bias": config.o_bias,
    "use_qkv_bias": config.qkv_bias,
    "use_bias": config.qkv_bias and config.gate_up_bias,
  }
  return {name: on for name, on in biases.items() if name in known}


def with_sizes(raw: Raw, path: str) -> Raw:
  """The fields, with those of the whole model's sizes as numbers.

  Raises:
    UserError: a size is impossible.
  """
  raw = dict(raw)
  if raw[GROUPS] is None:
    raw[GROUPS] = raw[HEADS]
  for name in ("num_hidden_layers", "hidden_size", *SIZES):
    require(raw[name], (int,), name, path)
    largest = MAX_LAYERS if name == "num_hidden_layers" else MAX_SIZE
    if not 1 <= raw[name] <= largest:
      raise UserError(
        f"{path}: {name}={raw[name]} must be from 1 to {largest:,}"
      )
  return raw


def read_sizes(raw: Raw, family: Family, path: str) -> dict[str, Any]:
  """KV groups and MLP width of each layer, queries a group, head size.

  Args:
    raw: from `with_sizes` and `kinds.with_wide`.

  Raises:
    UserError: a size is missing or impossible, or heads do not divide evenly
      among the KV groups.
  """
  delta = kinds.read(raw, family, raw["num_hidden_layers"], path)
  net = kinds.read_net(raw, family, path)
  layers = _by_layer(raw, family, path)
  kinds.check(layers, delta, net, path)
  wide = kinds.read_wide(raw, family, layers, path)
  names = [kinds.KEYS if here else GROUPS for here in delta]
  names = names or [GROUPS] * len(layers)
  second = delta or wide or (0,) * len(layers)
  first = [i for i, here in enumerate(second) if not here]
  queries = _queries_per_group(layers, first, raw, path)
  wide_heads = None
  if any(wide):
    others = [i for i, here in enumerate(wide) if here]
    wide_heads = WideHeads(
      _queries_per_group(layers, others, raw, path),
      layers[others[0]][kinds.HEAD_DIM],
      not raw[kinds.K_IS_V],
    )
  head_dim = raw["head_dim"]
  if head_dim is None:
    head_dim = raw["hidden_size"] // raw[HEADS]
  require(head_dim, (int,), "head_dim", path)
  if not 1 <= head_dim <= MAX_SIZE:
    raise UserError(f"{path}: head_dim={head_dim} must be at least 1")
  return {
    "delta": delta if any(delta) else (),
    "delta_net": net,
    "wide": wide,
    "wide_heads": wide_heads,
    "kv_groups": tuple(
      layer[name] for layer, name in zip(layers, names, strict=True)
    ),
    "ffn_widths": tuple(layer[WIDTH] for layer in layers),
    "queries_per_group": queries,
    "head_dim": head_dim,
  }


def _by_layer(raw: Raw, family: Family, path: str) -> list[dict[str, int]]:
  """The sizes of each layer: its own, else those of the whole model."""
  named = SIZES + kinds.SIZES * family.delta
  named += (kinds.HEAD_DIM,) * family.wide
  layers = [{n: raw[n] for n in named} for _ in range(raw["num_hidden_layers"])]
  reuse = carried.reuses(raw, family, path)
  for i, sizes in enumerate(layers):
    sizes[WIDTH] = carried.width(raw, reuse, i, WIDTH)
  for key, sizes in mapping(raw, "per_layer_config", path).items():
    if not str(key).isdecimal() or int(key) >= len(layers):
      raise UserError(f"{path}: per_layer_config has no layer {key}")
    require(sizes, (dict,), f"per_layer_config.{key}", path)
    known = {family.renamed.get(name, name): name for name in named}
    skipped = _skipped(sizes, family, f"per_layer_config.{key}", path)
    sizes = {name: size for name, size in sizes.items() if name != SKIP}
    for name, size in sizes.items():
      if name not in known:
        raise UserError(
          f"{path}: per_layer_config.{key}.{name} is not supported; "
          f"{', '.join(known)} and {SKIP} are"
        )
      require(size, (int,), f"per_layer_config.{key}.{name}", path)
      if not 0 <= size <= MAX_SIZE:
        raise UserError(
          f"{path}: per_layer_config.{key}.{name}={size} must be from 0 to "
          f"{MAX_SIZE:,}"
        )
    own = {known[name]: size for name, size in sizes.items()}
    layers[int(key)] |= own | skipped
  return layers


def _skipped(
  sizes: Raw, family: Family, where: str, path: str
) -> dict[str, int]:
  """Sizes of the halves that a layer skips, in Transformers' words: 0."""
  skip = sizes.get(SKIP, [])
  if not isinstance(skip, list) or not {*map(str, skip)} <= {*HALVES}:
    raise UserError(
      f"{path}: {where}.{SKIP}={skip} is not supported; a list of "
      f"{' and '.join(HALVES)} is"
    )
  names: tuple[str, ...] = ()
  if "attention" in skip:
    names += (HEADS, GROUPS) + kinds.SIZES * family.delta
  if "mlp" in skip:
    names += (WIDTH,)
  return dict.fromkeys(names, 0)


def _queries_per_group(
  layers: list[dict[str, int]], which: list[int], raw: Raw, path: str
) -> int:
  """Query heads on each KV head, which layers of a kind must agree on.

  Args:
    which: layers are of this kind.
  """
  first = next((layers[i] for i in which if layers[i][GROUPS]), raw)
  queries = first[HEADS] // first[GROUPS]
  for i in which:
    heads, groups = layers[i][HEADS], layers[i][GROUPS]
    if not queries or heads != queries * groups:
      raise UserError(
        f"{path}: layer {i} has {heads} heads on {groups} key/value heads; "
        "each key/value head must serve the same number of heads, in all "
        f"layers{' of its kind' * (len(which) < len(layers))}"
      )
  return queries


def check_experts(values: dict[str, Any], path: str) -> None:
  """Raises a UserError unless each token can go to as many as it should."""
  if "experts" not in values:
    return
  experts, each = values["experts"], values["experts_per_token"]
  if not 1 <= each <= experts <= MAX_SIZE:
    raise UserError(
      f"{path}: {each} experts a token (num_experts_per_tok) of {experts} "
      "(num_experts, num_local_experts): there must be at least 1, and at "
      "least as many as a token takes"
    )
  for name in ("swiglu_limit", "swiglu_alpha", "shared_width"):
    if values.get(name, 1) <= 0:
      raise UserError(f"{path}: {name}={values[name]} must be above 0")


def write_sizes(config: ModelConfig) -> dict[str, Any]:
  """Sizes of the whole model and, where the layers differ, of each of them.

  A config class of Transformers insists that the former be possible in a model
  of equal layers.
  """
  if is_stock(config):
    # Of delta nets one group at least: a class wants it where there is none.
    groups = config.most_groups(0), max(config.most_groups(1), 1)
    sizes = _sizes(config, config.ffn_widths[0], *groups)
    return sizes | kinds.write_wide(config)
  digits = len(str(config.num_layers - 1))  # so that the keys sort
  own = FAMILIES[config.family].renamed
  layers = {}
  for i, K in enumerate(config.kv_groups):
    sizes = _sizes_of(config, i)
    # Halves of no size are skipped, since a class cannot make them; but for one
    # with a shared expert, which stays.
    gone = not K, not config.ffn_widths[i] and not config.shared_width
    skip = [half for half, is_gone in zip(HALVES, gone, strict=True) if is_gone]
    sizes = {
      own.get(name, name): size
      for name, size in sizes.items()
      if size or (name == WIDTH and not gone[1])
    }
    layers[str(i).zfill(digits)] = sizes | ({SKIP: skip} if skip else {})
  return {
    **_whole_sizes(config),
    "per_layer_config": layers,
    # The whole model's sizes may be read all the same, as its classes do.
    "allow_global_per_layer_attribute_access": True,
    "extra_biases": extra_biases(config),
  }


def _sizes_of(config: ModelConfig, layer: int) -> dict[str, int]:
  """Fields of the sizes of a layer."""
  groups, width = config.kv_groups[layer], config.ffn_widths[layer]
  if config.is_delta(layer):
    return {WIDTH: width} | kinds.sizes(config, groups)
  queries, head_dim = config.group(layer)
  sizes = {HEADS: groups * queries, GROUPS: groups, WIDTH: width}
  return sizes | ({kinds.HEAD_DIM: head_dim} if config.wide_heads else {})


def _sizes(
  config: ModelConfig, width: int, groups: int, delta: int
) -> dict[str, int]:
  """Those of the whole model: MLP width, KV groups, key heads of delta nets."""
  heads = {HEADS: groups * config.queries_per_group, GROUPS: groups}
  nets = kinds.sizes(config, delta) if config.delta_net else {}
  return heads | {WIDTH: width} | nets


def _whole_sizes(config: ModelConfig) -> dict[str, int]:
  """The largest sizes of a layer, or somewhat larger ones.

  Opened without our classes, tensors must not fit the family's own class, which
  fills in what is missing with random numbers and says so in a warning only:
  one size at least has to be another than in any layer that has that half.
  """
  D = config.hidden_size
  legal = [k for k in range(1, D + 1) if heads_are_legal(config, k)]
  groups = [k for k in legal if k >= config.most_groups(0)]
  kept = {*groups_by_kind(config)[0]} - {0}, {*config.ffn_widths} - {0}
  sizes = _sizes(
    config,
    max(*config.ffn_widths, 1),
    min(groups, default=1),
    max(config.most_groups(1), 1),
  )
  if not groups:  # no such model is legal; nobody computes with these
    sizes |= {HEADS: 1, GROUPS: 1}
  fits = kept[0] <= {sizes[GROUPS]} and kept[1] <= {sizes[WIDTH]}
  if fits and kept[1]:
    sizes[WIDTH] += 1
  elif fits:
    others = [k for k in legal if k not in kept[0]]
    groups = (others or [1])[-1]
    sizes |= {HEADS: groups * config.queries_per_group, GROUPS: groups}
  return sizes


def write_classes(family: Family, name: str) -> dict[str, Any]:
  """Where the classes are that make each layer to its size."""
  module = f"modeling_pruned_{family.model_type or name}"
  classes = {
    "AutoModel": family.model_class,
    "AutoModelForCausalLM": f"{family.prefix}ForCausalLM",
    **{f"AutoModelFor{task}": family.head_class(task) for task in family.heads},
  }
  return {
    "architectures": [f"Pruned{family.prefix}ForCausalLM"],
    "auto_map": {auto: f"{module}.Pruned{c}" for auto, c in classes.items()},
  }
