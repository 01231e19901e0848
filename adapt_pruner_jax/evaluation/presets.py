"""Names that stand for several tasks, and which metric of each counts."""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Preset:
  """A set of tasks and the metric of each that its plain mean is taken of."""

  metrics: Mapping[str, str]
  num_fewshot: int | None = None  # None = as in the task


PRESETS = {
  "commonsense": Preset(
    dict.fromkeys(
      ("arc_easy", "arc_challenge", "hellaswag", "openbookqa", "piqa"),
      "acc_norm",
    )
    | dict.fromkeys(("winogrande", "social_iqa"), "acc")
  ),
  "mmlu": Preset({"mmlu": "acc"}, num_fewshot=5),
  "wikitext": Preset({"wikitext": "word_perplexity"}),
  "truthfulqa": Preset({"truthfulqa_mc1": "acc", "truthfulqa_mc2": "acc"}),
  "agieval": Preset({"agieval": "acc"}),
}
