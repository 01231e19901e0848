"""Text to tokens to batches.

sources      where text comes from: files, hubs, the embedded text
tokenizer    text or a chat to token ids
token_store  a source as one stream of tokens, in memory or kept on disk
packing      rows of training, and held-out tokens
calibration  windows that pruning and refit look at
"""
