"""Judges answers to several questions about each image: each task by itself, and the means over the tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..core.errors import DataError
from ..core.figures import FIGURES, usual_figures
from ..core.predictions import Predictions
from .bounds import share_interval
from .metrics import Metrics, accuracy_interval, check_options, check_scores, judge, plain_json
from .multilabel import AnyOfMetrics, answers_of, judge_any_of, thresholds_of
from .resampling import Answers, resample, resampled_interval
from .row_scores import linear_shares

_VALUE = {figure.name: figure.value for figure in FIGURES}


@dataclass(frozen=True, eq=False)
class TaskMetrics:
    """Figures that `judge_tasks` computes: `tasks` holds those of each task, the other figures are means over the tasks.

    accuracy is the mean over tasks of the accuracy (`one_of`) or of the mean share of right labels (`any_of`); exact_match is the
    share of rows in which every known answer is right.

    Args:
        n: number of rows of which something is known.
        classes: name of every column.
    """

    n: int
    classes: tuple[str, ...]
    tasks: Mapping[str, Metrics | AnyOfMetrics]
    confidence_level: float
    bootstrap: int
    accuracy_ci: tuple[float, float]
    exact_match: float
    exact_match_ci: tuple[float, float]
    macro_f1_ci: tuple[float, float]
    macro_ap_ci: tuple[float, float]
    warnings: tuple[str, ...]
    undecodable_files: tuple[dict[str, str], ...] = ()  # as in `Metrics`
    changed_files: tuple[str, ...] = ()
    unknown_classes: Mapping[str, int] = field(default_factory=dict)
    seen: Mapping[str, int] = field(default_factory=dict)

    def __repr__(self) -> str:
        counted = f"{len(self.warnings)} warning{'s' * (len(self.warnings) != 1)}"
        return (
            f"TaskMetrics(accuracy={self.accuracy:.3f}, exact_match={self.exact_match:.3f}, macro_f1={self.macro_f1:.3f}, "
            f"macro_ap={self.macro_ap:.3f}, n={self.n:,}, tasks: {', '.join(self.tasks)}, {counted})"
        )

    @property
    def accuracy(self) -> float:
        """Mean over the tasks; of an `any_of` task the mean share of right labels."""
        return _VALUE["accuracy"](self)

    @property
    def macro_f1(self) -> float:
        """Mean over the tasks of the mean F1 of their classes."""
        return _VALUE["macro_f1"](self)

    @property
    def macro_ap(self) -> float:
        """Mean over the tasks of the mean average precision of their classes."""
        return _VALUE["macro_ap"](self)

    @property
    def balanced_accuracy(self) -> float:
        """Mean over the tasks."""
        return _VALUE["balanced_accuracy"](self)

    @property
    def log_loss(self) -> float:
        """Mean over the tasks, nats."""
        return _VALUE["loss"](self)

    def to_dict(self) -> dict[str, Any]:
        """The same facts as JSON-safe values."""
        value = {name: getattr(self, name) for name in self.__dataclass_fields__}
        value["tasks"] = {name: {"kind": one.kind, **one.to_dict()} for name, one in self.tasks.items()}
        value |= {figure.field: figure.value(self) for figure in usual_figures(single=False)}
        plain: dict[str, Any] = plain_json(value)
        return plain

    def headline(self) -> dict[str, Any]:
        """Return the figures of the judged split for the final event of a run, JSON-safe.

        Returns:
            n, accuracy, ci, exact_match, exact_match_ci, macro_f1, macro_ap, macro_ap_ci; worst: (class, F1, images) of three
            classes; tasks: name, kind, n, classes (how many), accuracy, macro_f1, macro_ap, ece, and exact_match of `any_of` tasks.
        """
        several = len(self.tasks) > 1
        classes = [
            (f"{name}: {c.name}" if several else c.name, c.f1, c.support)
            for name, one in self.tasks.items()
            for c in one.per_class
            if c.support
        ]
        listed = [
            {
                "name": name,
                "kind": one.kind,
                "n": one.n,
                "classes": len(one.classes),
                **{key: getattr(one, key) for key in ("accuracy", "macro_f1", "macro_ap", "ece")},
                **({"exact_match": one.exact_match} if isinstance(one, AnyOfMetrics) else {}),
            }
            for name, one in self.tasks.items()
        ]
        found = {
            "n": self.n,
            "accuracy": self.accuracy,
            "ci": self.accuracy_ci,
            **{name: getattr(self, name) for name in ("exact_match", "exact_match_ci", "macro_f1")},
            **{name: getattr(self, name) for name in ("macro_ap", "macro_ap_ci", "balanced_accuracy")},
            "worst": sorted(classes, key=lambda entry: entry[1])[:3],
            "tasks": listed,
        }
        plain: dict[str, Any] = plain_json(found)
        return plain


def judge_tasks(
    predictions: Predictions,
    thresholds: np.ndarray | Sequence[float] | None = None,
    *,
    top_k: Sequence[int] = (1, 5),
    bootstrap: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
    group: np.ndarray | None = None,
) -> TaskMetrics:
    """Judge predictions of any tasks, each on the rows of which its answer is known.

    Args:
        predictions: rows with targets, NaN where unknown; rows of which nothing is known are left out, and a warning counts them.
        thresholds: (K,) least scores of the classes of `any_of` tasks; None: those of the predictions, 0.5 where they have none.
        top_k, group: see `metrics.judge`; they concern `one_of` tasks.
        bootstrap: number of resamples of whole rows, for the intervals of the means over tasks; 0 makes them NaN.
        seed: seed for the resamples.
        confidence: mass of the intervals, in (0, 1).

    Raises:
        DataError: D004 no labels, D014 no rows, or scores that are no probabilities.
        ConfigError: C003 for an impossible top_k, bootstrap or confidence.
    """
    check_options(top_k, bootstrap, confidence)
    if predictions.targets is None:
        raise DataError("D004", "these predictions have no labels, so they cannot be judged")
    check_scores(predictions)
    left = np.isnan(predictions.targets).all(1)
    warnings = [f"{left.sum():,} of {len(left):,} images have no label at all and are not judged"] if left.any() else []
    judged = predictions.take(~left) if left.any() else predictions
    if not len(judged):
        raise DataError("D014", "there are no labelled rows to judge", try_="imgcls-fast data check DATA")
    least = thresholds_of(predictions, thresholds)
    tasks: dict[str, Metrics | AnyOfMetrics] = {}
    answers: list[Answers] = []
    several = len(predictions.labels.tasks) > 1
    for k, (task, part) in enumerate(judged.labels.parts):
        own = judged.of_task(k)
        if not len(own):
            warnings.append(f"{task.name}: no image has an answer, so this task is not judged")
            continue
        found: Metrics | AnyOfMetrics
        if task.kind == "any_of":
            found = judge_any_of(own, least[part], bootstrap=bootstrap, seed=seed, confidence=confidence)
        else:
            found = judge(own, top_k=top_k, bootstrap=bootstrap, seed=seed, confidence=confidence, group=group)
        tasks[task.name] = found
        answers.append(_at_all_rows(answers_of(own, least[part]), np.searchsorted(judged.rows, own.rows), len(judged)))
        warnings += [f"{task.name}: {text}" if several else text for text in found.warnings]
    right = np.stack([one.right for one in answers])
    exact = int((np.isnan(right) | (right == 1)).all(0).sum())
    only = next(iter(tasks.values()))
    if not several and isinstance(only, AnyOfMetrics):
        ranges = only.macro_f1_ci, only.macro_ap_ci
    else:
        drawn = resample(answers, bootstrap, seed)
        ranges = resampled_interval(drawn.macro_f1, confidence), resampled_interval(drawn.macro_ap, confidence)
    return TaskMetrics(
        n=len(judged),
        classes=predictions.labels.classes,
        tasks=tasks,
        confidence_level=confidence,
        bootstrap=bootstrap,
        accuracy_ci=share_interval(linear_shares(right.T), confidence),
        exact_match=exact / len(judged),
        exact_match_ci=accuracy_interval(exact, len(judged), confidence),
        macro_f1_ci=ranges[0],
        macro_ap_ci=ranges[1],
        warnings=tuple(warnings),
    )


def _at_all_rows(task: Answers, at: np.ndarray, n: int) -> Answers:
    """The same answers among n rows; the others are unknown."""
    if len(at) == n:
        return task

    def spread(values: np.ndarray, empty: float) -> np.ndarray:
        whole = np.full((n, *values.shape[1:]), empty, values.dtype)
        whole[at] = values
        return whole

    scores, given, true, known = (spread(values, 0) for values in (task.scores, task.given, task.true, task.known))
    return Answers(scores, given, true, known, spread(task.right, np.nan))


def judge_all(
    predictions: Predictions,
    *,
    top_k: Sequence[int] = (1, 5),
    bootstrap: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
    group: np.ndarray | None = None,
) -> Metrics | TaskMetrics:
    """`judge` for one-label predictions, else `judge_tasks`; arguments and errors are theirs."""
    how: dict[str, Any] = {"top_k": top_k, "bootstrap": bootstrap, "seed": seed, "confidence": confidence, "group": group}
    return judge(predictions, **how) if predictions.labels.is_single else judge_tasks(predictions, **how)
