"""GGUF files, which llama.cpp runs: a model to a file and back.

- `layout.py`: names of tensors and their order of rows, for both ways.
- `writer.py`: writes a file, one tensor in memory, and opens it again.
- `vocab.py`: writes the tokenizer.
- `pre_tokenizers.py`: what llama.cpp's names of pre-tokenizers mean.
- `reader.py`: reads a file: its config, and its tensors dequantised.
- `tokenizer_json.py`: makes a tokenizer.json of a file's vocabulary.
- `directory.py`: a file as a HuggingFace directory, for all other rooms.
"""
