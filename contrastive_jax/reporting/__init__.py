"""The report: training runs and results of evaluations on one HTML page."""
