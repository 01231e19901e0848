"""Recovery: a pruned model learns again.

step       one train step: full, distilled, or LoRA
forward    rows to the stream behind the final norm
loop       the steps of a stage, each loss checked
stacking   which layers are stacked and scanned over, and trees there and back
lora       low-rank adapters, and merging them
losses     next-token and distillation losses, as sums
output_loss  the same behind the output matrix, in chunks of tokens
output_matrix  that matrix, cut along V over all devices
teacher_cache  a teacher's likeliest tokens, on disk
memory     what a step needs of a device, and what it therefore recomputes
optimizer  AdamW, the learning rate, and how its state is cut
"""
