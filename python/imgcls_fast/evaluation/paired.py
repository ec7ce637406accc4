"""Two models on the same rows: how large the loss of accuracy may be, from the rows that only one of them gets right.

A bootstrap cannot judge a quantised model: where no row changes sides it always gives a loss of exactly 0, however few rows
there are. The score interval of Tango (1998, "Equivalence test and confidence interval for the difference in proportions for the
paired-sample design", Statistics in Medicine 17:891-908) does not degenerate there.

Counts may be fractions (rates times rows), which is how figures for other numbers of rows are found.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal

import numpy as np

from ..core.errors import DataError
from ..core.manifest import LabelSpace
from ..core.predictions import Predictions

Verdict = Literal["pass", "fail", "underpowered"]
Side = Literal["better", "worse", "even"]

CONFIDENCE = 0.95

_HALVINGS = 80  # of an interval of at most 2: beyond the last bit of a float
_SAME = 1e-9  # of differences that are sums of fractions
_MANY = 2000  # groups that change sides; their signs are summed by the normal distribution
_NEVER = 1e9  # rows; a drop that differs from the allowed one by rounding alone would ask for more


def tango_upper_bound(lost: float, gained: float, n: float, confidence: float = 0.95) -> float:
    """One-sided upper bound of the drop of accuracy, p(lost) - p(gained), as a fraction in [-1, 1].

    Args:
        lost: rows that the reference gets right and the candidate wrong.
        gained: rows that the candidate gets right and the reference wrong.
        n: all rows; 0 gives 1, because nothing is known.
        confidence: one-sided, in [0.5, 1).

    Raises:
        ValueError: negative counts, more discordant rows than rows, or a confidence outside the range.

    Source: Tango 1998, section 4; the score statistic at the bound equals minus the normal quantile.
    """
    z = _checked_quantile(lost, gained, n, confidence)
    if n == 0:
        return 1.0
    low, high = (lost - gained) / n, 1.0
    for _ in range(_HALVINGS):  # the statistic falls with the drop: above the bound it is below -z
        middle = (low + high) / 2
        low, high = (middle, high) if _excess(lost / n, gained / n, middle) * math.sqrt(n) > -z else (low, middle)
    return high


def tango_lower_bound(lost: float, gained: float, n: float, confidence: float = 0.95) -> float:
    """One-sided lower bound of the drop: `tango_upper_bound` of the two models in exchanged roles. -1 for no rows.

    Raises:
        ValueError: as `tango_upper_bound`.
    """
    return -tango_upper_bound(gained, lost, n, confidence)


def mcnemar_exact(lost: int, gained: int) -> float:
    """Two-sided exact p-value of "a changed row is lost as easily as gained": binomial with 1/2, twice the smaller tail.

    Raises:
        ValueError: negative counts.

    Source: McNemar, Psychometrika 12 (1947); exact form as in Fagerland, Lydersen, Laake, BMC Med. Res. Methodol. 13:91 (2013).
    """
    if lost < 0 or gained < 0:
        raise ValueError(f"counts must not be negative, got {lost} and {gained}")
    n, fewer = lost + gained, min(lost, gained)
    logs = [
        math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2) for k in range(fewer + 1)
    ]
    return min(1.0, 2 * math.fsum(math.exp(value) for value in logs))


def mcnemar_mid(lost: int, gained: int) -> float:
    """Two-sided mid-p value of McNemar's test: the exact one, with half the weight of what was observed.

    The exact test is timid: at a level of 0.05 it errs in 1 to 3 % of cases, this one in 2.5 to 4.6 % (100 and 225 rows).

    Raises:
        ValueError: negative counts.

    Source: Fagerland, Lydersen, Laake, BMC Med. Res. Methodol. 13:91 (2013).
    """
    n, fewer = lost + gained, min(lost, gained)
    exact = mcnemar_exact(lost, gained)
    observed = math.exp(math.lgamma(n + 1) - math.lgamma(fewer + 1) - math.lgamma(n - fewer + 1) - n * math.log(2))
    return 1.0 if lost == gained else min(1.0, exact - observed)


def rows_needed(max_drop: float, lost: float, gained: float, n: float, confidence: float = 0.95) -> int | None:
    """How many rows, changing sides as often as these do, bring the upper bound down to `max_drop` (a fraction).

    At given rates the statistic grows with the square root of the rows, so the number has a closed form.

    Returns:
        The smallest such number, which may be below `n`; None when the observed drop is not below `max_drop`, so that no
        number would do (nor one above a thousand million). With `n` = 0 the rates are taken as 0.

    Raises:
        ValueError: as `tango_upper_bound`, or `max_drop` outside (0, 1].
    """
    z = _checked_quantile(lost, gained, n, confidence)
    if not 0 < max_drop <= 1:
        raise ValueError(f"max_drop is a fraction in (0, 1], got {max_drop}")
    p_lost, p_gained = (lost / n, gained / n) if n else (0.0, 0.0)
    if p_lost - p_gained >= max_drop:
        return None
    rows = (z / _excess(p_lost, p_gained, max_drop)) ** 2
    if rows > _NEVER:
        return None
    found = max(1, math.ceil(rows - 1e-9))
    # rounding may have put it on the wrong side of the bound
    enough = tango_upper_bound(p_lost * found, p_gained * found, found, confidence) <= max_drop
    return found if enough else found + 1


def _excess(p_lost: float, p_gained: float, drop: float) -> float:
    """The score statistic for a drop, divided by the square root of the rows."""
    variance = 2 * _gain_given(p_lost, p_gained, drop) + drop * (1 - drop)
    distance = p_lost - p_gained - drop
    return distance / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, distance) if distance else 0.0


def _gain_given(p_lost: float, p_gained: float, drop: float) -> float:
    """Most likely rate of gained rows when the drop is `drop` (Tango 1998, equation 15), from the rates observed.

    The root of 2 q^2 + b q - p_gained * drop * (1 - drop), in the form that does not subtract nearly equal numbers.
    """
    b = -p_lost - p_gained + (2 - p_lost + p_gained) * drop
    c = -p_gained * drop * (1 - drop)
    root = math.sqrt(max(0.0, b * b - 8 * c))
    if b <= 0:
        return (root - b) / 4
    return -2 * c / (root + b)


def _checked_quantile(lost: float, gained: float, n: float, confidence: float) -> float:
    if lost < 0 or gained < 0 or lost + gained > n * (1 + 1e-12):
        raise ValueError(f"{lost} lost and {gained} gained of {n} rows cannot be")
    if not 0.5 <= confidence < 1:
        raise ValueError(f"confidence must be in [0.5, 1), got {confidence}")
    return NormalDist().inv_cdf(confidence)


@dataclass(frozen=True)
class Judgement:
    """What labelled rows say about an engine. Drops, bounds and accuracies are fractions, not points.

    Args:
        rows: how many were judged.
        lost: rows that FP32 gets right and the engine wrong.
        gained: rows that the engine gets right and FP32 wrong.
        agreement: share of rows with the same answer.
        accuracy, reference_accuracy: of the engine and of FP32.
        drop: (lost - gained) / rows.
        bound, lower_bound: one-sided bounds of the true drop, each at `confidence`.
        max_drop: the budget.
        p_value: exact McNemar test of "no difference".
        per_class: for each class with rows: (name, rows, lost, gained).
        verdict: pass, fail or underpowered.
        simulated: judged in another runtime than the one that is exported.
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

    @property
    def passed(self) -> bool:
        """Whether the upper bound of the drop is within the budget."""
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

    A row is right when every task of it is: the highest score of a `one_of` task stands at the true class, and the scores of an
    `any_of` task are at least 0.5 exactly where they should be. A row with a score that is not finite is wrong.

    Args:
        max_drop_pp: the budget, percentage points.
        simulated: the engine is not in the runtime that will be used.

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
    if not same_rows or not np.array_equal(reference.targets, candidate.targets):
        raise ValueError("reference and candidate must have answered the same labelled rows")
    labels, n, budget = reference.labels, len(reference), max_drop_pp / 100
    truth, was, now = (_answers(part, labels) for part in (reference.targets, reference.scores, candidate.scores))
    right_was, right_now = (was == truth).all(1), (now == truth).all(1)
    lost_rows, gained_rows = right_was & ~right_now, right_now & ~right_was
    lost, gained = int(lost_rows.sum()), int(gained_rows.sum())
    upper = tango_upper_bound(lost, gained, n, confidence)
    lower = tango_lower_bound(lost, gained, n, confidence)
    member = (reference.targets[:, k] > 0 for k in range(labels.size))  # one class at a time: K may be thousands
    return Judgement(
        rows=n,
        lost=lost,
        gained=gained,
        agreement=_share((was == now).all(1)),
        accuracy=_share(right_now),
        reference_accuracy=_share(right_was),
        drop=(lost - gained) / max(n, 1),
        bound=upper,
        lower_bound=lower,
        max_drop=budget,
        p_value=mcnemar_exact(lost, gained),
        per_class=tuple(
            (name, int(of.sum()), int((lost_rows & of).sum()), int((gained_rows & of).sum()))
            for name, of in zip(labels.classes, member, strict=True)
            if of.any()
        ),
        verdict="pass" if upper <= budget else "fail" if lower > budget else "underpowered",
        simulated=simulated,
        rows_needed=rows_needed(budget, lost, gained, n, confidence),
        confidence=confidence,
    )


@dataclass(frozen=True)
class Difference:
    """Which of two models is better on the rows that both have answered.

    Args:
        rows: how many those are.
        lost, gained: rows that only the reference, or only the candidate, gets right.
        gain: accuracy of the candidate minus that of the reference on these rows, a fraction.
        low, high: two-sided interval of the gain; None where rows of one group belong together.
        p_value: of "no difference".
        verdict: better, worse, or even where the rows cannot tell.
        balanced_gain: the same difference of balanced accuracies (each class counts the same).
        balanced_p: of "no difference" there, by random signs.
        balanced_verdict: as `verdict`, of the balanced accuracies.
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
    was = (reference.predicted == reference.truth)[ours]
    now = (candidate.predicted == candidate.truth)[theirs]
    return _difference(reference.truth[ours], was, now, None if group is None else group[rows], confidence)


def against_majority(predictions: Predictions, group: np.ndarray | None = None) -> tuple[int, Difference]:
    """The most frequent class of n > 0 labelled rows, and how a model compares with giving this answer to all of them.

    The class is that of the judged rows themselves, so no constant answer does better.

    Args:
        group: as in `compare`.

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
    """Whether every row has its class in every one_of task."""
    return all((targets[:, part] > 0).any(1).all() for task, part in labels.parts if task.kind == "one_of")


def _answers(scores: np.ndarray, labels: LabelSpace) -> np.ndarray:
    """(n, answers) int64: the class of each one_of task, each yes or no of the any_of tasks; -1 where a score is not finite."""
    parts, first = [], 0
    for task in labels.tasks:
        own = scores[:, first : first + len(task.classes)]
        parts.append(own.argmax(1)[:, None] if task.kind == "one_of" else (own >= 0.5).astype(np.int64))
        first += len(task.classes)
    return np.where(np.isfinite(scores).all(1, keepdims=True), np.concatenate(parts, 1), -1)


def _share(rows: np.ndarray) -> float:
    return float(rows.mean()) if len(rows) else 0.0
