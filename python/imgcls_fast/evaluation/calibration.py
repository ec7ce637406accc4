"""Measures whether the confidence of a model can be believed, and scales it: reliability, coverage, temperatures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..core.labels import LabelSpace
from ..core.predictions import Predictions

BINS = 15  # equal-width bins of Guo et al. 2017
COVERAGE_POINTS = 100  # 1 %, 2 %, ... 100 % of the rows
TEMPERATURES = (0.05, 20.0)
WORTH_TELLING = 0.5  # nats over all rows together that another T than 1 must gain
_LEAST, _MOST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).epsneg)
_GRID, _GOLDEN = 25, (5**0.5 - 1) / 2


@dataclass(frozen=True, eq=False)
class Reliability:
    """Confidence against accuracy in B equal-width bins (lo, hi] of confidence; empty bins hold NaN.

    Args:
        edges: (B + 1,) float64 from 0 to 1.
        count: (B,) int64 rows in the bin.
        confidence, accuracy: (B,) float64 means over the bin.
    """

    edges: np.ndarray
    count: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray

    @property
    def ece(self) -> float:
        """Expected calibration error in [0, 1]: mean |accuracy - confidence|, weighted by the rows in each bin."""
        used = self.count > 0
        gap = np.abs(self.accuracy[used] - self.confidence[used])
        return float((gap * self.count[used]).sum() / self.count.sum())


@dataclass(frozen=True, eq=False)
class Coverage:
    """Accuracy gained by answering only where the model is sure.

    Args:
        fraction: (P,) float64, share of the rows that are answered, the most confident first.
        accuracy: (P,) float64 over the answered rows.
        threshold: (P,) float64, the lowest confidence that is answered.
    """

    fraction: np.ndarray
    accuracy: np.ndarray
    threshold: np.ndarray

    def at(self, fraction: float) -> float:
        """Accuracy when `fraction` of the rows is answered (nearest point of the curve)."""
        return float(self.accuracy[np.abs(self.fraction - fraction).argmin()])


def reliability(confidence: np.ndarray, correct: np.ndarray, bins: int = BINS) -> Reliability:
    """Sort rows into bins of confidence.

    Args:
        confidence: (n,) in [0, 1], highest score of each row.
        correct: (n,) bool.

    Source: Guo, Pleiss, Sun, Weinberger, "On Calibration of Modern Neural Networks", ICML 2017, section 2.
    """
    edges = np.linspace(0.0, 1.0, bins + 1)
    index = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)  # (lo, hi]
    count = np.bincount(index, minlength=bins)
    with np.errstate(invalid="ignore"):
        mean_confidence = np.bincount(index, confidence.astype(np.float64), minlength=bins) / count
        accuracy = np.bincount(index, correct.astype(np.float64), minlength=bins) / count
    return Reliability(edges, count, mean_confidence, accuracy)


def coverage(confidence: np.ndarray, correct: np.ndarray) -> Coverage:
    """Accuracy of the most confident x % of the rows, for x = 1 .. 100 (fewer points for fewer rows).

    Rows of equal confidence have no order, so each counts with the mean of its tie: the curve does not depend on the
    order of the rows.
    """
    n = len(confidence)
    _, tie, size = np.unique(confidence, return_inverse=True, return_counts=True)
    expected = (np.bincount(tie, correct.astype(np.float64)) / size)[tie]
    order = np.argsort(-confidence, kind="stable")
    running = np.cumsum(expected[order]) / np.arange(1, n + 1)
    points = min(n, COVERAGE_POINTS)
    answered = np.ceil(np.arange(1, points + 1) * n / points).astype(np.int64)  # rows, last one is n
    return Coverage(answered / n, running[answered - 1], confidence[order][answered - 1].astype(np.float64))


def apply_temperature(log_scores: np.ndarray, temperature: float) -> np.ndarray:
    """softmax(log_scores / temperature), (n, K) float32, of logits or log-probabilities; the argmax never changes."""
    z = _finite(log_scores) / temperature
    e = np.exp(z - z.max(1, keepdims=True))
    scores = np.asarray(e / e.sum(1, keepdims=True), np.float32)
    best = z.argmax(1)
    tied = np.flatnonzero(scores.argmax(1) != best)  # rounding made a lower score equal to the highest
    scores[tied, best[tied]] = np.nextafter(scores[tied, best[tied]], np.float32(1))
    return scores


def apply_sigmoid_temperature(log_odds: np.ndarray, temperature: float) -> np.ndarray:
    """sigmoid(log_odds / temperature), float32 of any shape; the order of two scores never changes."""
    z = np.asarray(log_odds, np.float64) / temperature
    return np.asarray(np.where(z >= 0, 1.0, np.exp(np.minimum(z, 0))) / (1 + np.exp(-np.abs(z))), np.float32)


def log_odds_of(scores: np.ndarray) -> np.ndarray:
    """float64 log(s / (1 - s)) of probabilities; 0 and 1 become what float32 can hold next to them."""
    s = np.clip(np.asarray(scores, np.float64), _LEAST, 1 - _MOST)
    return np.asarray(np.log(s) - np.log1p(-s))


def fit_temperatures(predictions: Predictions) -> tuple[float, ...]:
    """One temperature per task, fitted to the rows in which its answer is known; 1 for a task without such rows.

    `one_of`: `fit_temperature`. `any_of`: the same with each known class of each row as a question with two answers, whose logits
    are 0 and the log-odds of the score. Labels that are probabilities enter as such.

    Args:
        predictions: labelled validation rows with scores of a model at temperature 1.

    Raises:
        ValueError: no labels.
    """
    if predictions.targets is None:
        raise ValueError("temperatures are fitted to labelled rows")
    found = []
    for k, task in enumerate(predictions.labels.tasks):
        own = predictions.of_task(k)
        if not len(own):
            found.append(1.0)
            continue
        targets = np.asarray(own.targets)
        if task.kind == "one_of":
            soft = bool(((targets > 0) & (targets < 1)).any())
            found.append(fit_temperature(log_scores_of(own.scores), targets if soft else own.truth))
        else:
            known = ~np.isnan(targets)
            odds, holds = log_odds_of(own.scores[known]), targets[known].astype(np.float64)
            pairs = np.stack([np.zeros_like(odds), odds], 1)
            found.append(fit_temperature(pairs, np.stack([1 - holds, holds], 1)))
    return tuple(found)


def with_temperatures(scores: np.ndarray, labels: LabelSpace, temperatures: Sequence[float]) -> np.ndarray:
    """(n, K) float32 scores as a model with these temperatures gives them, from its scores at temperature 1."""
    out = np.empty(scores.shape, np.float32)
    for (task, part), temperature in zip(labels.parts, temperatures, strict=True):
        if task.kind == "one_of":
            out[:, part] = apply_temperature(log_scores_of(scores[:, part]), temperature)
        else:
            out[:, part] = apply_sigmoid_temperature(log_odds_of(scores[:, part]), temperature)
    return out


def log_scores_of(scores: np.ndarray) -> np.ndarray:
    """Logarithm of float32 probabilities; below the smallest normal number a score has lost its own."""
    return np.asarray(np.log(np.maximum(scores, np.finfo(np.float32).tiny)))


def fit_temperature(log_scores: np.ndarray, truth: np.ndarray) -> float:
    """Return the temperature T in [0.05, 20] that these rows and a prior make most likely; exactly 1 where they show no better one.

    The likelihood alone runs to the bound when all rows are right, and puts a confidence of 1 on unseen mistakes. So
    log T has a prior around 0: normal below (sharper scores risk the most), Student's t with 3 degrees of freedom above
    (strong overconfidence is common, and a hundred rows show it). Its scale is in units of what the log-loss can move
    by: the narrower, the larger the variance of the logits within a row. A gain of less than half a nat over all rows
    together leaves T at 1.

    Simulated on unseen rows (docs/evaluation.md): calibrated scores of 2 to 100 classes, 10 to 1,000 rows: log-loss at
    most 0.003 above that of T = 1 (the likelihood alone: up to 0.7). Overconfident by a factor of 2 or 3, 100 rows: 75
    to 100 % of the best possible gain, where the likelihood alone has 83 to 100 %; the low end is two classes with 8
    errors in 100 rows.

    Fit on validation rows, never on test rows. The result is never worse than T = 1 on the rows it saw.

    Args:
        log_scores: (n, K) logits or log-probabilities (log 0 = -inf is allowed).
        truth: (n,) int column of the true class, or (n, K) probabilities that sum to 1 per row.

    Raises:
        ValueError: no rows, NaN or +inf, or a label outside 0 .. K - 1.

    Source: temperature scaling: Guo et al. 2017, section 4.2.
    """
    if log_scores.ndim != 2 or len(log_scores) == 0 or len(truth) != len(log_scores):
        raise ValueError(f"need log_scores (n, K) and truth (n,) with n > 0, got {log_scores.shape} and {truth.shape}")
    if truth.ndim == 1 and (truth.min() < 0 or truth.max() >= log_scores.shape[1]):
        raise ValueError(f"labels must lie in 0 .. {log_scores.shape[1] - 1}, got {truth.min()} .. {truth.max()}")
    z = _finite(log_scores)
    z -= z.max(1, keepdims=True)
    of_truth = float(z[np.arange(len(z)), truth].sum() if truth.ndim == 1 else (z * truth).sum())
    scale = _prior_scale(z)

    def loss(log_t: float) -> float:
        inverse = np.exp(-log_t)
        return float(np.log(np.exp(z * inverse).sum(1)).sum()) - of_truth * inverse

    def cost(log_t: float) -> float:
        u = log_t / scale
        return loss(log_t) + float(2 * np.log1p(u * u / 3) if log_t > 0 else 2 / 3 * u * u)  # equal curvature at 0

    best = _lowest(cost, float(np.log(TEMPERATURES[0])), float(np.log(TEMPERATURES[1])))
    return float(np.exp(best)) if loss(best) + WORTH_TELLING <= loss(0.0) else 1.0


def _prior_scale(z: np.ndarray) -> float:
    """Scale of the prior on log T: near T = 1 the log-loss rises by half the variance of z within a row, times (log T)^2."""
    e = np.exp(z)
    p = e / e.sum(1, keepdims=True)
    middle = (p * z).sum(1, keepdims=True)
    variance = float((p * (z - middle) ** 2).sum(1).mean())
    return min(0.4, 0.18 / np.sqrt(max(variance, 1e-12)))


def _lowest(cost: Callable[[float], float], low: float, high: float) -> float:
    """Where a function with few valleys is lowest, to 1e-5: a grid, then golden sections beside its best point."""
    grid = np.linspace(low, high, _GRID)
    k = int(np.argmin([cost(float(x)) for x in grid]))
    a, b = float(grid[max(k - 1, 0)]), float(grid[min(k + 1, len(grid) - 1)])
    c, d = b - _GOLDEN * (b - a), a + _GOLDEN * (b - a)
    at_c, at_d = cost(c), cost(d)
    while b - a > 1e-5:
        if at_c < at_d:
            b, d, at_d = d, c, at_c
            c = b - _GOLDEN * (b - a)
            at_c = cost(c)
        else:
            a, c, at_c = c, d, at_d
            d = a + _GOLDEN * (b - a)
            at_d = cost(d)
    return (a + b) / 2


def _finite(log_scores: np.ndarray) -> np.ndarray:
    """float64 copy with log 0 replaced by the log of the smallest positive float32, far below the row's highest."""
    z = np.array(log_scores, np.float64)
    if np.isnan(z).any() or np.isposinf(z).any():
        raise ValueError("log scores contain NaN or +inf")
    top = z.max(1, keepdims=True)
    if np.isneginf(top).any():
        raise ValueError("a row of log scores is -inf in every column")
    return np.where(np.isneginf(z), top + np.log(np.finfo(np.float32).smallest_subnormal), z)
