"""Rules about classes, task by task: those that were asked for, those without images, and what would train better."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from ..core.labels import LabelSpace, Task
from ..core.manifest import NO_SPLIT, SPLITS
from ..core.text import command
from . import advice, fetch
from .draft import Draft
from .listing import Problem, is_table
from .matching import match_tasks
from .unknown import about_unknown, no_known_class

_TRAIN = SPLITS.index("train")


def choose_classes(draft: Draft) -> None:
    """Keep only the classes that were asked for, in that order; rows of others are left out."""
    if draft.options.purpose == "predict":
        return
    if draft.options.labels is not None:
        match_tasks(draft, draft.options.labels)
    elif draft.options.classes is not None and draft.single and draft.answers[0].ndim == 1:
        _choose_single(draft, draft.options.classes)
    elif draft.options.classes is not None:
        match_tasks(draft, LabelSpace.single(draft.options.classes))


def _choose_single(draft: Draft, wanted: tuple[str, ...]) -> None:
    classes, label = draft.tasks[0].classes, draft.hard(0)
    place = {name: i for i, name in enumerate(wanted)}
    table = np.array([place.get(name, -1) for name in classes] + [-1], np.int32)
    counts = draft.counts(0, draft.files.good())
    draft.unknown = {name: int(n) for name, n in zip(classes, counts, strict=True) if name not in place and n}
    draft.notices += [about_unknown(draft.unknown, wanted)] if draft.unknown else []
    draft.answers = [table[label]]
    for name in wanted:
        if name not in classes and draft.options.purpose == "train":
            draft.problems.append(Problem("D005", "missing class", f"class {name!r} has no images in {draft.source}"))
    draft.tasks = [replace(draft.tasks[0], classes=wanted)]


def drop_empty_classes(draft: Draft) -> None:
    """Leave out classes without a usable image, unless these classes were asked for."""
    if draft.options.classes is not None or draft.options.labels is not None:
        return
    for k, task in enumerate(draft.tasks):
        answer = draft.answers[k]
        soft = answer.dtype.kind == "f"
        held = (np.nan_to_num(answer[draft.rows]) > 0).any(0) if soft else draft.counts(k, draft.rows) > 0
        if held.all():
            continue
        gone = [name for name, there in zip(task.classes, held, strict=True) if not there]
        where = "the classes" if len(draft.tasks) == 1 else f"the classes of {task.name}"
        draft.notices.append(f"no usable image in {len(gone)} of {where}, left out: {', '.join(gone[:5])}")
        if answer.ndim == 1:
            renumber = np.append(np.cumsum(held) - 1, -1).astype(np.int32)
            renumber[:-1][~held] = -1
            draft.answers[k] = renumber[answer]
        else:
            draft.answers[k] = answer[:, held]
        draft.tasks[k] = replace(task, classes=tuple(n for n, there in zip(task.classes, held, strict=True) if there))


def check_classes(draft: Draft) -> None:
    """Refuse what no classifier can be trained on: no images, one class, a class without training images."""
    rows = draft.rows
    if not len(rows):
        if draft.unknown and draft.options.purpose == "judge":
            known = [name for task in draft.tasks for name in task.classes]
            draft.problems.append(no_known_class(draft.unknown, known, draft.source))
        elif not {"D002", "D014", "no labels"} & {word for problem in draft.problems for word in (problem.code, problem.kind)}:
            draft.problems.append(Problem("D002", "no images", f"no usable images in {draft.source}"))
        return
    if draft.options.purpose != "train":
        return
    for k, task in enumerate(draft.tasks):
        if not draft.listing.problems:  # else the other class may be in the rows at fault
            draft.problems += _too_few_classes(draft, task)
        _check_training_rows(draft, k, task)


def _too_few_classes(draft: Draft, task: Task) -> list[Problem]:
    if len(task.classes) >= (1 if task.kind == "any_of" else 2):
        return []
    if len(draft.tasks) > 1:
        name = f" ({task.classes[0]!r})" if task.classes else ""
        text = f"the column {task.name!r} of {draft.source} has {len(task.classes)} class{name}, and a task needs at least 2"
        fix = "take it out of --label-col"
        return [Problem("D003", "fewer than two classes", text, why="there is nothing to choose between", try_=fix)]
    name = f" ({task.classes[0]!r})" if task.classes else ""
    text = f"{draft.source} has {len(task.classes)} class{name}, and a classifier needs at least 2"
    why = "each class is a folder of its own, or a name in the label column of a table"
    return [Problem("D003", "fewer than two classes", text, why=why, try_=_elsewhere(Path(draft.source)))]


def _check_training_rows(draft: Draft, k: int, task: Task) -> None:
    split = draft.split[draft.rows]
    if (split == NO_SPLIT).any():
        return  # training rows are still to be chosen
    counts = [draft.counts(k, draft.rows[split == code]) for code in range(len(SPLITS))]
    of = "" if len(draft.tasks) == 1 else f" of {task.name}"
    for i in np.flatnonzero((counts[0] == 0) & (counts[1] + counts[2] > 0)).tolist():
        given = f"{counts[1][i]:,} val and {counts[2][i]:,} test images"
        text = f"class {task.classes[i]!r}{of} has {given} and no training images"
        draft.problems.append(Problem("D005", "class without training images", text))


def _elsewhere(source: Path) -> str:
    """The command for the table or the one folder inside `source` that was probably meant."""
    if not source.is_dir():
        return ""
    inside = sorted(p for p in source.iterdir() if not fetch.is_ignored(p.name))
    tables = [p for p in inside if is_table(p) and p.suffix.lower() != ".txt"]
    folders = [p for p in inside if p.is_dir() and any(q.is_dir() and not fetch.is_ignored(q.name) for q in p.iterdir())]
    meant = tables[0] if len(tables) == 1 else folders[0] if len(folders) == 1 else None
    return command("data", "check", meant) if meant else ""


def describe_labels(draft: Draft) -> None:
    """Note what kind of labels was found, where they are not one class per image."""
    if draft.options.purpose != "train" or not draft.listing.tasks:
        return
    parts = []
    for k, (task, listed) in enumerate(zip(draft.tasks, draft.listing.tasks, strict=True)):
        several = ", several per image" if task.kind == "any_of" else ""
        unknown = float((~_known(draft, k)).mean()) if len(draft.rows) else 0.0
        rest = f", {unknown:.0%} unknown" if unknown else ""
        how = f": {listed.how}" if listed.how else ""
        name = "" if len(draft.tasks) == 1 else f"{task.name} has "
        parts.append(f"{name}{len(task.classes):,} class{'es' * (len(task.classes) != 1)}{several} ({task.kind}){how}{rest}")
    head = "" if len(parts) == 1 else f"{len(parts)} tasks, "
    draft.notices.append(f"labels: {head}{'; '.join(parts)}")


def _known(draft: Draft, k: int) -> np.ndarray:
    found = draft.hard(k, draft.rows) >= 0
    return np.asarray(found if found.ndim == 1 else found.any(1))


def advise(draft: Draft) -> None:
    """Add notices about classes and channels, for training only."""
    rows, options = draft.rows, draft.options
    if options.purpose != "train":
        return
    problem = None
    if not draft.listing.columns:  # of a table, the labels have been taken apart
        problem = advice.several_labels(draft.tasks[0].classes, draft.counts(0, rows), draft.source)
        draft.problems += [problem] if problem else []
    if problem or not options.advice:
        return
    learnt = rows[(draft.split[rows] == NO_SPLIT) | (draft.split[rows] == _TRAIN)]
    draft.notices += advice.about_depth(draft.files, learnt, options.bits)
    if options.color in ("auto", "rgb"):
        draft.notices += advice.about_channels(draft.files.full, draft.files.head, rows, options.max_megapixels)
    for k, task in enumerate(draft.tasks):
        counts = draft.counts(k, rows)
        if task.kind == "any_of":
            found = advice.about_labels(task.classes, counts, (draft.hard(k, rows) == 0).sum(0))
        else:
            found = advice.about_classes(task.classes, counts, weighted=options.weighted, pretrained=options.pretrained)
        draft.notices += found if len(draft.tasks) == 1 else [f"{task.name}: {notice}" for notice in found]


