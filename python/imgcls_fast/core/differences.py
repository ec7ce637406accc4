"""What is not the same in two runs: settings, data, figures and environment."""

from __future__ import annotations

from typing import Any

from .run import Run
from .settings import flatten

_FIGURES = ("n", "accuracy", "macro_f1", "balanced_accuracy", "roc_auc", "log_loss", "brier", "ece", "exact_match", "macro_ap")
_NOT_COMPARED = ("out", "data.source")  # places, not what was done; the source stands among the data
Row = dict[str, Any]


def differences(a: Run, b: Run) -> dict[str, list[Row]]:
    """What differs between two runs, as rows of name, a and b.

    Returns:
        settings, data, figures and environment; each empty where both are the same.

    Raises:
        DataError: D016 when a file of a run cannot be read.
    """
    parts = {"settings": _settings, "data": _data, "figures": _figures, "environment": _environment}
    return {name: _differing(part(a), part(b)) for name, part in parts.items()}


def _differing(a: Row, b: Row) -> list[Row]:
    names = dict.fromkeys((*a, *b))
    return [{"name": name, "a": a.get(name), "b": b.get(name)} for name in names if a.get(name) != b.get(name)]


def _settings(run: Run) -> Row:
    return {name: value for name, value in flatten(run.config).items() if name not in _NOT_COMPARED}


def _data(run: Run) -> Row:
    facts = run.read_json("data.json") or {}
    splits = {f"{split} images": n for split, n in (facts.get("splits") or {}).items()}
    counts = {f"images of {name}": n for name, n in (facts.get("counts") or {}).items()}
    named = {
        "source": "source",
        "images": "images",
        "quarantined": "quarantined",
        "duplicates_removed": "duplicates removed",
        "fingerprint": "fingerprint of files, labels and splits",
    }
    return {shown: facts.get(name) for name, shown in named.items()} | splits | counts


def _figures(run: Run) -> Row:
    epochs = run.epochs
    row: Row = {"state": run.state, "epochs trained": len(epochs)}
    row["seconds of training"] = round(sum(epoch.get("seconds") or 0 for epoch in epochs), 1)
    bundle = run.read_json("bundle/bundle.json") or {}
    row["best epoch"] = (bundle.get("provenance") or {}).get("epoch")
    row["parameters"] = (run.plan_facts or {}).get("parameters")
    row["temperature"] = bundle.get("temperature") or bundle.get("temperatures")
    row["thresholds"] = bundle.get("thresholds")
    baseline = run.read_json("baseline.json") or {}
    row["accuracy of the baseline"] = baseline.get("accuracy")
    for split in ("test", "val"):
        found = run.metrics(split) or {}
        row |= _judged(split, found)
        tasks = found.get("tasks") or {}
        for task, figures in tasks.items() if len(tasks) > 1 else ():  # of one alone they stand above
            row |= _judged(f"{split} {task}:", figures)
    return row


def _judged(whose: str, figures: Row) -> Row:
    return {f"{whose} {name.replace('_', ' ')}": figures.get(name) for name in _FIGURES}


def _environment(run: Run) -> Row:
    facts = dict(run.read_json("env.json") or {})
    libraries = facts.pop("libraries", None) or {}
    return {name: value for name, value in facts.items() if name not in ("command", "seed")} | libraries
