"""Measurements of the figures in README and docs: `python -m benchmarks.NAME --help` in a checkout."""
