"""The intervals: repeatable, around the figure, as wide as theory says."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import f1_score

from imgcls_fast.evaluation.metrics import accuracy_interval, judge


def with_hits(hits: int, n: int, predictions_of):
    """Predictions of two classes of which the first `hits` are right."""
    scores = np.tile(np.float32([0.8, 0.2]), (n, 1))
    return predictions_of(scores, (np.arange(n) >= hits).astype(np.int64))


def test_equal_seeds_give_equal_intervals_and_other_seeds_nearly_equal_ones(drawn, predictions_of):
    ours = predictions_of(*drawn(300, 4))
    one, again, other = (judge(ours, seed=seed) for seed in (3, 3, 4))
    assert (one.accuracy_ci, one.macro_f1_ci) == (again.accuracy_ci, again.macro_f1_ci)
    assert one.macro_f1_ci != other.macro_f1_ci
    assert one.accuracy_ci == other.accuracy_ci, "it draws nothing"
    np.testing.assert_allclose(one.macro_f1_ci, other.macro_f1_ci, atol=0.02)
    assert one.accuracy == other.accuracy and one.log_loss == other.log_loss


@settings(deadline=None, max_examples=80)
@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.integers(0, 9))
def test_the_accuracy_lies_in_its_interval(predictions_of, counts, seed):
    got = judge(with_hits(*counts, predictions_of), bootstrap=200, seed=seed)
    low, high = got.accuracy_ci
    assert 0 <= low <= got.accuracy <= high <= 1 and low < high


@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.999])
@pytest.mark.parametrize(
    ("hits", "n"), [(0, 1), (1, 1), (0, 12), (12, 12), (49, 50), (250, 500), (475, 500), (1, 10**7)]
)
def test_the_interval_of_accuracy_is_the_one_of_wilson(hits, n, confidence):
    theirs = stats.binomtest(hits, n).proportion_ci(confidence, method="wilson")
    np.testing.assert_allclose(accuracy_interval(hits, n, confidence), [theirs.low, theirs.high], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("n", [50, 100, 225])
def test_the_interval_of_accuracy_covers_high_accuracies_as_promised(n):
    """Exact coverage at true accuracies of 0.6 to 0.99; resampled rows cover 0.39 at 0.99 and n = 50."""
    hits = np.arange(n + 1)
    low, high = np.array([accuracy_interval(int(k), n) for k in hits]).T
    covered = [float(stats.binom.pmf(hits, n, p)[(low <= p) & (p <= high)].sum()) for p in np.linspace(0.6, 0.99, 79)]
    assert min(covered) > 0.89 and 0.94 < np.mean(covered) < 0.97


def test_four_times_the_rows_halve_the_width(predictions_of):
    widths = [
        np.ptp(judge(with_hits(3 * n // 4, n, predictions_of), bootstrap=0).accuracy_ci) for n in (400, 1600, 6400)
    ]
    np.testing.assert_allclose(widths[:-1], 2 * np.array(widths[1:]), rtol=0.12)
    assert widths[0] > widths[1] > widths[2]


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


def test_no_resamples_leave_the_interval_of_macro_f1_undefined_and_that_of_accuracy_alone(drawn, predictions_of):
    got = judge(predictions_of(*drawn(30, 3)), bootstrap=0)
    assert np.isnan(got.macro_f1_ci).all() and got.to_dict()["macro_f1_ci"] == [None, None]
    assert got.accuracy_ci == accuracy_interval(round(30 * got.accuracy), 30)


def test_many_classes_and_rows_are_resampled_in_pieces_that_do_not_fill_the_memory(drawn, predictions_of):
    got = judge(predictions_of(*drawn(6000, 300)), bootstrap=500)
    assert got.macro_f1_ci[0] < got.macro_f1 < got.macro_f1_ci[1]
