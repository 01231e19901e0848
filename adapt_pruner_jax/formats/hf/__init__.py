"""HuggingFace directories: read, and written so that Transformers opens them.

load: finds a model and puts it on devices. parameters: one in its file. shares:
of many processes each reads its share. save: writes a directory. reopen: opens
what was written and compares it. files: the files of a directory,
checked. weights: writes safetensors. tensors: where each parameter is in them,
and in which layout. config_json: config.json, with its parts in fields (single
fields), layers (sizes by layer, biases), carried (what layers share, and are
told of tokens), kinds (attention, or a gated delta
net), ropes and windows. families: one row of a table for each family, continued
in more_families and, with experts, in expert_families (of the kind family;
defaults and tensor_names are what rows share). text_part: the language model of
a multimodal one. fp8: weights in eight bits. mxfp4: in four. turned: experts
whose matrices lie the other way round. apart: experts that are in one tensor.
uniform: layers padded to one size. parent_files: tokenizer and licence.
cut_vocabulary: a model with some of its tokens, by a link to the original.
generation_config: what ends an answer. card: the model card and SHA256SUMS.
modeling.py.template, head.py.template: the classes that go along with layers of
unequal size.
"""
