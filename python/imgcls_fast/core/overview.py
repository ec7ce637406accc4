"""A run in figures: one line of the list of runs, or everything that `runs show` shows."""

from __future__ import annotations

from typing import Any

from .diary import how_it_ended
from .errors import DataError
from .record import record_of
from .run import Run
from .settings import flatten


def brief(run: Run) -> dict[str, Any]:
    """One line of the list of runs: name, data, model, epochs, accuracy, split, created, finished, state.

    A run with a damaged file is listed all the same, with the error's code in place of its data.
    """
    line: dict[str, Any] = dict.fromkeys(("name", "data", "model", "epochs", "accuracy", "split"))
    try:
        data, planned = _object(run.read_json("data.json")), run.plan_facts or {}
        split = next((name for name in ("test", "val") if run.metrics(name)), None)
        metrics = run.metrics(split) if split else None
        line |= {
            "data": data.get("source"),
            "model": _object(planned.get("spec")).get("arch"),
            "epochs": len(run.epochs),
            "accuracy": metrics.get("accuracy") if metrics else None,
            "split": split,
        }
    except DataError as error:
        line["data"] = f"unreadable ({error.code})"
    return {**line, "name": run.name, "created": record_of(run.directory)["created"], "finished": run.finished, "state": run.state}


def details(run: Run) -> dict[str, Any]:
    """The brief, with settings, data, metrics of each split, epochs, efficiency and paths."""
    return {
        **brief(run),
        "directory": str(run.directory),
        "ended": how_it_ended(run.directory),
        **{name: value for name, value in record_of(run.directory).items() if name in ("parent", "part_of", "work")},
        "data_facts": run.read_json("data.json"),
        "settings": flatten(run.config),
        "baseline": run.read_json("baseline.json"),
        "metrics": {split: run.metrics(split) for split in ("val", "test") if run.metrics(split)},
        "efficiency": run.efficiency,
        "history": run.epochs,
        "report": str(run.report_path) if run.report_path.exists() else None,
    }


def _object(value: Any) -> dict[str, Any]:
    """The value where it is a JSON object, else an empty one."""
    return value if isinstance(value, dict) else {}
