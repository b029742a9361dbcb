"""Compiles a train step for hardware that is not present: memory, speed, what fits."""
