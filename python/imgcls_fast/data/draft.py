"""Holds a manifest in the making, as the rules of a scan pass it on."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..core.labels import LabelSpace, Task, hard_answers, task_targets
from ..core.manifest import Manifest, PathList
from .examine import Files
from .findings import ScanOptions
from .listing import Listing, Problem
from .quarantine import BadFile


@dataclass
class Draft:
    """State that each rule reads, and leaves with fewer rows, a problem or a notice more."""

    listing: Listing
    files: Files
    options: ScanOptions
    source: str
    tasks: list[Task]
    answers: list[np.ndarray]  # one per task, all N rows, as in a manifest; unknown also where the class is left out
    split: np.ndarray  # (N,) uint8
    group: np.ndarray  # (N,) int32, -1: a group of its own
    group_names: tuple[str, ...]
    problems: list[Problem]
    notices: list[str]
    rows: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # (n,) those that are in
    near: np.ndarray | None = None  # (N,) int64, images that look alike share a number
    bad: tuple[BadFile, ...] = ()
    dropped: int = 0  # duplicates that were left out
    unknown: dict[str, int] = field(default_factory=dict)  # class that was not asked for -> usable images

    @classmethod
    def of(cls, listing: Listing, files: Files, options: ScanOptions, source: str) -> Draft:
        """Begin with everything that was listed; no row is in yet."""
        group, names = _group_codes(listing.groups, len(listing.paths))
        tasks = [Task(task.name, tuple(task.classes), task.kind) for task in listing.tasks]
        answers = [task.answers for task in listing.tasks]
        return cls(
            listing=listing,
            files=files,
            options=options,
            source=source,
            tasks=tasks or list(LabelSpace.single(listing.classes).tasks),
            answers=answers or [np.array(listing.labels, np.int32)],
            split=np.array(listing.splits, np.uint8),
            group=group,
            group_names=names,
            problems=list(dict.fromkeys(listing.problems)),
            notices=list(listing.notices),
        )

    def path(self, row: int) -> str:
        return self.listing.paths[row]

    @property
    def single(self) -> bool:
        """Whether every image belongs to exactly one class, and nothing else is asked."""
        return LabelSpace(tuple(self.tasks)).is_single

    def hard(self, task: int, rows: np.ndarray | slice = slice(None)) -> np.ndarray:
        """(n,) int32 classes or (n, K) int8 of one task, without probabilities; -1 where unknown."""
        return hard_answers(self.answers[task][rows], self.tasks[task].kind)

    def known(self, rows: np.ndarray) -> np.ndarray:
        """(n,) bool: the rows of which any answer is known."""
        found = [self.hard(task, rows) >= 0 for task in range(len(self.tasks))]
        return np.logical_or.reduce([part if part.ndim == 1 else part.any(1) for part in found])

    def counts(self, task: int, rows: np.ndarray) -> np.ndarray:
        """(K,) int64 images per class of a task."""
        found = self.hard(task, rows)
        if found.ndim == 1:
            return np.bincount(found[found >= 0], minlength=len(self.tasks[task].classes))
        return (found == 1).sum(0).astype(np.int64)

    def alike(self, rows: np.ndarray) -> np.ndarray:
        """(n,) int64: rows with the same answers to everything share a number, -1 where nothing is known."""
        if self.single:
            return self.hard(0, rows).astype(np.int64)
        if not len(rows):
            return np.zeros(0, np.int64)
        parts = [self.hard(task, rows).reshape(len(rows), -1).astype(np.int32) for task in range(len(self.tasks))]
        number = np.unique(np.concatenate(parts, axis=1), axis=0, return_inverse=True)[1].reshape(-1)
        return np.where(self.known(rows), number, -1).astype(np.int64)

    def words(self, row: int) -> str:
        """The labels of a row, for people: a class, "RBC|WBC", "color: red, tags: new|old"; empty where nothing is known."""
        found = []
        for task, answers in zip(self.tasks, self.answers, strict=True):
            targets = task_targets(task, answers[[row]])[0]
            if not np.isnan(targets).all():
                names = task.words(targets) or "none"
                found.append(names if len(self.tasks) == 1 else f"{task.name}: {names}")
        return ", ".join(found)

    def manifest(self) -> Manifest:
        """The rows that are in."""
        head, rows = self.files.head, self.rows
        present, group = np.unique(self.group[rows], return_inverse=True)
        names = tuple(self.group_names[g] for g in present if g >= 0)
        group = group - int((present < 0).any())
        return Manifest(
            root=Path(self.listing.root),
            paths=PathList.of(self.path(row) for row in rows.tolist()),
            labels=LabelSpace(tuple(self.tasks)),
            answers=tuple(answer[rows] for answer in self.answers),
            split=self.split[rows],
            group=group.astype(np.int32),
            width=head["width"][rows].astype(np.int32),
            height=head["height"][rows].astype(np.int32),
            orientation=head["orientation"][rows].astype(np.uint8),
            digest=self.files.digest[rows],
            flags=self.files.flags[rows],
            source=self.source,
            group_names=names,
        )


def _group_codes(groups: list[str] | None, n: int) -> tuple[np.ndarray, tuple[str, ...]]:
    """((N,) int32 codes, names in sorted order); "" becomes -1."""
    if groups is None:
        return np.full(n, -1, np.int32), ()
    names = sorted(set(groups) - {""})
    code = {name: i for i, name in enumerate(names)} | {"": -1}
    return np.fromiter((code[g] for g in groups), np.int32, n), tuple(names)
