"""Text to tokens to batches.

Reads what people have and hands out arrays: windows for calibration, packed
rows for training, held-out tokens for evaluation. A batch is a function of its
step, so a run continues anywhere, on any number of processes. docs/data.md is
for those who bring the data.

  sources        what a source is, and the documents in it
  files          text, JSON lines, parquet, packed, in folders, by pattern
  hub            rows of the packages datasets and tensorflow-datasets
  prompts        what a dense model is asked, of a file or of ours
  rows           the forms that a row may have, as a text or a chat
  chat_template  a chat as text, and where in it the assistant speaks
  tokenizer      text or a chat to token ids
  vocabulary     which tokens stay, and the tokenizer of them alone
  encoding       groups of documents as arrays of ids, on one core or many
  shards         a part of a stream in a file, complete or absent
  token_store    a source as one stream of tokens, kept on disk
  packing        streams as rows of one length, in a random order
  order          the same of long streams, which each host reads in runs
  overlap        texts that are in one another
  calibration    windows of streams, or what a file gives
  tuning_questions   questions with choices, by which a quality is kept
"""
