"""Preparing a dataset: stages of tasks whose whole state is in files."""
