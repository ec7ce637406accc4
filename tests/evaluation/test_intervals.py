"""The bootstrap intervals: repeatable, around the figure, as wide as theory says."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import f1_score

from imgcls_fast.evaluation.metrics import judge


def with_hits(hits: int, n: int, predictions_of):
    """Predictions of two classes of which the first `hits` are right."""
    scores = np.tile(np.float32([0.8, 0.2]), (n, 1))
    return predictions_of(scores, (np.arange(n) >= hits).astype(np.int64))


def test_equal_seeds_give_equal_intervals_and_other_seeds_nearly_equal_ones(drawn, predictions_of):
    ours = predictions_of(*drawn(300, 4))
    one, again, other = (judge(ours, seed=seed) for seed in (3, 3, 4))
    assert (one.accuracy_ci, one.macro_f1_ci) == (again.accuracy_ci, again.macro_f1_ci)
    assert one.macro_f1_ci != other.macro_f1_ci
    np.testing.assert_allclose(one.accuracy_ci, other.accuracy_ci, atol=0.02)
    np.testing.assert_allclose(one.macro_f1_ci, other.macro_f1_ci, atol=0.02)
    assert one.accuracy == other.accuracy and one.log_loss == other.log_loss


@settings(deadline=None, max_examples=80)
@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.integers(0, 9))
def test_the_accuracy_lies_in_its_interval(predictions_of, counts, seed):
    got = judge(with_hits(*counts, predictions_of), bootstrap=200, seed=seed)
    low, high = got.accuracy_ci
    assert 0 <= low <= got.accuracy <= high <= 1 and low < high


@pytest.mark.parametrize("hits", [250, 400, 475])
def test_the_interval_is_that_of_the_binomial_distribution(hits, predictions_of):
    got = judge(with_hits(hits, 500, predictions_of), bootstrap=4000)
    half = 1.96 * math.sqrt(got.accuracy * (1 - got.accuracy) / 500)
    np.testing.assert_allclose(got.accuracy_ci, [got.accuracy - half, got.accuracy + half], atol=0.1 * half + 0.002)
    exact = stats.binomtest(hits, 500).proportion_ci(0.95, method="wilson")
    np.testing.assert_allclose(got.accuracy_ci, [exact.low, exact.high], atol=0.006)


def test_four_times_the_rows_halve_the_width(predictions_of):
    widths = [
        np.ptp(judge(with_hits(3 * n // 4, n, predictions_of), bootstrap=4000).accuracy_ci) for n in (400, 1600, 6400)
    ]
    np.testing.assert_allclose(widths[:-1], 2 * np.array(widths[1:]), rtol=0.12)
    assert widths[0] > widths[1] > widths[2]


@pytest.mark.parametrize("hits", [0, 40])
def test_all_right_and_all_wrong_get_the_exact_interval_and_a_warning(hits, predictions_of):
    got = judge(with_hits(hits, 40, predictions_of))
    exact = stats.binomtest(hits, 40).proportion_ci(0.95, method="exact")
    np.testing.assert_allclose(got.accuracy_ci, [exact.low, exact.high], rtol=1e-9)
    assert any("Clopper-Pearson" in text for text in got.warnings)


def test_less_confidence_is_a_narrower_interval(drawn, predictions_of):
    ours = predictions_of(*drawn(300, 4))
    wide, narrow = judge(ours, confidence=0.99), judge(ours, confidence=0.5)
    for name in ("accuracy_ci", "macro_f1_ci"):
        assert np.ptp(getattr(narrow, name)) < np.ptp(getattr(wide, name))
    assert narrow.confidence_level == 0.5


@pytest.mark.parametrize("absent", [False, True])
def test_the_interval_of_macro_f1_is_that_of_resampled_rows(absent, drawn, predictions_of):
    scores, truth = drawn(250, 4)
    if absent:
        truth[truth == 2] = 0
    got = judge(predictions_of(scores, truth), bootstrap=2000)
    draw, predicted, figures = np.random.default_rng(5), scores.argmax(1), []
    for _ in range(300):
        rows = draw.integers(0, 250, 250)
        present = np.unique(truth[rows])
        figures.append(f1_score(truth[rows], predicted[rows], labels=present, average="macro", zero_division=0))
    np.testing.assert_allclose(got.macro_f1_ci, np.quantile(figures, [0.025, 0.975]), atol=0.015)
    assert got.macro_f1_ci[0] < got.macro_f1 < got.macro_f1_ci[1]


def test_no_resamples_leave_the_intervals_undefined(drawn, predictions_of):
    got = judge(predictions_of(*drawn(30, 3)), bootstrap=0)
    assert np.isnan([*got.accuracy_ci, *got.macro_f1_ci]).all()
    assert got.to_dict()["accuracy_ci"] == [None, None]


def test_many_classes_and_rows_are_resampled_in_pieces_that_do_not_fill_the_memory(drawn, predictions_of):
    got = judge(predictions_of(*drawn(6000, 300)), bootstrap=500)
    assert got.macro_f1_ci[0] < got.macro_f1 < got.macro_f1_ci[1]
