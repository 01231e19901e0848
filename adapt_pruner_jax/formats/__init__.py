"""Any format of a model to a pair, and back.

opening   a model in any format that can be read
convert   a model written in any format
orbax     our own format, on any mesh
markdown  tables in Markdown
hf        HuggingFace directories
gguf      files for llama.cpp
"""
