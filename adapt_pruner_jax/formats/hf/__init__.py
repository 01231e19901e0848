"""HuggingFace directories, read and written from the same tables.

families     a row for each family of models
fields       which fields of config.json mean what
config_json  config.json to a `ModelConfig` and back
tensors      where each parameter is in a checkpoint, and in which layout
files        files of a directory, found and mapped into memory
load         a directory or hub id to a pair
weights      safetensors files, written block by block
save         a pair to a directory
uniform      the same function with layers of one size, by zeros
reopen       a written directory opened again and compared
card         model card and SHA256SUMS
"""
