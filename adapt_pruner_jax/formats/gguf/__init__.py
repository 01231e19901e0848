"""Files for llama.cpp.

writer  a model to a file, opened again and compared
vocab   the tokenizer of a file
"""
