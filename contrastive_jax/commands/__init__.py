"""The commands of `python -m contrastive_jax`: flags and exit status, nothing else. Nothing imports them."""
