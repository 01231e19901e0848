"""Prunes language models to a parameter target (Adapt-Pruner, 2502.03460).

The Python API is `adapt_pruner_jax.api`; the command is `adapt-pruner`.
"""
