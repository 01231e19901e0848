"""How good and how fast a model is.

evaluate       the command: perplexity, tasks, latency, a baseline beside it
perplexity     loss of each token in windows of a text
generate       text from a model: prefill, decode
latency        times of prefill and decode on this device
lm_eval_model  the pair as a model of lm-eval
lm_eval_tasks  presets of tasks, and questions from local files
lm_eval_run    scores of tasks, and how two models differ
"""
