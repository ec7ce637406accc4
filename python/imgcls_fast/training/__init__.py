"""Fitting a model: plan, loop, checkpoints."""
