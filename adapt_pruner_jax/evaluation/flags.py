"""The flags of `adapt-pruner evaluate`.

Apart from `evaluate`, so that a wrong flag does not wait for JAX's import.
"""

from absl import flags


def define_flags(values: flags.FlagValues) -> None:
  """Adds what is measured, of which model, and where the result goes."""
  text, numbers = flags.DEFINE_string, flags.DEFINE_integer
  text("model", None, "a directory or hub id", flag_values=values)
  text("tasks", "perplexity", "perplexity, latency, tasks", flag_values=values)
  text("text", "", "text file for the perplexity", flag_values=values)
  text("baseline", "", "a second model to compare with", flag_values=values)
  text("dtype", "float32", "of the arithmetic", flag_values=values)
  text("out", "", "JSON file for the result", flag_values=values)
  text(
    "bos",
    "auto",
    "auto: windows of the perplexity start with the begin token, where the "
    "tokenizer adds one; none: without",
    flag_values=values,
  )
  numbers("seq_len", 0, "tokens a window; 0 = context", flag_values=values)
  numbers("batch", 8, "rows at a time", flag_values=values)
  _define_questions(values)


def _define_questions(values: flags.FlagValues) -> None:
  """How tasks are asked, `questions.Questions`."""
  text, numbers = flags.DEFINE_string, flags.DEFINE_integer
  yes = flags.DEFINE_bool
  text("tasks_dir", "", "jsonl files of the questions", flag_values=values)
  yes(
    "trust_tasks_dir",
    False,
    "let YAML files in --tasks_dir run their Python",
    flag_values=values,
  )
  numbers("limit", 0, "questions a task; 0 = all", flag_values=values)
  numbers(
    "num_fewshot",
    None,
    "examples shown; default the task's",
    flag_values=values,
  )
  yes(
    "apply_chat_template",
    False,
    "ask as a chat, by the tokenizer's template",
    flag_values=values,
  )
  text("system_instruction", "", "said before all else", flag_values=values)
  yes(
    "fewshot_as_multiturn",
    None,
    "examples as turns of the chat; default with --apply_chat_template",
    flag_values=values,
  )
