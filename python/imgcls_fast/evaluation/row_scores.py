"""Scores how right each row is, whatever kinds of labels it has."""

from __future__ import annotations

import numpy as np

from ..core.errors import DataError
from ..core.labels import known
from ..core.predictions import Predictions


def row_scores(predictions: Predictions) -> dict[str, np.ndarray]:
    """Return how right each row is, as (n,) float64; NaN where nothing of it is known.

    A row with a score that is not finite is wrong in all that is known of it.

    Returns:
        One-label data: "accuracy" (0 or 1). Others: "exact_match" (1 where each known answer is right, else 0) and "per_label" (mean
        over the tasks that are known of 0 or 1 for `one_of`, of the share of right known classes for `any_of`).

    Raises:
        DataError: D004 when there are no labels.
    """
    shares = task_shares(predictions)
    judged = ~np.isnan(shares)
    some = judged.any(1)
    exact = np.where(some, (~judged | (shares == 1)).all(1), np.nan)
    if predictions.labels.is_single:
        return {"accuracy": exact}
    mean = np.divide(np.where(judged, shares, 0).sum(1), judged.sum(1), out=np.full(len(some), np.nan), where=some)
    return {"exact_match": exact, "per_label": mean}


def task_shares(predictions: Predictions) -> np.ndarray:
    """(n, tasks) float64 share of right answers of each row to each task; NaN where nothing of the answer is known.

    Raises:
        DataError: D004 when there are no labels.
    """
    if predictions.targets is None:
        raise DataError("D004", "these predictions have no labels, so they cannot be judged")
    labels, right = predictions.labels, right_answers(predictions)
    shares = np.full((len(predictions), len(labels.tasks)), np.nan)
    for k, part in enumerate(labels.slices):
        rows = known(predictions.targets, part)
        there = ~np.isnan(predictions.targets[rows, part])
        shares[rows, k] = (right[rows, part] & there).sum(1) / there.sum(1)
    return shares


def task_weights(shares: np.ndarray) -> np.ndarray:
    """(tasks,) by which shares are multiplied, so that the mean over rows of their sum is the mean over tasks of their means.

    Args:
        shares: (n, tasks) of n rows of which something is known, NaN where unknown.
    """
    rows = (~np.isnan(shares)).sum(0)
    return np.where(rows > 0, len(shares) / np.maximum(rows, 1) / max(1, int((rows > 0).sum())), 0.0)


def linear_shares(shares: np.ndarray) -> np.ndarray:
    """(n,) whose mean is the mean over tasks of their means, and whose spread is that of this figure: what is missing adds none.

    Args:
        shares: (n, tasks) right shares, NaN where unknown, with an answer to each task in some row.
    """
    means = np.nanmean(shares, 0)
    linear: np.ndarray = means.mean() + np.nansum((shares - means) * task_weights(shares), 1)
    return linear


def right_answers(predictions: Predictions) -> np.ndarray:
    """(n, K) bool: whether the answer to each column is right; in columns of a `one_of` task whether that of the task is.

    Where the truth is unknown it means nothing; in a row with a score that is not finite nothing is right.
    """
    labels, targets = predictions.labels, np.asarray(predictions.targets)
    equal: np.ndarray = predictions.answers == labels.decide(targets)
    equal &= np.isfinite(predictions.scores).all(1, keepdims=True)
    for task, part in labels.parts:
        if task.kind == "one_of":
            equal[:, part] = equal[:, part].all(1, keepdims=True)
    return equal


def balanced_change(
    reference: Predictions, candidate: Predictions, ours: np.ndarray, theirs: np.ndarray
) -> np.ndarray:
    """(n,) what each row adds to the difference of balanced accuracies, which are means over tasks and classes.

    Args:
        ours, theirs: (n,) places of the same rows in the two.
    """
    labels, targets = reference.labels, np.asarray(reference.targets)[ours]
    true = labels.decide(targets)
    was, now = right_answers(reference)[ours], right_answers(candidate)[theirs]
    change, out, defined = now.astype(np.float64) - was, np.zeros(len(ours)), 0
    for task, part in labels.parts:
        own = true[:, part]
        sides = [own] if task.kind == "one_of" else [own, ~np.isnan(targets[:, part]) & ~own]
        sizes = [side.sum(0) for side in sides]
        both = np.stack([size > 0 for size in sizes]).all(0)  # classes with rows on each side
        if both.any():
            weight = sum(side / np.maximum(size, 1) for side, size in zip(sides, sizes, strict=True)) * both
            out += (change[:, part] * weight).sum(1) / (len(sides) * both.sum())
            defined += 1
    return out / max(defined, 1)
