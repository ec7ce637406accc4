"""Prepares what the report shows of tasks: a section for each, and means over them at the head."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..core.figures import Figure, usual_figures
from ..core.labels import THRESHOLD
from ..core.predictions import Predictions
from . import plots as draw
from .metrics import Metrics
from .multilabel import AnyOfMetrics, LabelMetrics
from .tasks import TaskMetrics
from .thumbnails import ReadImage, thumbnail

MAX_TILES = 24
_OF_A_CLASS = 4  # mistakes
_PICTURES = {
    "co_occurrence": "Classes that hold together, and classes that are answered together",
    "confusion": "Confusion matrix: rows are true classes, columns are predictions",
    "roc": "ROC curves of each class against the rest",
    "precision_recall": "Precision against recall for each class",
    "reliability": "Reliability diagram",
    "coverage": "Accuracy against the share of rows that are answered",
}


def file_names(tasks: Sequence[str]) -> list[str]:
    """A part of a file name for each task, no two alike; "" for a task alone."""
    if len(tasks) == 1:
        return [""]
    plain = [re.sub(r"[^\w-]+", "_", name, flags=re.ASCII).strip("_")[:40].lower() or "task" for name in tasks]
    return [f"{name}_{k + 1}" if plain.count(name) > 1 else name for k, name in enumerate(plain)]


def task_plots(predictions: Predictions, metrics: TaskMetrics) -> dict[str, bytes]:
    """Every picture of one judged split; with several tasks, names begin with that of the task."""
    found = {}
    for (name, own), begins in zip(_judged(predictions, metrics), file_names(list(metrics.tasks)), strict=True):
        for kind, picture in draw.judgement_plots(own, metrics.tasks[name]).items():
            found[f"{begins}_{kind}" if begins else kind] = picture
    return found


def alternatives(pictures: Sequence[str], metrics: TaskMetrics) -> dict[str, str]:
    """A description of each picture of `task_plots`."""
    names = dict(zip(file_names(list(metrics.tasks)), metrics.tasks, strict=True))
    found = {}
    for picture in pictures:
        kind = next((kind for kind in _PICTURES if picture.endswith(kind)), "")
        task = names.get(picture.removesuffix(kind).rstrip("_"), "")
        found[picture] = f"{task}: {_PICTURES.get(kind, picture)}" if len(names) > 1 else _PICTURES.get(kind, picture)
    return found


def task_context(predictions: Predictions, metrics: TaskMetrics, read: ReadImage, baseline: Mapping[str, Any] | None) -> dict[str, Any]:
    """What the template needs of a judged split: head, cards and a section per task."""
    ranked = any(isinstance(one, AnyOfMetrics) for one in metrics.tasks.values())
    names = file_names(list(metrics.tasks))
    shared = "mean of the tasks" if len(metrics.tasks) > 1 else "mean share of right labels"
    return {
        "head": _head(metrics, ranked, baseline),
        "cards": [
            figure_card(figure, metrics, f", {shared}" if figure.name == "accuracy" else "")
            for figure in sorted(usual_figures(single=False), key=lambda one: not one.more_is_better)
            if figure.name != ("macro_ap" if ranked else "accuracy")
        ],
        "sections": [
            _section(name, begins, own, metrics.tasks[name], read)
            for (name, own), begins in zip(_judged(predictions, metrics), names, strict=True)
        ],
    }


def figure_card(figure: Figure, metrics: Metrics | TaskMetrics, more: str = "") -> dict[str, Any]:
    """One figure as the page shows it."""
    return {"value": figure.value(metrics), "percent": figure.percent, "words": figure.words + more}


def _judged(predictions: Predictions, metrics: TaskMetrics) -> list[tuple[str, Predictions]]:
    return [
        (task.name, predictions.of_task(k)) for k, task in enumerate(predictions.labels.tasks) if task.name in metrics.tasks
    ]


def _head(metrics: TaskMetrics, ranked: bool, baseline: Mapping[str, Any] | None) -> dict[str, Any]:
    """The large figure: mean average precision where any number of classes may hold, else the mean accuracy of the tasks."""
    if ranked:
        chance = [_chance(one) for one in metrics.tasks.values()]
        name, value, interval, guess = "Mean average precision", metrics.macro_ap, metrics.macro_ap_ci, "random scores"
        other = None if baseline is None else baseline.get("macro_ap")
    else:
        chance = [one.majority.accuracy for one in metrics.tasks.values() if isinstance(one, Metrics)]
        name, value, interval, guess = "Mean accuracy of the tasks", metrics.accuracy, metrics.accuracy_ci, "largest classes"
        other = None if baseline is None else baseline.get("accuracy")
    return {"name": name, "value": value, "interval": interval, "guess": guess, "chance": float(np.mean(chance)), "baseline": other}


def _chance(one: Metrics | AnyOfMetrics) -> float:
    """Mean average precision of random scores: the mean share of rows in which a class holds."""
    shares = [c.support / (c.known if isinstance(one, AnyOfMetrics) else one.n) for c in one.per_class if c.support]  # type: ignore[union-attr]
    return float(np.mean(shares)) if shares else float("nan")


def _section(
    name: str, begins: str, own: Predictions, metrics: Metrics | AnyOfMetrics, read: ReadImage
) -> dict[str, Any]:
    plot = f"{begins}_" if begins else ""
    shared = {"name": name, "plot": plot, "metrics": metrics, "kind": metrics.kind}
    if isinstance(metrics, AnyOfMetrics):
        rows = sorted(metrics.per_class, key=_weakness)
        wrong = int((own.answers != _true(own))[~np.isnan(own.targets)].sum())  # type: ignore[arg-type]
        return shared | {"rows": rows, "mistakes": _label_mistakes(own, metrics, read), "wrong": wrong}
    by_f1 = sorted(metrics.per_class, key=lambda c: (c.support == 0, c.f1))
    return shared | {"rows": by_f1, "mistakes": _class_mistakes(own, read), "wrong": int((own.truth != own.predicted).sum())}


def _weakness(one: LabelMetrics) -> tuple[bool, float]:
    """Sorts the weakest class first, and those that hold nowhere last."""
    return not one.support, one.average_precision


def _true(own: Predictions) -> np.ndarray:
    return np.asarray(own.targets) >= THRESHOLD


def _label_mistakes(own: Predictions, metrics: AnyOfMetrics, read: ReadImage) -> list[dict[str, Any]]:
    """For each class, the weakest first: images in which it was missed or invented, the surest mistakes first."""
    found: list[dict[str, Any]] = []
    answers, true = own.answers, _true(own)
    order = sorted(range(len(metrics.classes)), key=lambda k: _weakness(metrics.per_class[k]))
    for k in order:
        known = ~np.isnan(np.asarray(own.targets)[:, k])
        wrong = np.flatnonzero(known & (answers[:, k] != true[:, k]))
        sure = np.where(true[wrong, k], 1 - own.scores[wrong, k], own.scores[wrong, k])
        for i in wrong[np.argsort(-sure, kind="stable")][:_OF_A_CLASS]:
            if len(found) == MAX_TILES:
                return found
            said = f"missed, {own.scores[i, k]:.0%}" if true[i, k] else f"claimed, {own.scores[i, k]:.0%}"
            truth = ", ".join(name for name, holds in zip(metrics.classes, true[i], strict=True) if holds) or "none"
            found.append(_tile(own, i, read, metrics.classes[k], said, truth))
    return found


def _class_mistakes(own: Predictions, read: ReadImage) -> list[dict[str, Any]]:
    wrong = np.flatnonzero(own.truth != own.predicted)
    order = wrong[np.argsort(-own.confidence[wrong], kind="stable")][: MAX_TILES // 2]
    names = own.labels.classes
    return [
        _tile(
            own,
            i,
            read,
            names[own.predicted[i]],
            f"{own.confidence[i]:.0%}",
            f"{names[own.truth[i]]}, {own.scores[i, own.truth[i]]:.0%}",
        )
        for i in order
    ]


def _tile(own: Predictions, i: int, read: ReadImage, name: str, said: str, truth: str) -> dict[str, Any]:
    return {"path": own.paths[i], "name": name, "said": said, "truth": truth, "picture": thumbnail(read(own.paths[i]))}
