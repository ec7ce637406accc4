"""Resamples rows for intervals of figures of any kind of task: all tasks of a row are drawn together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_CELLS = 2_000_000  # weights in memory at a time
_AP_CELLS = 200_000_000  # entries that are summed for the intervals of average precision: 1 to 2 seconds
_LEAST_DRAWS = 100


@dataclass(frozen=True, eq=False)
class Answers:
    """What a model answered to one task, beside what is true.

    Args:
        scores: (n, K) float.
        given, true, known: (n, K) bool; an entry that is not known is in neither of the others.
        right: (n,) float64 share of right answers of each row, NaN where nothing of the row is known.
    """

    scores: np.ndarray
    given: np.ndarray
    true: np.ndarray
    known: np.ndarray
    right: np.ndarray


@dataclass(frozen=True, eq=False)
class Resampled:
    """(draws,) float64 figures of resampled rows, each the mean over the tasks; NaN where undefined."""

    macro_f1: np.ndarray
    macro_ap: np.ndarray


def resample(tasks: Sequence[Answers], draws: int, seed: int = 0) -> Resampled:
    """Draw as many rows as there are, again and again.

    Average precision of large data is resampled less often than the rest, 100 times at least: it needs a pass over the sorted
    rows of each class.
    """
    n = len(tasks[0].right)
    rng = np.random.default_rng([seed, 2])
    cells = sum(task.scores.size for task in tasks)
    ranked = min(draws, max(_LEAST_DRAWS, _AP_CELLS // max(1, cells)))
    f1, ap = [], []
    chunk = max(1, _CELLS // n)
    for start in range(0, draws, chunk):
        weight = rng.multinomial(n, np.full(n, 1 / n), size=min(chunk, draws - start)).astype(np.float32)  # (m, n)
        f1.append(_mean([_macro_f1(task, weight) for task in tasks]))
        if start < ranked:
            ap.append(_mean([_macro_ap(task, weight[: ranked - start]) for task in tasks]))
    return Resampled(*(np.concatenate(part) if part else np.zeros(0) for part in (f1, ap)))


def resampled_interval(draws: np.ndarray, confidence: float) -> tuple[float, float]:
    """`percentiles`, and NaN where no resample differs: rows without an error cannot show how often there is one."""
    low, high = percentiles(draws, confidence)
    return (low, high) if low < high else (float("nan"), float("nan"))


def percentiles(draws: np.ndarray, confidence: float) -> tuple[float, float]:
    """The middle part of resampled figures; NaN where there are none."""
    known = draws[~np.isnan(draws)]
    if not len(known):
        return float("nan"), float("nan")
    low, high = np.quantile(known, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _macro_f1(task: Answers, weight: np.ndarray) -> np.ndarray:
    hits = weight @ (task.given & task.true).astype(np.float32)  # (m, K)
    support = weight @ task.true.astype(np.float32)
    f1 = _over(2 * hits, support + weight @ task.given.astype(np.float32))
    return _over(np.where(support > 0, f1, 0).sum(1), (support > 0).sum(1))


def _macro_ap(task: Answers, weight: np.ndarray) -> np.ndarray:
    total, classes = np.zeros(len(weight)), np.zeros(len(weight))
    for k in range(task.scores.shape[1]):
        rows = np.flatnonzero(task.known[:, k])
        order = rows[np.argsort(-task.scores[rows, k], kind="stable")]
        positive = task.true[order, k]
        if not positive.any():
            continue
        ends = np.flatnonzero(np.append(np.diff(task.scores[order, k]) != 0, True))  # equal scores enter together
        drawn = weight[:, order]
        seen = np.cumsum(drawn, 1, dtype=np.float64)[:, ends]
        hits = np.cumsum(drawn * positive, 1, dtype=np.float64)[:, ends]
        gained = np.diff(hits, axis=1, prepend=0.0)
        found = hits[:, -1]
        total += np.where(found > 0, _over((gained * hits / np.maximum(seen, 1)).sum(1), found), 0.0)
        classes += found > 0
    return _over(total, classes)


def _mean(figures: list[np.ndarray]) -> np.ndarray:
    """Mean over the tasks that define a figure, for each draw."""
    stacked = np.stack(figures)
    known = ~np.isnan(stacked)
    return _over(np.where(known, stacked, 0.0).sum(0), known.sum(0))


def _over(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole, NaN where whole is 0."""
    share: np.ndarray = np.divide(part, whole, out=np.full(np.shape(part), np.nan), where=whole > 0)
    return share
