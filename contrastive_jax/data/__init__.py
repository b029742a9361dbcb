"""From raw text to batches of token spans; nothing here imports jax."""
