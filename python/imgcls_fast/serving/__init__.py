"""Trained models as services."""
