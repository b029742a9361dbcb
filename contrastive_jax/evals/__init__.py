"""Evaluations: one file per task, one table of tasks, results with the protocol that decided them."""
