"""Recovery: a pruned model learns again.

step       one train step: full, distilled, or LoRA
loop       the steps of a stage, each loss checked
lora       low-rank adapters, and merging them
losses     next-token and distillation losses, as sums
optimizer  AdamW, the learning rate, and how its state is cut
"""
