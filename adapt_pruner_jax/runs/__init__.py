"""Whole runs in a work directory, and comparisons of methods.

run              stages of prune, refit, recover, evaluate, save
inputs           what a run reads, opened before any work
recipe           whose work directory it is
state            what a run changes, in memory and in checkpoints
pruning_log      the decided steps of a prune under way
measure          perplexity, tasks and latency of a run's model
summary          summary.json, and the tables at the end
compare          several methods at equal budgets
compare_methods  the names that take part, and their settings
compare_table    the table, in Markdown too, and a plot
tiny_model       the model of `model.path=tiny`, made on first use
"""
