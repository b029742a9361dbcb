"""Encoders in Flax NNX."""
