"""Cleaning: near-duplicates, evaluation texts, and filters."""
