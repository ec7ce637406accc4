"""What a model is asked about an image: tasks, their classes, and which columns of a score matrix belong to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np

TaskKind = Literal["one_of", "any_of"]
THRESHOLD = 0.5  # of a class of an any_of task, where none was fitted
JOINT = "|"  # between classes of one image, wherever several of them stand in one cell


@dataclass(frozen=True)
class Task:
    """One question about an image: its name, its classes, and whether exactly one or any number of them holds.

    Raises:
        ValueError: a kind that is none of the two.
    """

    name: str
    classes: tuple[str, ...]
    kind: TaskKind = "one_of"

    def __post_init__(self) -> None:
        if self.kind not in get_args(TaskKind):  # of a newer version, perhaps: to take it for one_of would be a wrong answer
            raise ValueError(f"the task {self.name!r} is of kind {self.kind!r}, and this version knows {', '.join(get_args(TaskKind))}")

    def words(self, targets: np.ndarray) -> str:
        """The classes that hold in one image, joined by "|"; the most probable one of a soft label; "" where unknown or none.

        Args:
            targets: (K_t,) with NaN where unknown, or bool answers.
        """
        if self.kind == "any_of":
            return JOINT.join(name for name, value in zip(self.classes, targets, strict=True) if value >= THRESHOLD)
        return self.classes[int(np.nanargmax(targets))] if (targets > 0).any() else ""


@dataclass(frozen=True)
class LabelSpace:
    """What each column of a score matrix means: the classes of all tasks, one task after the other."""

    tasks: tuple[Task, ...]

    @classmethod
    def single(cls, classes: Sequence[str]) -> LabelSpace:
        """One-label data, the usual case: every image belongs to exactly one class."""
        return cls((Task("label", tuple(classes)),))

    @property
    def is_single(self) -> bool:
        """Whether every image belongs to exactly one of the classes, and nothing else is asked."""
        return len(self.tasks) == 1 and self.tasks[0].kind == "one_of"

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """The name of every column: the class, and "TASK: CLASS" where there are several tasks."""
        if len(self.tasks) == 1:
            return self.tasks[0].classes
        return tuple(f"{task.name}: {name}" for task in self.tasks for name in task.classes)

    @property
    def size(self) -> int:
        """K, the number of columns."""
        return sum(len(task.classes) for task in self.tasks)

    @cached_property
    def slices(self) -> tuple[slice, ...]:
        """The columns of each task."""
        ends = np.cumsum([len(task.classes) for task in self.tasks]).tolist()
        return tuple(slice(end - len(task.classes), end) for task, end in zip(self.tasks, ends, strict=True))

    @property
    def parts(self) -> tuple[tuple[Task, slice], ...]:
        """Each task with its columns."""
        return tuple(zip(self.tasks, self.slices, strict=True))

    @cached_property
    def any_of(self) -> np.ndarray:
        """(K,) bool: the columns of `any_of` tasks."""
        return np.repeat([task.kind == "any_of" for task in self.tasks], [len(task.classes) for task in self.tasks])

    def words(self, targets: np.ndarray) -> str:
        """All that holds in one image: "roses", "RBC|WBC", "color: red, tags: new|old"; "" where nothing is known.

        Args:
            targets: (K,) with NaN where unknown, or bool answers.
        """
        found = [(task, task.words(targets[part])) for task, part in self.parts]
        return ", ".join(words if len(self.tasks) == 1 else f"{task.name}: {words}" for task, words in found if words)

    def task(self, name: str) -> tuple[Task, slice]:
        """One task and its columns.

        Raises:
            KeyError: no task is called so.
        """
        return next(((task, part) for task, part in self.parts if task.name == name), None) or _missing(name)

    def decide(self, scores: np.ndarray, thresholds: np.ndarray | Sequence[float] | None = None) -> np.ndarray:
        """The answers that scores stand for; the one place where scores become answers.

        Args:
            scores: (n, K) probabilities.
            thresholds: (K,), the least score with which a class of an `any_of` task holds; other columns are ignored. None: 0.5.

        Returns:
            (n, K) bool: of a `one_of` task the class with the highest score, of an `any_of` task the classes at or above
            their threshold. A score that is not finite answers nothing: its row of a `one_of` task, and its class of an
            `any_of` task, are False.
        """
        scores = np.asarray(scores)
        least = np.full(self.size, THRESHOLD, np.float32) if thresholds is None else np.asarray(thresholds, np.float32)
        answers = np.zeros(scores.shape, bool)
        for task, part in self.parts:
            found = scores[:, part]
            if task.kind == "any_of":
                answers[:, part] = np.isfinite(found) & (found >= least[part])
            else:
                sound = np.flatnonzero(np.isfinite(found).all(1))
                answers[sound, part.start + found[sound].argmax(1)] = True
        return answers

    def same_answers(
        self, scores: np.ndarray, others: np.ndarray, thresholds: np.ndarray | Sequence[float] | None = None
    ) -> np.ndarray:
        """(n,) bool: rows for which two models give the same answers to every task; both (n, K) scores must be finite."""
        same: np.ndarray = (self.decide(scores, thresholds) == self.decide(others, thresholds)).all(1)
        return same & np.isfinite(scores).all(1) & np.isfinite(others).all(1)

    def to_dict(self) -> dict[str, Any]:
        return {"tasks": [{"name": t.name, "classes": list(t.classes), "kind": t.kind} for t in self.tasks]}

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> LabelSpace:
        return cls(tuple(Task(t["name"], tuple(t["classes"]), t["kind"]) for t in value["tasks"]))


def _missing(name: str) -> Any:
    raise KeyError(name)


def known(targets: np.ndarray, part: slice) -> np.ndarray:
    """(n,) bool: the rows of which anything is known in the columns of one task.

    Args:
        targets: (n, K) with NaN where unknown.
        part: the columns of the task.
    """
    return ~np.isnan(targets[:, part]).all(1)


# ---------------------------------------------------------------- one task's answers, as a manifest keeps them


def task_targets(task: Task, answer: np.ndarray) -> np.ndarray:
    """(n, K_t) float32 targets of one task; NaN where unknown.

    Args:
        answer: `one_of`: (n,) int with -1 for unknown, or (n, K_t) float probabilities with NaN; `any_of`: (n, K_t) int8 of 0, 1
            and -1 for unknown, or float with NaN.
    """
    if answer.ndim == 2:
        targets = answer.astype(np.float32)
        if answer.dtype.kind in "iu":
            targets[answer < 0] = np.nan
        return targets
    targets = np.zeros((len(answer), len(task.classes)), np.float32)
    at = np.flatnonzero(answer >= 0)
    targets[at, answer[at]] = 1
    targets[answer < 0] = np.nan
    return targets


def hard_answers(answer: np.ndarray, kind: TaskKind) -> np.ndarray:
    """The same answers without probabilities: (n,) int32 class or (n, K_t) int8 of 0 and 1, -1 where unknown."""
    if answer.dtype.kind in "iu":
        return answer
    unknown = np.isnan(answer)
    if kind == "any_of":
        return np.where(unknown, -1, answer >= THRESHOLD).astype(np.int8)
    gone = unknown.any(1)
    return np.where(gone, -1, np.where(unknown, 0, answer).argmax(1)).astype(np.int32)


def demand_answers(task: Task, answer: np.ndarray) -> None:
    """Refuse answers that no scan writes.

    Raises:
        ValueError: shape, type or values are none that `task_targets` takes; what is wrong is named.
    """
    k, soft = len(task.classes), answer.dtype.kind == "f"
    if answer.dtype.kind not in "iuf" or answer.ndim != (1 if task.kind == "one_of" and not soft else 2):
        raise ValueError(f"the answers to {task.name!r} are {answer.dtype} with {answer.ndim} dimensions")
    if answer.ndim == 2 and answer.shape[1] != k:
        raise ValueError(f"the answers to {task.name!r} have {answer.shape[1]} columns for {k} classes")
    unknown = np.isnan(answer) if soft and task.kind == "one_of" else None
    if unknown is not None and unknown.size and (unknown.any(1) != unknown.all(1)).any():
        raise ValueError(f"the answers to {task.name!r} hold probabilities of some classes only")
    low, high = (0, 1) if soft else (-1, k - 1 if task.kind == "one_of" else 1)
    values = answer[~np.isnan(answer)] if soft else answer
    if values.size and (values.min() < low or values.max() > high):
        raise ValueError(f"the answers to {task.name!r} hold values outside of {low:,} to {high:,}")
