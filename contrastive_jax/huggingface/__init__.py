"""Folders of Hugging Face and sentence-transformers: families, weights, modules, tokenizers. Imports no jax."""
