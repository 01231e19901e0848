"""Any format to a pair (ModelConfig, params) and back.

opening: opens whatever can be read. convert: one format to another, or a pair
to a file. dtypes: in which dtype each parameter is written. orbax: our own
format, which holds every model, on any mesh. markdown: tables for model cards.
hf: HuggingFace directories. gguf: files for llama.cpp.
"""
