"""Thresholds and temperatures of tasks of which any number of classes may hold: fitted on some rows, good on others."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import f1_score

from imgcls_fast.core.labels import LabelSpace, Task
from imgcls_fast.core.predictions import Predictions
from imgcls_fast.evaluation.calibration import (
    apply_sigmoid_temperature,
    fit_temperature,
    fit_temperatures,
    log_odds_of,
    with_temperatures,
)
from imgcls_fast.evaluation.thresholds import PRIOR, fit_thresholds


def drawn(draw: np.random.Generator, n: int, priors: np.ndarray, sharper: float = 1.0) -> Predictions:
    """Rows of normal scores; `sharper` than 1: too sure."""
    holds = draw.random((n, len(priors))) < priors
    skill = 2.0
    odds = skill * (skill * (holds - 0.5) + draw.normal(size=holds.shape)) + np.log(priors / (1 - priors))
    labels = LabelSpace((Task("label", tuple(map(str, range(len(priors)))), "any_of"),))
    scores = (1 / (1 + np.exp(-sharper * odds))).astype(np.float32)
    return Predictions(np.arange(n), scores, holds.astype(np.float32), labels, ("",) * n)


@pytest.mark.parametrize(("prior", "least_gain", "rows"), [(0.5, -0.012, 60), (0.2, -0.012, 60), (0.05, 0.02, 400)])
def test_on_fresh_rows_fitted_thresholds_are_as_good_as_a_half_and_better_for_rare_classes(prior, least_gain, rows) -> None:
    draw = np.random.default_rng(7)
    priors = np.full(60, prior)  # sixty classes are sixty independent trials
    fitted = fit_thresholds(drawn(draw, rows, priors))
    fresh = drawn(draw, 4000, priors)
    gains = []
    for k, least in enumerate(fitted):
        truth = fresh.targets[:, k]  # type: ignore[index]
        ours, half = (f1_score(truth, fresh.scores[:, k] >= t, zero_division=0) for t in (least, 0.5))
        gains.append(ours - half)
    assert np.mean(gains) >= least_gain
    assert prior == 0.5 or fitted.mean() < 0.5


def test_with_many_rows_the_threshold_is_that_of_the_highest_f1() -> None:
    predictions = drawn(np.random.default_rng(1), 3000, np.array([0.1, 0.4]))
    for k, least in enumerate(fit_thresholds(predictions)):
        truth, scores = predictions.targets[:, k], predictions.scores[:, k]  # type: ignore[index]
        best = max(f1_score(truth, scores >= t) for t in np.unique(scores)[::40])
        assert f1_score(truth, scores >= least) > best - 0.01


def test_few_positive_rows_leave_the_threshold_near_a_half_and_none_leave_it_there() -> None:
    scores = np.float32([[0.9, 0.2, 0.1], [0.1, 0.3, 0.1], [0.2, 0.1, 0.1], [0.1, 0.1, 0.2]])
    targets = np.float32([[0, 1, np.nan], [0, 0, np.nan], [0, 1, np.nan], [0, 0, np.nan]])
    labels = LabelSpace((Task("label", ("never", "twice", "unknown"), "any_of"),))
    found = fit_thresholds(Predictions(np.arange(4), scores, targets, labels, ("",) * 4))
    assert found[0] == found[2] == 0.5
    odds = np.log(0.05 / 0.95) * 2 / (2 + PRIOR)  # the best F1 of "twice" takes all four rows: half of the lowest score
    assert found[1] == pytest.approx(1 / (1 + np.exp(-odds)))
    with pytest.raises(ValueError, match="any_of"):
        fit_thresholds(Predictions(np.arange(1), np.float32([[1]]), np.float32([[1]]), LabelSpace.single(["a"]), ("",)))


@pytest.mark.parametrize("sharper", [1.0, 2.5])
def test_a_temperature_undoes_scores_that_are_too_sure_and_leaves_honest_ones(sharper: float) -> None:
    draw = np.random.default_rng(3)
    predictions = drawn(draw, 400, np.array([0.1, 0.3, 0.6]), sharper)
    (found,) = fit_temperatures(predictions)
    assert found == pytest.approx(sharper, rel=0.12)
    scores = with_temperatures(predictions.scores, predictions.labels, [found])
    assert np.array_equal(np.argsort(scores[:, 1]), np.argsort(predictions.scores[:, 1]))
    np.testing.assert_allclose(apply_sigmoid_temperature(log_odds_of(predictions.scores), 1.0), predictions.scores, atol=1e-6)


def test_each_task_has_a_temperature_of_its_own_and_unknown_answers_count_in_none() -> None:
    draw = np.random.default_rng(5)
    marks = drawn(draw, 300, np.array([0.3, 0.5]), 2.0)
    truth = draw.integers(0, 2, 300)
    logits = draw.normal(size=(300, 2)) + 2 * np.eye(2)[truth]
    e = np.exp(3 * logits)
    color = (e / e.sum(1, keepdims=True)).astype(np.float32)
    labels = LabelSpace((Task("color", ("a", "b")), Task("marks", ("x", "y"), "any_of"), Task("none", ("p", "q"))))
    targets = np.concatenate([np.eye(2, dtype=np.float32)[truth], marks.targets, np.full((300, 2), np.nan)], 1)
    targets[:100, :2], targets[50:90, 2] = np.nan, np.nan
    scores = np.concatenate([color, marks.scores, np.full((300, 2), 0.5, np.float32)], 1)
    predictions = Predictions(np.arange(300), scores, targets.astype(np.float32), labels, ("",) * 300)
    first, second, third = fit_temperatures(predictions)
    tiny = np.finfo(np.float32).tiny
    assert first == fit_temperature(np.log(np.maximum(color[100:], tiny)), truth[100:]) > 1.3
    assert 1.5 < second < 2.7 and third == 1
    changed = scores.copy()
    changed[np.isnan(targets)] = 0.123
    again = Predictions(predictions.rows, changed, predictions.targets, labels, predictions.paths)
    assert fit_temperatures(again) == (first, second, third)


def test_soft_labels_are_fitted_by_their_cross_entropy() -> None:
    draw = np.random.default_rng(8)
    logits = draw.normal(size=(200, 3)) * 2
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert fit_temperature(3 * logits, p) == pytest.approx(3, rel=0.1)  # the labels are the honest probabilities
    hot = np.eye(3)[logits.argmax(1)]
    assert fit_temperature(logits, hot) == pytest.approx(fit_temperature(logits, logits.argmax(1)), rel=1e-4)
