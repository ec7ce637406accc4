"""List, show, compare and remove runs, and examine the machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..core import runs as _runs
from ..core.overview import brief, details
from ..core.run import Run
from .common import RunLike, run_of


def list_runs() -> list[dict[str, Any]]:
    """The runs in the folder of runs, the oldest first: name, data, model, epochs, accuracy, split, created, finished, state."""
    return [brief(run) for run in _runs.list_runs()]


def show_run(run: RunLike = None) -> dict[str, Any]:
    """One run: its brief, configuration, data, metrics of each split, efficiency, epochs and paths."""
    return details(run_of(run))


def diff_runs(a: RunLike, b: RunLike) -> dict[str, Any]:
    """What differs between two runs, and whether the rows that both have answered tell them apart.

    Returns:
        a and b (names); settings, data, figures and environment (rows of name, a, b); test: the paired comparison of b with
        a on the test rows that both share (see `evaluation.paired.Difference`), None where they share none.

    Raises:
        UsageError: U003 for what is not a run.
    """
    from ..core.differences import differences

    first, second = run_of(a), run_of(b)
    return {"a": first.name, "b": second.name, **differences(first, second), "test": _paired(first, second)}


def _paired(a: Run, b: Run) -> dict[str, Any] | None:
    from ..evaluation.paired import compare

    if not all((run.evaluation("test") / "predictions.json").exists() for run in (a, b)):
        return None
    was, now = a.predictions("test"), b.predictions("test")
    if was.fingerprint != now.fingerprint or was.labels != now.labels:  # rows are numbers of one and the same list
        return None
    found = compare(was, now, a.manifest.group)
    return found.to_dict() if found else None


def remove_run(run: str | Path | Run) -> dict[str, Any]:
    """Delete a run for good: the files that a run has, and its folder if nothing else is in it; links are not followed.

    Returns:
        name, directory, left (names of somebody else's files, because of which the folder stays).

    Raises:
        UsageError: U003 for what is not a run, U002 for a link to one.
        HardwareError: H005 while another process writes it, H003 when something cannot be deleted.
    """
    found = run if isinstance(run, Run) else _runs.named_run(run)
    name = found.name
    return {"name": name, "directory": str(found.directory), "left": _runs.remove_run(found)}


def doctor() -> dict[str, Any]:
    """What this machine has: versions, compiled extension, GPU, loaders, disk.

    Returns:
        {"sections": [(name, [(item, value, ok, hint), ...]), ...]}
    """
    from ..measuring.doctor import examine_machine

    return {"sections": examine_machine()}
