"""An engine on images with several labels: both figures are bounded, unknown answers count in neither."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from imgcls_fast.core.labels import LabelSpace, Task
from imgcls_fast.core.predictions import Predictions
from imgcls_fast.evaluation.bounds import (
    mean_interval,
    mean_lower_bound,
    mean_rows_needed,
    mean_upper_bound,
    share_interval,
    tango_upper_bound,
)
from imgcls_fast.evaluation.paired import compare, judge
from imgcls_fast.evaluation.row_scores import row_scores
from imgcls_fast.evaluation.tasks import judge_tasks

LABELS = LabelSpace((Task("kind", ("a", "b")), Task("marks", ("x", "y", "z"), "any_of")))
NAN = np.nan


def answers(n: int, wrong: dict[int, int], targets: np.ndarray | None = None) -> Predictions:
    """n rows "a, x": right but for the answer to column `wrong[row]`."""
    truth = np.tile(np.float32([1, 0, 1, 0, 0]), (n, 1))
    scores = np.where(truth == 1, 0.8, 0.2).astype(np.float32)
    for row, column in wrong.items():
        columns = [0, 1] if column < 2 else [column]
        scores[row, columns] = 1 - scores[row, columns]
    shown = truth if targets is None else targets
    return Predictions(np.arange(n), scores, shown, LABELS, ("",) * n)


# ---------------------------------------------------------------- the bound of a mean


@pytest.mark.parametrize("n", [20, 300, 5000])
def test_without_a_changed_row_the_bound_is_that_of_a_rate_but_for_a_fifth(n: int) -> None:
    bound = mean_upper_bound(np.zeros(n))
    assert tango_upper_bound(0, 0, n) * 0.9 <= bound <= 1.25 * tango_upper_bound(0, 0, n)
    assert mean_upper_bound(np.zeros(n), 0.99) > bound and mean_upper_bound(np.zeros(0)) == 1


SITUATIONS = {  # values, probabilities
    "thirds": ([-1 / 3, 0, 1 / 3], [0.05, 0.85, 0.1]),
    "whole answers": ([-1, 0, 1], [0.05, 0.85, 0.1]),
    "rare and whole": ([0, 1], [0.99, 0.01]),
    "rare and small": ([0, 0.2], [0.98, 0.02]),
    "coin": ([-1, 1], [0.5, 0.5]),
}


@pytest.mark.parametrize("n", [30, 300])
@pytest.mark.parametrize("name", SITUATIONS)
def test_the_bound_of_a_mean_covers_the_true_one_in_95_of_100_samples(name: str, n: int) -> None:
    values, p = (np.array(part) for part in SITUATIONS[name])
    draw = np.random.default_rng(5)
    samples, true = 100, float(values @ p)
    missed = sum(mean_upper_bound(draw.choice(values, n, p=p)) < true for _ in range(samples))
    assert stats.binom.sf(missed - 1, samples, 0.05) > 1e-4  # not more misses than 5 % allow
    wide = np.mean([mean_upper_bound(draw.choice(values, n, p=p)) for _ in range(20)]) - true
    normal = 1.645 * np.sqrt((values**2 @ p - true**2) / n)
    assert wide < 2.5 * normal + 4 / n


@pytest.mark.parametrize("n", [30, 300])
@pytest.mark.parametrize("name", SITUATIONS)
def test_the_interval_of_a_mean_covers_the_true_one_in_95_of_100_samples(name: str, n: int) -> None:
    values, p = (np.array(part) for part in SITUATIONS[name])
    draw = np.random.default_rng(6)
    ends = np.array([mean_interval(draw.choice(values, n, p=p)) for _ in range(1000)])
    covered = ((ends[:, 0] <= values @ p) & (values @ p <= ends[:, 1])).mean()
    assert covered > 0.92


@pytest.mark.parametrize("right", [[0.5, 0.1], [0.9, 0.5], [0.98, 0.9]], ids=str)
def test_the_interval_of_a_share_covers_the_true_one_and_has_a_width_without_an_error(right: list[float]) -> None:
    draw = np.random.default_rng(3)
    ends = np.array([share_interval((draw.random((40, 2)) < right).mean(1)) for _ in range(1000)])
    true = np.mean(right)
    assert ((ends[:, 0] <= true) & (true <= ends[:, 1])).mean() > 0.93
    low, high = share_interval(np.ones(9))
    assert 0.5 < low < 0.8 and high == 1 and share_interval(np.zeros(9)) == pytest.approx((0, 1 - low))


def test_the_interval_of_whole_answers_is_that_of_bonett_and_price() -> None:
    lost, gained, n = 8, 3, 60
    p, q = (lost + 1) / (n + 2), (gained + 1) / (n + 2)
    half = 1.959964 * np.sqrt((p + q - (p - q) ** 2) / (n + 2))
    change = np.repeat([1.0, -1.0, 0.0], [lost, gained, n - lost - gained])
    assert mean_interval(change) == pytest.approx((p - q - half, p - q + half), rel=1e-5)
    low, high = mean_interval(np.zeros(60))
    assert low == -high < -0.04


def test_bounds_mirror_each_other_enclose_the_mean_and_do_not_depend_on_much_but_the_values() -> None:
    draw = np.random.default_rng(2)
    change = draw.choice([-0.5, 0, 0, 0, 0.5, 1], 200)
    low, high = mean_lower_bound(change), mean_upper_bound(change)
    assert low < change.mean() < high and mean_upper_bound(-change) == -low
    assert mean_upper_bound(np.sort(change)) == pytest.approx(high, rel=0.05)
    assert mean_upper_bound(np.minimum(change + 0.1, 1)) > high
    for wrong in ([1.2], [NAN]):
        with pytest.raises(ValueError, match=r"\[-1, 1\]"):
            mean_upper_bound(np.array(wrong))


@pytest.mark.parametrize("change", [[0.0], [0.0] * 48 + [0.5, -0.5], [0.0] * 60 + [0.25]], ids=str)
def test_as_many_rows_as_are_said_to_be_needed_bring_the_bound_down(change: list[float]) -> None:
    rows = np.array(change)
    needed = mean_rows_needed(0.01, rows)
    assert needed is not None
    enough, half = (np.resize(rows, count) for count in (needed, needed // 3))
    assert mean_upper_bound(enough) <= 0.0115 and mean_upper_bound(half) > 0.01
    assert mean_rows_needed(0.01, np.array([0.02])) is None


# ---------------------------------------------------------------- rows and verdicts


def test_how_right_a_row_is_counts_what_is_known_of_it() -> None:
    targets = np.float32([[1, 0, 1, 0, 0], [1, 0, NAN, 0, NAN], [NAN, NAN, 1, 0, 0], [NAN] * 5, [0, 1, 1, 1, 0]])
    got = row_scores(answers(5, {}, targets))
    np.testing.assert_array_equal(got["exact_match"], [1, 1, 1, NAN, 0])
    np.testing.assert_allclose(got["per_label"], [1, 1, 1, NAN, (0 + 2 / 3) / 2])
    broken = answers(5, {}, targets)
    broken.scores[:] = NAN
    np.testing.assert_array_equal(row_scores(broken)["per_label"], [0, 0, 0, NAN, 0])
    least = np.float32([0, 0, 0.9, 0.1, 0.5])  # of the marks x is no longer answered, and y is
    np.testing.assert_allclose(row_scores(replace(answers(1, {}), thresholds=least))["per_label"], [(1 + 1 / 3) / 2])


def test_one_label_data_have_one_figure(predictions_of, drawn) -> None:
    scores, truth = drawn(20, 3)
    got = row_scores(predictions_of(scores, truth))
    assert list(got) == ["accuracy"] and np.array_equal(got["accuracy"], scores.argmax(1) == truth)


@pytest.mark.parametrize(
    ("n", "wrong", "budget", "verdicts"),
    [
        (1000, {}, 1, ("pass", "pass")),
        (310, {}, 1, ("underpowered", "underpowered")),  # Tango alone would pass: 268 rows are enough for a rate
        (2000, dict.fromkeys(range(40), 4), 1, ("fail", "pass")),  # 2 % of the rows have a wrong mark: a third of a half of an answer
        (1000, dict.fromkeys(range(150), 0), 1, ("fail", "fail")),
    ],
)
def test_an_engine_passes_only_with_both_figures(n: int, wrong: dict[int, int], budget: float, verdicts: tuple[str, str]) -> None:
    got = judge(answers(n, {}), answers(n, wrong), budget, simulated=False)
    assert got.per_label is not None
    assert (got.verdict, got.per_label.verdict) == verdicts and got.passed == (verdicts == ("pass", "pass"))
    assert got.lost == len(wrong) and got.accuracy == 1 - len(wrong) / n
    told = got.to_dict()["per_label"]
    assert told["bound_pp"] == 100 * got.per_label.bound and got.per_label.drop >= 0
    if got.verdict == "underpowered":
        assert got.rows_needed == got.per_label.rows_needed


def test_an_engine_answers_with_the_thresholds_of_the_reference() -> None:
    own = np.full(5, 0.9, np.float32)  # with which the candidate would answer nothing about marks
    got = judge(answers(40, {}), replace(answers(40, {}), thresholds=own), 50, simulated=False)
    assert (got.lost, got.drop, got.agreement) == (0, 0, 1) and not any(lost for _, _, lost, _ in got.per_class)


def test_a_budget_of_all_rows_needs_a_number_of_rows_too() -> None:
    assert mean_rows_needed(1.0, np.array([1.0, 0.0, 0.0])) == 1


def test_unknown_answers_count_for_neither_side_and_classes_are_counted_where_they_are_known() -> None:
    targets = np.tile(np.float32([1, 0, 1, 0, 0]), (4, 1))
    targets[0, :2], targets[1, 4], targets[3] = NAN, NAN, NAN
    reference, candidate = answers(4, {}, targets), answers(4, {0: 0, 1: 4, 2: 3, 3: 2}, targets)
    got = judge(reference, candidate, 50, simulated=False)
    assert (got.rows, got.lost, got.gained) == (3, 1, 0)
    assert {name: rest for name, *rest in got.per_class} == {
        "kind: a": [2, 0, 0], "marks: x": [3, 0, 0], "marks: y": [3, 1, 0], "marks: z": [2, 0, 0],
    }  # fmt: skip


def test_two_models_are_compared_by_their_share_of_right_labels() -> None:
    better = answers(200, dict.fromkeys(range(10), 2))
    worse = answers(200, {k: 2 + k % 3 for k in range(80)})
    got = compare(worse, better)
    assert got is not None and got.verdict == "better" and got.low is not None and 0 < got.low < got.gain < got.high
    assert got.gain == pytest.approx((80 - 10) / 200 / 6)
    same = compare(better, better)
    assert same is not None and same.verdict == same.balanced_verdict == "even" and same.gain == 0
    grouped = compare(worse, better, np.arange(200) // 2)
    assert grouped is not None and grouped.low is None and grouped.verdict == "better"


@pytest.mark.parametrize("unknown", [slice(0, 0), slice(0, 2), slice(2, 5)], ids=["none", "kind", "marks"])
def test_balanced_gains_are_the_difference_of_balanced_accuracies(unknown: slice) -> None:
    draw = np.random.default_rng(0)
    targets = np.zeros((60, 5), np.float32)
    targets[np.arange(60), draw.integers(0, 2, 60)] = 1
    targets[:, 2:] = draw.random((60, 3)) < 0.4
    targets[:, 2:][draw.random((60, 3)) < 0.2] = NAN
    targets[:, unknown] = NAN
    two = [Predictions(np.arange(60), draw.random((60, 5), np.float32), targets, LABELS, ("",) * 60) for _ in range(2)]
    got = compare(*two)
    first, second = (judge_tasks(each, bootstrap=0).balanced_accuracy for each in two)
    assert got is not None and got.balanced_gain == pytest.approx(second - first)


def test_missing_answers_do_not_widen_the_interval_of_accuracy_beyond_its_coverage() -> None:
    draw, covered, two = np.random.default_rng(0), 0, LabelSpace((Task("a", ("x", "y")), Task("b", ("u", "v"))))
    for _ in range(200):
        right, gone = draw.random((60, 2)) < 0.9, draw.random((60, 2)) < 0.4
        targets = np.where(np.repeat(gone, 2, 1), NAN, np.float32([1, 0, 1, 0])).astype(np.float32)
        scores = np.where(np.repeat(right, 2, 1), np.float32([0.9, 0.1] * 2), np.float32([0.1, 0.9] * 2)).astype(np.float32)
        low, high = judge_tasks(Predictions(np.arange(60), scores, targets, two, ("",) * 60), bootstrap=0, confidence=0.4).accuracy_ci
        covered += low <= 0.9 <= high
    assert 0.3 * 200 < covered < 0.52 * 200


def test_gains_and_drops_are_those_of_the_mean_accuracy_of_the_tasks_with_missing_answers_too() -> None:
    draw = np.random.default_rng(1)
    targets = np.zeros((80, 5), np.float32)
    targets[np.arange(80), draw.integers(0, 2, 80)] = 1
    targets[:, 2:] = draw.random((80, 3)) < 0.4
    targets[:, 2:][draw.random((80, 3)) < 0.5] = NAN
    targets[np.ix_(draw.random(80) < 0.4, [0, 1])] = NAN
    two = [Predictions(np.arange(80), draw.random((80, 5), np.float32), targets, LABELS, ("",) * 80) for _ in range(2)]
    first, second = (judge_tasks(each, bootstrap=0).accuracy for each in two)
    gained, lost = compare(*two), judge(*two, 5, simulated=False).per_label
    assert gained is not None and gained.gain == pytest.approx(second - first) and gained.low < gained.gain < gained.high
    assert lost is not None and (lost.reference_accuracy, lost.accuracy) == (pytest.approx(first), pytest.approx(second))
    assert lost.drop == pytest.approx(first - second) and lost.lower_bound < lost.drop < lost.bound
