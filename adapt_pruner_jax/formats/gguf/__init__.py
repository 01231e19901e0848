"""GGUF files, which llama.cpp runs: a model to a file and back.

layout          names of tensors and their order of rows, for both ways
writer          writes a file, one tensor in memory, and opens it again
vocab           writes the tokenizer
pre_tokenizers  what llama.cpp's names of pre-tokenizers mean
reader          reads a file: its config, and its tensors dequantised
tokenizer_json  makes a tokenizer.json of a file's vocabulary
directory       a file as a HuggingFace directory, for all other rooms
"""
