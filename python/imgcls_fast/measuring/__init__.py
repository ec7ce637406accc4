"""Measures what this machine does with a run: whether engines agree, and how fast they are."""
