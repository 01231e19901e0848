"""What people see of a run.

log          the voice of a run: console, metrics.jsonl, TensorBoard, trackers
progress     how far a phase is, and numbers in a form for people
tensorboard  TensorBoard's event files
trackers     wandb and trackio, which continue a run's own run
trace        a profile of some train steps
html         the report of a work directory, one page
"""
