"""Can the confidence of a model be believed? Reliability, expected calibration error, coverage, temperature."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

BINS = 15  # equal-width bins of Guo et al. 2017
COVERAGE_POINTS = 100  # 1 %, 2 %, ... 100 % of the rows
TEMPERATURES = (0.05, 20.0)


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
    """What is gained by answering only where the model is sure.

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
        confidence: (n,) in [0, 1], the highest score of each row.
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


def fit_temperature(log_scores: np.ndarray, truth: np.ndarray) -> float:
    """The temperature T in [0.05, 20] for which softmax(log_scores / T) has the lowest log-loss on these rows.

    The log-loss is convex in b = 1 / T and its derivative, mean(E_p[z] - z_truth), grows with b, so bisection finds the
    minimum. Fit on validation rows, never on test rows. The result is never worse than T = 1 on the rows it saw.

    Args:
        log_scores: (n, K) logits or log-probabilities (log 0 = -inf is allowed).
        truth: (n,) int column of the true class.

    Raises:
        ValueError: no rows, NaN or +inf, or a label outside 0 .. K - 1.

    Source: Guo et al. 2017, section 4.2.
    """
    if log_scores.ndim != 2 or len(log_scores) == 0 or len(truth) != len(log_scores):
        raise ValueError(f"need log_scores (n, K) and truth (n,) with n > 0, got {log_scores.shape} and {truth.shape}")
    if truth.min() < 0 or truth.max() >= log_scores.shape[1]:
        raise ValueError(f"labels must lie in 0 .. {log_scores.shape[1] - 1}, got {truth.min()} .. {truth.max()}")
    z = _finite(log_scores)
    z -= z.max(1, keepdims=True)
    of_truth = z[np.arange(len(z)), truth]

    def slope(inverse: float) -> float:
        e = np.exp(z * inverse)
        return float(((e * z).sum(1) / e.sum(1) - of_truth).mean())

    low, high = 1 / TEMPERATURES[1], 1 / TEMPERATURES[0]
    if slope(low) >= 0:
        best = low
    elif slope(high) <= 0:
        best = high
    else:
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if slope(middle) < 0 else (low, middle)
        best = (low + high) / 2

    def loss(inverse: float) -> float:
        return float((np.log(np.exp(z * inverse).sum(1)) - of_truth * inverse).mean())

    return 1 / best if loss(best) < loss(1.0) else 1.0


def _finite(log_scores: np.ndarray) -> np.ndarray:
    """float64 copy with log 0 replaced by the log of the smallest positive float32, far below the row's highest."""
    z = np.array(log_scores, np.float64)
    if np.isnan(z).any() or np.isposinf(z).any():
        raise ValueError("log scores contain NaN or +inf")
    top = z.max(1, keepdims=True)
    if np.isneginf(top).any():
        raise ValueError("a row of log scores is -inf in every column")
    return np.where(np.isneginf(z), top + np.log(np.finfo(np.float32).smallest_subnormal), z)
