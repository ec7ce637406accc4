"""Judges a model from its Predictions alone: metrics, plots and the report."""
