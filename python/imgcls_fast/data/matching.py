"""Numbers the labels of other data as a model numbers its own, where an image may have several."""

from __future__ import annotations

import numpy as np

from ..core.labels import LabelSpace, Task
from ..core.text import some
from .draft import Draft
from .listing import Problem
from .unknown import about_unknown, meant_by

_SHOWN = 10


def match_tasks(draft: Draft, labels: LabelSpace) -> None:
    """Number the answers of `draft` as `labels` does; what it does not know is left out, and noted.

    A class of an `any_of` task that the model does not know is ignored. Where it may be one of the model's, misspelt, that one
    is unknown in these images.
    """
    given = {task.name: k for k, task in enumerate(draft.tasks)}
    if len(draft.tasks) == len(labels.tasks) == 1:
        given = {labels.tasks[0].name: 0}
    good = draft.files.good()
    answers, lacking = [], []
    for task in labels.tasks:
        k = given.get(task.name)
        if k is None:
            lacking.append(task.name)
            answers.append(_nothing(task, len(draft.listing.paths)))
        elif draft.tasks[k].kind != task.kind:
            draft.problems.append(_other_kind(draft, task))
            answers.append(_nothing(task, len(draft.listing.paths)))
        else:
            answers.append(_numbered(draft, k, task, good))
    if lacking and len(lacking) == len(labels.tasks):
        draft.problems.append(_no_task(draft, labels))
    elif lacking:
        draft.notices.append(f"{draft.source} has no labels for {some(lacking)}: these are not judged")
    draft.tasks, draft.answers = list(labels.tasks), answers


def _nothing(task: Task, n: int) -> np.ndarray:
    return np.full(n if task.kind == "one_of" else (n, len(task.classes)), -1, np.int32 if task.kind == "one_of" else np.int8)


def _numbered(draft: Draft, k: int, task: Task, good: np.ndarray) -> np.ndarray:
    """The answers to one task, with the model's numbers."""
    classes, old = draft.tasks[k].classes, draft.answers[k]
    place = {name: i for i, name in enumerate(task.classes)}
    held = (np.nan_to_num(old[good]) > 0).sum(0) if old.dtype.kind == "f" else draft.counts(k, good)
    unknown = {name: int(n) for name, n in zip(classes, held, strict=True) if name not in place and n}
    for name, n in unknown.items():
        draft.unknown[name] = draft.unknown.get(name, 0) + n
    if task.kind == "one_of":
        draft.notices += [about_unknown(unknown, task.classes)] if unknown else []
        if old.ndim == 1:
            return np.array([place.get(name, -1) for name in classes] + [-1], np.int32)[old]
        return _soft(old, classes, place)
    draft.notices += [about_unknown(unknown, task.classes, ignored=True)] if unknown else []
    return _several(draft, k, place, meant_by(list(unknown), task.classes))


def _soft(old: np.ndarray, classes: tuple[str, ...], place: dict[str, int]) -> np.ndarray:
    """Probabilities in the model's order; a row that gives some to another class is unknown."""
    new = np.zeros((len(old), len(place)), np.float32)
    for i, name in enumerate(classes):
        if name in place:
            new[:, place[name]] = old[:, i]
        else:
            new[np.nan_to_num(old[:, i]) > 0] = np.nan
    new[np.isnan(old).any(1)] = np.nan
    return new


def _several(draft: Draft, k: int, place: dict[str, int], meant: dict[str, str]) -> np.ndarray:
    classes, old = draft.tasks[k].classes, draft.answers[k]
    soft = old.dtype.kind == "f"
    nothing = np.nan if soft else -1
    gone = np.isnan(old).all(1) if soft else (old < 0).all(1)
    complete = not draft.listing.tasks or draft.listing.tasks[k].complete
    new = np.full((len(old), len(place)), 0 if complete else nothing, old.dtype)
    for i, name in enumerate(classes):
        if name in place:
            new[:, place[name]] = old[:, i]
    for name, other in meant.items():
        doubtful = (np.nan_to_num(old[:, classes.index(name)]) > 0) & ~(new[:, place[other]] > 0)
        new[doubtful, place[other]] = nothing
    new[gone] = nothing
    return new


def _other_kind(draft: Draft, task: Task) -> Problem:
    names = some(task.classes, _SHOWN, " and {:,} more")
    theirs = "one class per image" if task.kind == "any_of" else "several classes per image"
    ours = f"which of {names} hold" if task.kind == "any_of" else f"which one of {names} holds"
    return Problem(
        "D014",
        "labels of another kind",
        f"{draft.source} gives {theirs}, and the model answers {ours}",
        why=f"the two cannot be compared for {task.name!r}",
        try_="name a table that lists all labels of each image, such as path,label with RBC|WBC"
        if task.kind == "any_of"
        else "name data with one class per image, or the column that has it with --label-col",
    )


def _no_task(draft: Draft, labels: LabelSpace) -> Problem:
    ours = some([task.name for task in labels.tasks], _SHOWN, " and {:,} more")
    theirs = some([task.name for task in draft.tasks], _SHOWN, " and {:,} more")
    return Problem(
        "D014",
        "labels of another model",
        f"{draft.source} has labels for {theirs}, and the model answers {ours}",
        try_=f"call the label columns as the model's tasks: {ours}",
    )
