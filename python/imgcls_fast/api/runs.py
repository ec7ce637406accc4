"""List and show runs, and examine the machine."""

from __future__ import annotations

from typing import Any

from ..core import runs as _runs
from .common import RunLike, run_of


def list_runs() -> list[dict[str, Any]]:
    """The runs in the folder of runs, the oldest first: name, data, model, epochs, accuracy, split, created, finished."""
    return [run.brief() for run in _runs.list_runs()]


def show_run(run: RunLike = None) -> dict[str, Any]:
    """One run: its brief, configuration, data, metrics of each split, efficiency, epochs and paths."""
    return run_of(run).details()


def doctor() -> dict[str, Any]:
    """What this machine has: versions, compiled extension, GPU, loaders, disk.

    Returns:
        {"sections": [(name, [(item, value, ok, hint), ...]), ...]}
    """
    from ..training.doctor import examine_machine

    return {"sections": examine_machine()}
