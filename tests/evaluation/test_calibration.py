"""Confidence against reality: bins, coverage and temperature."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.special import log_softmax, softmax
from sklearn.metrics import log_loss

from imgcls_fast.evaluation.calibration import apply_temperature, coverage, fit_temperature, reliability
from imgcls_fast.evaluation.metrics import judge

LOGITS = hnp.arrays(np.float32, st.tuples(st.integers(1, 12), st.integers(2, 6)), elements=st.floats(-30, 30, width=32))


def plain_ece(confidence: np.ndarray, correct: np.ndarray, bins: int) -> float:
    total = 0.0
    for k in range(bins):
        low, high = k / bins, (k + 1) / bins
        inside = [i for i, c in enumerate(confidence) if low < c <= high or (k == 0 and c == 0)]
        if inside:
            gap = abs(np.mean([correct[i] for i in inside]) - np.mean([float(confidence[i]) for i in inside]))
            total += gap * len(inside) / len(confidence)
    return total


@pytest.mark.parametrize("bins", [1, 4, 15])
@pytest.mark.parametrize("n", [1, 7, 500])
def test_ece_is_its_formula(n, bins):
    draw = np.random.default_rng([n, bins])
    confidence = draw.random(n)
    correct = draw.random(n) < confidence**2
    assert reliability(confidence, correct, bins).ece == pytest.approx(plain_ece(confidence, correct, bins))


def test_edges_belong_to_the_bin_below_and_zero_and_one_are_counted():
    confidence = np.array([0.0, 0.25, 0.2500001, 0.5, 0.75, 1.0, 1.0])
    got = reliability(confidence, np.ones(7, bool), 4)
    assert got.count.tolist() == [2, 2, 1, 2] and got.edges.tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert np.isnan(reliability(np.array([0.9]), np.array([True]), 4).accuracy[:3]).all()


def test_ece_of_judge_uses_15_bins_of_the_highest_score(drawn, predictions_of):
    scores, truth = drawn(400, 5)
    got = judge(predictions_of(scores, truth), bootstrap=0)
    assert got.ece == pytest.approx(plain_ece(scores.max(1), scores.argmax(1) == truth, 15), abs=1e-9)
    assert got.reliability.count.sum() == 400 and len(got.reliability.count) == 15


def test_honest_confidence_has_hardly_any_ece_and_certainty_has_the_error_rate():
    draw = np.random.default_rng(0)
    confidence = draw.random(40_000)
    assert reliability(confidence, draw.random(40_000) < confidence).ece < 0.02
    assert reliability(np.ones(8), np.arange(8) < 6).ece == pytest.approx(0.25)


def test_coverage_is_the_accuracy_of_the_most_confident_rows():
    draw = np.random.default_rng(1)
    confidence, correct = draw.permutation(200) / 200, draw.random(200) < 0.7
    got, order = coverage(confidence, correct), np.argsort(-confidence)
    assert len(got.fraction) == 100 and got.fraction[-1] == 1
    for fraction, accuracy, threshold in zip(got.fraction, got.accuracy, got.threshold, strict=True):
        answered = order[: round(fraction * 200)]
        assert accuracy == pytest.approx(correct[answered].mean()) and threshold == confidence[answered].min()
    assert got.at(0.5) == pytest.approx(correct[order[:100]].mean()) and got.at(1) == pytest.approx(correct.mean())


def test_coverage_does_not_depend_on_the_order_of_rows_with_equal_confidence():
    draw = np.random.default_rng(2)
    confidence, correct = draw.integers(1, 5, 90) / 4, draw.random(90) < 0.5
    order = draw.permutation(90)
    np.testing.assert_allclose(
        coverage(confidence, correct).accuracy, coverage(confidence[order], correct[order]).accuracy
    )
    constant = coverage(np.full(90, 0.6), correct)
    np.testing.assert_allclose(constant.accuracy, correct.mean())


def test_coverage_of_one_row_is_one_point():
    got = coverage(np.array([0.7]), np.array([True]))
    assert (got.fraction.tolist(), got.accuracy.tolist(), got.threshold.tolist()) == ([1], [1], [0.7])


@pytest.mark.parametrize("planted", [0.3, 1.0, 2.5, 8.0])
@pytest.mark.parametrize("logs", [False, True])
def test_a_planted_temperature_is_found_from_logits_and_from_log_probabilities(planted, logs):
    draw = np.random.default_rng(0)
    honest = draw.normal(0, 2, (6000, 4))
    truth = (softmax(honest, 1).cumsum(1) < draw.random((6000, 1))).sum(1).clip(0, 3)
    given_scores = log_softmax(honest * planted, 1) if logs else honest * planted
    assert fit_temperature(given_scores, truth) == pytest.approx(planted, rel=0.05)


@settings(deadline=None, max_examples=100)
@given(LOGITS, st.data())
def test_the_temperature_never_worsens_the_log_loss_and_stays_in_its_range(logits, data):
    n, size = logits.shape
    truth = np.array(data.draw(st.lists(st.integers(0, size - 1), min_size=n, max_size=n)))
    found = fit_temperature(logits, truth)
    assert 0.05 <= found <= 20 + 1e-9

    def loss(temperature: float) -> float:
        return float(-log_softmax(logits.astype(np.float64) / temperature, 1)[np.arange(n), truth].mean())

    assert loss(found) <= loss(1) + 1e-9


@settings(deadline=None, max_examples=100)
@given(LOGITS, st.floats(0.05, 20))
def test_temperature_keeps_the_argmax_and_gives_probabilities(logits, temperature):
    got = apply_temperature(logits, temperature)
    assert got.dtype == np.float32 and got.shape == logits.shape
    np.testing.assert_array_equal(got.argmax(1), logits.argmax(1))
    np.testing.assert_allclose(got.sum(1), 1, rtol=1e-5)
    np.testing.assert_allclose(got, softmax(logits.astype(np.float64) / temperature, 1), atol=1e-6)


def test_neighbouring_logits_keep_their_order_although_float32_probabilities_would_be_equal():
    logits = np.array([[1, np.nextafter(np.float32(1), np.float32(2))], [3, 3], [5, -5]], np.float32)
    assert apply_temperature(logits, 20.0).argmax(1).tolist() == [1, 0, 0]


def test_a_fitted_temperature_lowers_log_loss_and_ece_but_not_accuracy(drawn, predictions_of):
    scores, truth = drawn(3000, 4)
    sure = apply_temperature(np.log(scores), 0.3)
    with np.errstate(divide="ignore"):
        logs = np.log(sure)
    calmed = apply_temperature(logs, fit_temperature(logs, truth))
    before, after = (judge(predictions_of(x, truth), bootstrap=0) for x in (sure, calmed))
    assert after.accuracy == before.accuracy
    assert after.ece < before.ece / 2 and after.log_loss < before.log_loss
    assert after.log_loss == pytest.approx(log_loss(truth, calmed), rel=1e-5)


def test_a_log_of_zero_is_allowed_and_stays_finite():
    logs = np.log(np.array([[1.0, 1e-300, 1e-9], [0.5, 0.5, 1e-9]]))
    logs[0, 1] = -math.inf
    assert math.isfinite(fit_temperature(logs, np.array([1, 0])))
    assert np.isfinite(apply_temperature(logs, 2.0)).all()
    np.testing.assert_array_equal(logs[0, 1], -math.inf)


@pytest.mark.parametrize(
    ("logits", "truth"),
    [
        (np.zeros((0, 3)), np.zeros(0, int)),
        (np.zeros((2, 3)), np.zeros(3, int)),
        (np.zeros(3), np.zeros(3, int)),
        (np.zeros((2, 3)), np.array([0, 3])),
        (np.zeros((2, 3)), np.array([-1, 0])),
        (np.array([[0.0, math.nan]]), np.array([0])),
        (np.array([[0.0, math.inf]]), np.array([0])),
        (np.array([[-math.inf, -math.inf]]), np.array([0])),
    ],
)
def test_nothing_is_fitted_to_what_makes_no_sense(logits, truth):
    with pytest.raises(ValueError, match=r"need log_scores|labels must lie|NaN or \+inf|every column"):
        fit_temperature(logits, truth)
