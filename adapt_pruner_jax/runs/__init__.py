"""Whole runs in a work directory, and comparisons of methods.

run              a run, read top to bottom: prune, refit, recover, evaluate,
                 save
inputs           what a run reads, opened before any work
attention        which implementations it takes, said at its start
room             devices that cannot hold it are refused before any work
fingerprints     what a run depends on, in a few bytes
answers          prompts that the dense model answers first, and where they are
text_checks      texts that overlap, or are too short
vocabulary       the tokens that stay, where the recipe cuts some
state            what a run has done, in memory and on disk
prune_once       one prune with its refit
deadline         when training ends, if the recipe says hours
stages           what a stage of a run ends at
export_size      files whose bytes are limited
latency_budget   milliseconds: the table, and the finished model against it
budget_results   what a budget holds in the end
recovery         a stage's training, compiled ahead in a thread
measure          perplexity, tasks and latency of a run's model
recipe           whose work directory it is, and what --overwrite removes
summary          summary.json, and the tables at the end
compare          several methods at equal budgets
compare_methods  the names that take part, and their settings
compare_table    the table, in Markdown too, and a plot
tokenize         fills the cache of tokens before a run needs them
tiny_model       the model of `model.path=tiny`, made on first use
"""
