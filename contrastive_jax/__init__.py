"""Contrastive pre-training of text encoders (CPT-text) in JAX."""
