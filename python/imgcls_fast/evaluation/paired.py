"""Compares two models on the same rows: bounds the loss of accuracy, and finds which of them is better.

One-label data have one figure, accuracy. Others have two, and an engine must hold both: the share of rows in which every known
answer is right, and the share of right answers, a mean over the tasks. What is not known of a row counts in neither.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from ..core.errors import DataError
from ..core.labels import LabelSpace
from ..core.predictions import Predictions
from .bounds import (
    mcnemar_exact,
    mcnemar_mid,
    mean_interval,
    mean_lower_bound,
    mean_rows_needed,
    mean_upper_bound,
    rows_needed,
    tango_lower_bound,
    tango_upper_bound,
)
from .row_scores import balanced_change, right_answers, row_scores, task_shares, task_weights

Verdict = Literal["pass", "fail", "underpowered"]
Side = Literal["better", "worse", "even"]

CONFIDENCE = 0.95

_SAME = 1e-9  # of differences that are sums of fractions
_MANY = 2000  # groups that change sides; their signs are summed by the normal distribution


@dataclass(frozen=True)
class MeanDrop:
    """The loss of the share of right answers, the mean over the tasks; fractions, not points.

    Args:
        accuracy, reference_accuracy: that share of the engine and of FP32, `accuracy` of `tasks.TaskMetrics`.
        bound, lower_bound: one-sided bounds of the true drop (`bounds.mean_upper_bound`).
        verdict: pass, fail or underpowered, against the same budget as the other figure.
        rows_needed: about how many rows like these would be enough; None: no number.
    """

    accuracy: float
    reference_accuracy: float
    drop: float
    bound: float
    lower_bound: float
    verdict: Verdict
    rows_needed: int | None

    def to_dict(self) -> dict[str, Any]:
        """For gate.json; drops in percentage points."""
        return {
            "accuracy": self.accuracy,
            "reference_accuracy": self.reference_accuracy,
            "drop_pp": 100 * self.drop,
            "bound_pp": 100 * self.bound,
            "lower_bound_pp": 100 * self.lower_bound,
            "verdict": self.verdict,
            "rows_needed": self.rows_needed,
        }


@dataclass(frozen=True)
class Judgement:
    """Loss of an engine on labelled rows. Drops, bounds and accuracies are fractions, not points.

    Where images have several labels, a row is right when all that is known of it is: `accuracy` is the exact match, and `per_label`
    holds the other figure.

    Args:
        rows: number of judged rows.
        lost: rows that FP32 gets right and the engine wrong.
        gained: rows that the engine gets right and FP32 wrong.
        agreement: share of rows with the same answer.
        accuracy, reference_accuracy: accuracy of the engine and of FP32.
        drop: (lost - gained) / rows.
        bound, lower_bound: one-sided bounds of the true drop, each at `confidence`.
        max_drop: the budget.
        p_value: exact McNemar test of "no difference".
        per_class: (name, rows, lost, gained) of each class with rows: those of the class, or for a class of an `any_of` task those
            in which it is known, lost and gained by the answer to it alone.
        verdict: pass, fail or underpowered: pass if both figures pass, fail if one fails.
        simulated: whether it was judged in another runtime than the one that is exported.
        rows_needed: rows with which the bound would be within the budget if they went on like these; None: never.
    """

    rows: int
    lost: int
    gained: int
    agreement: float
    accuracy: float
    reference_accuracy: float
    drop: float
    bound: float
    lower_bound: float
    max_drop: float
    p_value: float
    per_class: tuple[tuple[str, int, int, int], ...]
    verdict: Verdict
    simulated: bool
    rows_needed: int | None
    confidence: float = CONFIDENCE
    per_label: MeanDrop | None = None

    @property
    def passed(self) -> bool:
        """Whether the upper bound of each drop is within the budget."""
        return self.verdict == "pass"

    @property
    def per_class_drop(self) -> dict[str, float]:
        """Observed drop of each class that has rows."""
        return {name: (lost - gained) / rows for name, rows, lost, gained in self.per_class}

    def to_dict(self) -> dict[str, Any]:
        """The same facts for gate.json; drops in percentage points."""
        return {
            "rows": self.rows,
            "lost": self.lost,
            "gained": self.gained,
            "agreement": self.agreement,
            "accuracy": self.accuracy,
            "reference_accuracy": self.reference_accuracy,
            "drop_pp": 100 * self.drop,
            "bound_pp": 100 * self.bound,
            "lower_bound_pp": 100 * self.lower_bound,
            "max_drop_pp": 100 * self.max_drop,
            "confidence": self.confidence,
            "mcnemar_p": self.p_value,
            "per_class": [
                {"class": name, "rows": rows, "lost": lost, "gained": gained, "drop_pp": 100 * (lost - gained) / rows}
                for name, rows, lost, gained in self.per_class
            ],
            "verdict": self.verdict,
            "simulated": self.simulated,
            "rows_needed": self.rows_needed,
            **({"per_label": self.per_label.to_dict()} if self.per_label else {}),
        }


def judge(
    reference: Predictions,
    candidate: Predictions,
    max_drop_pp: float,
    *,
    simulated: bool,
    confidence: float = CONFIDENCE,
) -> Judgement:
    """Compare the answers of an engine with those of FP32 to the same labelled rows.

    A row with a score that is not finite is wrong. Both use the thresholds of the reference. Rows of which nothing is known do not
    count, where images may have several labels.

    Args:
        max_drop_pp: the budget, percentage points.
        simulated: whether the engine runs in another runtime than the one that will be used.

    Raises:
        ValueError: the rows, labels or targets of the two differ, or the budget is not in (0, 100].
        DataError: D014 when there are no labels.
    """
    if not 0 < max_drop_pp <= 100:
        raise ValueError(f"the budget is in (0, 100] percentage points, got {max_drop_pp}")
    if reference.targets is None or candidate.targets is None or not _labelled(reference.targets, reference.labels):
        raise DataError(
            "D014", "rows without labels cannot judge an engine", try_="imgcls-fast export --gate-data DATA"
        )
    same_rows = np.array_equal(reference.rows, candidate.rows) and reference.labels == candidate.labels
    if not same_rows or not np.array_equal(reference.targets, candidate.targets, equal_nan=True):
        raise ValueError("reference and candidate must have answered the same labelled rows")
    candidate, budget = replace(candidate, thresholds=reference.thresholds), max_drop_pp / 100
    was, now = row_scores(reference), row_scores(candidate)
    first = next(iter(was))
    judged = ~np.isnan(was[first])
    n, right_was, right_now = int(judged.sum()), was[first][judged] == 1, now[first][judged] == 1
    lost, gained = int((right_was & ~right_now).sum()), int((right_now & ~right_was).sum())
    upper = tango_upper_bound(lost, gained, n, confidence)
    lower = tango_lower_bound(lost, gained, n, confidence)
    verdict, needed = _verdict(upper, lower, budget), rows_needed(budget, lost, gained, n, confidence)
    per_label = None
    if "per_label" in was:
        shares, other = (task_shares(each)[judged] for each in (reference, candidate))
        per_label = _mean_drop(shares, other, budget, confidence)
        verdict = next(side for side in ("fail", "underpowered", "pass") if side in (verdict, per_label.verdict))
        needed = None if needed is None or per_label.rows_needed is None else max(needed, per_label.rows_needed)
    return Judgement(
        rows=n,
        lost=lost,
        gained=gained,
        agreement=_share(reference.labels.same_answers(reference.scores, candidate.scores, reference.thresholds)[judged]),
        accuracy=_share(right_now),
        reference_accuracy=_share(right_was),
        drop=(lost - gained) / max(n, 1),
        bound=upper,
        lower_bound=lower,
        max_drop=budget,
        p_value=mcnemar_exact(lost, gained),
        per_class=_per_class(reference, candidate),
        verdict=verdict,
        simulated=simulated,
        rows_needed=needed,
        confidence=confidence,
        per_label=per_label,
    )


def _verdict(upper: float, lower: float, budget: float) -> Verdict:
    return "pass" if upper <= budget else "fail" if lower > budget else "underpowered"


def _mean_drop(was: np.ndarray, now: np.ndarray, budget: float, confidence: float) -> MeanDrop:
    """From the (n, tasks) shares of right answers of both."""
    weights = task_weights(was)
    most = max(1.0, float(weights.sum()))  # what one row can change; above 1 where answers are missing
    change = np.nansum((was - now) * weights, 1) / most
    upper, lower = (most * bound(change, confidence) for bound in (mean_upper_bound, mean_lower_bound))
    return MeanDrop(
        accuracy=_share(np.nansum(now * weights, 1)),
        reference_accuracy=_share(np.nansum(was * weights, 1)),
        drop=most * _share(change),
        bound=upper,
        lower_bound=lower,
        verdict=_verdict(upper, lower, budget),
        rows_needed=mean_rows_needed(budget / most, change, confidence),
    )


def _per_class(reference: Predictions, candidate: Predictions) -> tuple[tuple[str, int, int, int], ...]:
    """(name, rows, lost, gained) of each class with rows, see `Judgement`."""
    labels, targets, found = reference.labels, np.asarray(reference.targets), []
    true = labels.decide(targets)
    right = [right_answers(each) for each in (reference, candidate)]
    for k, name in enumerate(labels.classes):  # one class at a time: K may be thousands
        rows = ~np.isnan(targets[:, k]) if labels.any_of[k] else true[:, k]
        if rows.any():
            was, now = right[0][rows, k], right[1][rows, k]
            found.append((name, int(rows.sum()), int((was & ~now).sum()), int((now & ~was).sum())))
    return tuple(found)


@dataclass(frozen=True)
class Difference:
    """Comparison of two models on the rows that both have answered.

    Args:
        rows: number of those rows.
        lost, gained: rows that only the reference, or only the candidate, gets right.
        gain: accuracy of the candidate minus that of the reference on these rows, a fraction.
        low, high: two-sided interval of the gain; None where rows of one group belong together.
        p_value: probability of such a difference between equal models.
        verdict: better, worse, or even where the rows cannot decide.
        balanced_gain: the same difference of balanced accuracies (each class counts the same).
        balanced_p: the same for that difference, by random signs.
        balanced_verdict: like `verdict`, for the balanced accuracies.
    """

    rows: int
    lost: int
    gained: int
    gain: float
    low: float | None
    high: float | None
    p_value: float
    verdict: Side
    balanced_gain: float
    balanced_p: float
    balanced_verdict: Side

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


def compare(
    reference: Predictions, candidate: Predictions, group: np.ndarray | None = None, confidence: float = CONFIDENCE
) -> Difference | None:
    """Compare two models on the labelled rows that both have answered; None where there are none.

    Independent rows are judged by McNemar's mid-p value, and the interval is Tango's. Where rows share a group, whole
    groups change sign instead: McNemar's test would call 10 to 19 % of equal models different. Balanced accuracies are always
    judged by random signs: a row counts by the size of its class, and the test stays exact with three rows of a class.

    Where images have several labels, the gain is that of the mean over the tasks of their share of right answers (`accuracy` of
    `tasks.TaskMetrics`): random signs of the rows judge it, and the interval is `bounds.mean_interval`.

    Args:
        group: (N,) int group of each row of the manifest, -1 for a row on its own.

    Raises:
        ValueError: the two were asked about other classes.
        DataError: D004 when there are no labels.
    """
    if reference.labels != candidate.labels:
        raise ValueError(f"the classes differ: {reference.labels.classes} and {candidate.labels.classes}")
    rows, ours, theirs = np.intersect1d(reference.rows, candidate.rows, assume_unique=True, return_indices=True)
    if not len(rows):
        return None
    own = None if group is None else group[rows]
    if not reference.labels.is_single:
        return _mean_difference(reference, candidate, ours, theirs, own, confidence)
    was = (reference.predicted == reference.truth)[ours]
    now = (candidate.predicted == candidate.truth)[theirs]
    return _difference(reference.truth[ours], was, now, own, confidence)


def against_majority(predictions: Predictions, group: np.ndarray | None = None) -> tuple[int, Difference]:
    """The most frequent class of n > 0 labelled rows, and how a model compares with giving this answer to all of them.

    The class is that of the judged rows themselves, so no constant answer does better.

    Args:
        group: see `compare`.

    Raises:
        DataError: D004 when there are no labels.
    """
    truth = predictions.truth
    column = int(np.bincount(truth).argmax())
    own = None if group is None else group[predictions.rows]
    return column, _difference(truth, truth == column, predictions.predicted == truth, own, CONFIDENCE)


def _difference(
    truth: np.ndarray, was: np.ndarray, now: np.ndarray, group: np.ndarray | None, confidence: float
) -> Difference:
    """`compare` of n > 0 rows: (n,) true classes, whether reference and candidate are right, and groups."""
    n, level, change = len(truth), 1 - confidence, now.astype(np.int64) - was
    lost, gained = int((change < 0).sum()), int((change > 0).sum())
    low: float | None = None
    high: float | None = None
    own = group if group is not None and _shared(group) else np.full(n, -1)
    size = np.bincount(truth)
    weighted = change / (size[truth] * (size > 0).sum())
    balanced, balanced_p = float(weighted.sum()), _flipped_signs(weighted, own)
    if (own >= 0).any():
        p_value = _flipped_signs(change, own)
    else:
        p_value, sure = mcnemar_mid(lost, gained), (1 + confidence) / 2
        low, high = tango_lower_bound(gained, lost, n, sure), tango_upper_bound(gained, lost, n, sure)
    return Difference(
        n,
        lost,
        gained,
        (gained - lost) / n,
        low,
        high,
        p_value,
        _side(gained - lost, p_value, level),
        balanced,
        balanced_p,
        _side(balanced, balanced_p, level),
    )


def _mean_difference(
    reference: Predictions,
    candidate: Predictions,
    ours: np.ndarray,
    theirs: np.ndarray,
    group: np.ndarray | None,
    confidence: float,
) -> Difference | None:
    """`compare` where images have several labels."""
    was, now = task_shares(reference)[ours], task_shares(candidate)[theirs]
    judged = ~np.isnan(was).all(1)
    n, level = int(judged.sum()), 1 - confidence
    if not n:
        return None
    shared = group is not None and _shared(group)
    own = group[judged] if group is not None and shared else np.full(n, -1)
    balanced = balanced_change(reference, candidate, ours, theirs)[judged]
    weights = task_weights(was[judged])
    most = max(1.0, float(weights.sum()))
    change = np.nansum((now - was)[judged] * weights, 1) / most
    gain, p_value = most * float(change.mean()), _flipped_signs(change, own)
    balanced_gain, balanced_p = float(balanced.sum()), _flipped_signs(balanced, own)
    low, high = (most * end for end in mean_interval(change, confidence))
    return Difference(
        rows=n,
        lost=int((change < -_SAME).sum()),
        gained=int((change > _SAME).sum()),
        gain=gain,
        low=None if shared else low,
        high=None if shared else high,
        p_value=p_value,
        verdict=_side(gain, p_value, level),
        balanced_gain=balanced_gain,
        balanced_p=balanced_p,
        balanced_verdict=_side(balanced_gain, balanced_p, level),
    )


def _side(gain: float, p_value: float, level: float) -> Side:
    if p_value > level or abs(gain) < _SAME:
        return "even"
    return "better" if gain > 0 else "worse"


def _shared(group: np.ndarray) -> bool:
    own = group[group >= 0]
    return len(np.unique(own)) < len(own)


def _flipped_signs(change: np.ndarray, group: np.ndarray, draws: int = 9999) -> float:
    """p-value of "a group gains as easily as it loses": how often random signs of the groups' sums reach the observed sum.

    With thousands of groups the sum is normal, with the variance that the signs give it.

    Args:
        change: (n,) what each row adds to the difference.
        group: (n,) int, -1 for a row on its own.

    Source: Phipson, Smyth, Stat. Appl. Genet. Mol. Biol. 9:39 (2010), for counting the observed one.
    """
    alone = group < 0
    names = np.where(alone, group.max(initial=-1) + 1 + np.cumsum(alone), group)
    sums = np.bincount(np.unique(names, return_inverse=True)[1], change)
    sums = sums[abs(sums) > _SAME]
    total = abs(sums.sum())
    if len(sums) > _MANY:
        return math.erfc(total / math.sqrt(2 * (sums**2).sum()))
    draw, reached, piece = np.random.default_rng(0), 1, max(1, 1_000_000 // max(1, len(sums)))
    for first in range(0, draws, piece):
        kept = draw.integers(0, 2, (min(piece, draws - first), len(sums)), np.int8) @ sums
        reached += int((abs(2 * kept - sums.sum()) >= total - _SAME).sum())  # the others are turned
    return reached / (draws + 1)


def _labelled(targets: np.ndarray, labels: LabelSpace) -> bool:
    """Whether each row has its class; of several labels, whether anything is known of some row."""
    if labels.is_single:
        return bool((targets > 0).any(1).all())
    return not len(targets) or not bool(np.isnan(targets).all())


def _share(rows: np.ndarray) -> float:
    return float(rows.mean()) if len(rows) else 0.0
