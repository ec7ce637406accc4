"""Asking a model: one protocol, several runtimes."""
