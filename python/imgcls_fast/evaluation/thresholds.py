"""Fits the least score with which a class of an `any_of` task holds, on validation rows."""

from __future__ import annotations

import numpy as np

from ..core.labels import THRESHOLD
from ..core.predictions import Predictions

PRIOR = 10.0  # rows of the rarer answer with which the fitted threshold and 0.5 count alike
_EDGE = 1e-4  # thresholds stay between this and 1 minus this


def fit_thresholds(predictions: Predictions) -> np.ndarray:
    """Choose, for each class, the threshold with the highest F1 on these rows, drawn towards 0.5 where they are few.

    F1 has jumps: with few positive rows its highest point is an accident of these rows. So the log-odds of the best threshold
    are multiplied by P / (P + 10), where P is the number of positive or of negative rows, whichever is smaller.

    Simulated on fresh rows (priors 0.5 to 0.01, three skills, scores that are calibrated, shifted or too sure, 50 to 1,000 rows):
    F1 lies at most 0.009 below that of 0.5 and up to 0.21 above it, most for rare classes; the best threshold of the rows
    themselves lies up to 0.06 below. With calibrated scores the best threshold is half of the best F1 (Lipton, Elkan,
    Naryanaswamy, "Optimal Thresholding of Classifiers to Maximize F1 Measure", ECML PKDD 2014), far below 0.5 for rare classes.

    Fit on validation rows with the scores that the bundle will give, never on test rows.

    Args:
        predictions: scores and labels of one `any_of` task; probabilities of a soft label count as 1 from 0.5.

    Returns:
        (K,) float32 in (0, 1); 0.5 for a class without positive or without negative rows.

    Raises:
        ValueError: another kind of task, or no labels.
    """
    tasks = predictions.labels.tasks
    if len(tasks) != 1 or tasks[0].kind != "any_of" or predictions.targets is None:
        raise ValueError("thresholds are fitted to labelled rows of one any_of task")
    found = np.full(predictions.labels.size, THRESHOLD, np.float32)
    for k in range(predictions.labels.size):
        known = ~np.isnan(predictions.targets[:, k])
        scores, positive = predictions.scores[known, k], predictions.targets[known, k] >= THRESHOLD
        rarer = min(int(positive.sum()), int((~positive).sum()))
        if rarer:
            best = float(np.clip(_best_f1(scores, positive), _EDGE, 1 - _EDGE))
            odds = np.log(best / (1 - best)) * rarer / (rarer + PRIOR)
            found[k] = 1 / (1 + np.exp(-odds))
    return found


def _best_f1(scores: np.ndarray, positive: np.ndarray) -> float:
    """The threshold, halfway between two neighbouring scores, with the highest F1; the highest one of several."""
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order].astype(np.float64)
    ends = np.flatnonzero(np.append(np.diff(ranked) != 0, True))  # last row of each tie
    f1 = 2 * np.cumsum(positive[order])[ends] / (ends + 1 + positive.sum())
    best = int(f1.argmax())
    below = ranked[ends[best] + 1] if ends[best] + 1 < len(ranked) else 0.0
    return float((ranked[ends[best]] + below) / 2)
