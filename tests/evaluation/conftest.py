"""Predictions made from plain arrays, and sets of scores in which something is odd."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from imgcls_fast.core.manifest import LabelSpace
from imgcls_fast.core.predictions import Predictions

Make = Callable[..., Predictions]


def _make(
    scores: np.ndarray,
    truth: Sequence[int] | np.ndarray | None,
    classes: Sequence[str] | None = None,
    paths: Sequence[str] | None = None,
) -> Predictions:
    n, size = scores.shape
    names = tuple(classes or (f"class {k}" for k in range(size)))
    targets = None if truth is None else np.eye(size, dtype=np.float32)[np.asarray(truth, np.int64)]
    rows = np.arange(n, dtype=np.int64) * 2 + 1
    return Predictions(rows, scores, targets, LabelSpace.single(names), tuple(paths or (f"{k}.jpg" for k in range(n))))


def _drawn(n: int, size: int, seed: int = 0, skill: float = 1.5) -> tuple[np.ndarray, np.ndarray]:
    """(scores (n, K) float32, truth (n,)) of a model that is right more often than chance."""
    draw = np.random.default_rng([n, size, seed])
    truth = draw.integers(0, size, n)
    logits = draw.normal(size=(n, size))
    logits[np.arange(n), truth] += skill
    return softmaxed(logits), truth


def softmaxed(logits: np.ndarray) -> np.ndarray:
    e = np.exp(logits - logits.max(1, keepdims=True))
    return np.asarray(e / e.sum(1, keepdims=True), np.float32)


@pytest.fixture(scope="session")
def predictions_of() -> Make:
    """`predictions_of(scores, truth, classes=None, paths=None)`; rows are 1, 3, 5, ..."""
    return _make


@pytest.fixture(scope="session")
def drawn() -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    """`drawn(n, K, seed=0, skill=1.5)` -> (scores, truth)."""
    return _drawn
