"""How good a model is: numbers about a pair (ModelConfig, params).

evaluate        all that `adapt-pruner evaluate` is asked, in one dict
perplexity      of a text, by token, word and byte
flags           those of the command
questions       how tasks are asked: examples, chats, local files
lm_eval_run     lm-eval's tasks on a model, presets, how two models differ
presets         names that stand for several tasks
lm_eval_tasks   which tasks there are, and questions out of local files
lm_eval_trust   what YAML out of somebody's folder may do
lm_eval_private the one use of lm-eval's inside
lm_eval_model   the pair as a model of lm-eval
lm_eval_words   its texts and chats as token ids
scoring_rows    rows in which a question's choices share its context
generate        new tokens, with a cache of keys and values
continuation    what a model says behind a prompt, for the command
answers         the dense model's own answers to prompts, written and kept
answer_agreement  how alike another model answers
latency         how long tokens take
profile         a table of it by widths, for a budget
phases          who is told how far an evaluation is
finite          what to do where a result is no number

Only the lm_eval files need lm-eval; it is imported when a task is asked.
"""
