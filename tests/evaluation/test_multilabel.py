"""Answers to tasks of which any number of classes may hold: equal to scikit-learn, whatever is unknown."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from sklearn import metrics as sk

from imgcls_fast.core.errors import ConfigError, DataError
from imgcls_fast.core.labels import LabelSpace, Task
from imgcls_fast.core.predictions import Predictions
from imgcls_fast.evaluation.multilabel import AnyOfMetrics, answers_of, judge_any_of, thresholds_of
from imgcls_fast.evaluation.resampling import resample


def answered(
    scores: np.ndarray, targets: np.ndarray | None, thresholds: np.ndarray | None = None, names: str = "abcdefgh"
) -> Predictions:
    labels = LabelSpace((Task("label", tuple(names[: scores.shape[1]]), "any_of"),))
    rows = np.arange(len(scores), dtype=np.int64) * 3
    truth = None if targets is None else targets.astype(np.float32)
    return Predictions(rows, scores.astype(np.float32), truth, labels, tuple(f"{k}.jpg" for k in rows), "", thresholds)


def drawn(n: int, size: int, unknown: float = 0.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(scores, targets, thresholds); scores have ties, each row and class has something known, each class both answers."""
    draw = np.random.default_rng([n, size, seed])
    targets = (draw.random((n, size)) < np.linspace(0.15, 0.7, size)).astype(np.float32)
    targets[0], targets[1] = 0, 1
    scores = np.round(1 / (1 + np.exp(-(2 * targets - 1 + draw.normal(size=(n, size))))), 2).astype(np.float32)
    hidden = draw.random((n, size)) < unknown
    hidden[:2] = False
    hidden[np.arange(n), draw.integers(0, size, n)] = False
    targets[hidden] = np.nan
    return scores, targets, np.linspace(0.3, 0.8, size).astype(np.float32)


@pytest.mark.parametrize(("n", "size"), [(2, 2), (31, 3), (200, 6)])
def test_all_known_figures_are_scikit_learns(n: int, size: int) -> None:
    scores, targets, least = drawn(n, size)
    truth, given = targets.astype(int), (scores >= least).astype(int)
    got = judge_any_of(answered(scores, targets, least), bootstrap=0)
    close = pytest.approx
    assert got.macro_f1 == close(sk.f1_score(truth, given, average="macro", zero_division=0))
    assert got.micro_f1 == close(sk.f1_score(truth, given, average="micro", zero_division=0))
    assert got.macro_ap == close(sk.average_precision_score(truth, scores, average="macro"))
    assert got.roc_auc == close(sk.roc_auc_score(truth, scores, average="macro"))
    assert got.hamming_loss == close(sk.hamming_loss(truth, given))
    assert got.accuracy == close(1 - got.hamming_loss)
    assert got.exact_match == close((truth == given).all(1).mean())
    assert got.log_loss == close(np.mean([sk.log_loss(truth[:, k], scores[:, k], labels=[0, 1]) for k in range(size)]), rel=1e-5)
    for k, one in enumerate(got.per_class):
        assert one.precision == close(sk.precision_score(truth[:, k], given[:, k], zero_division=0))
        assert one.recall == close(sk.recall_score(truth[:, k], given[:, k]))
        assert one.balanced_accuracy == close(sk.balanced_accuracy_score(truth[:, k], given[:, k]))
        assert (one.known, one.support, one.predicted) == (n, truth[:, k].sum(), given[:, k].sum())
        assert one.threshold == close(least[k])
    assert np.array_equal(got.together, truth.T @ truth) and np.array_equal(got.answered, truth.T @ given)


@pytest.mark.parametrize("size", [2, 5])
def test_an_unknown_entry_counts_nowhere(size: int) -> None:
    scores, targets, least = drawn(150, size, unknown=0.3)
    got = judge_any_of(answered(scores, targets, least), bootstrap=0)
    known = ~np.isnan(targets)
    given = scores >= least
    f1 = []
    for k, one in enumerate(got.per_class):
        rows = known[:, k]
        truth = targets[rows, k].astype(int)
        f1.append(sk.f1_score(truth, given[rows, k]))
        assert one.f1 == pytest.approx(f1[-1]) and one.known == rows.sum()
        assert one.average_precision == pytest.approx(sk.average_precision_score(truth, scores[rows, k]))
        assert one.roc_auc == pytest.approx(sk.roc_auc_score(truth, scores[rows, k]))
    assert got.macro_f1 == pytest.approx(np.mean(f1))
    wrong = known & (given != (targets == 1))
    assert got.hamming_loss == pytest.approx(wrong.sum() / known.sum())
    assert got.accuracy == pytest.approx((1 - wrong.sum(1) / known.sum(1)).mean())
    assert got.exact_match == pytest.approx((~wrong.any(1)).mean())
    changed = np.where(known, scores, 1 - scores)  # other scores where nothing is known
    assert judge_any_of(answered(changed, targets, least), bootstrap=0).to_dict() == got.to_dict()


def test_what_is_not_defined_is_nan_and_named_and_never_zero() -> None:
    scores = np.float32([[0.9, 0.2, 0.1, 0.6], [0.8, 0.1, 0.2, 0.4], [0.3, 0.7, 0.9, 0.2]])
    targets = np.float32([[1, 0, 1, np.nan], [1, 0, 1, np.nan], [0, 0, 1, np.nan]])
    got = judge_any_of(answered(scores, targets), bootstrap=20)
    empty, full, hidden = got.per_class[1], got.per_class[2], got.per_class[3]
    assert all(math.isnan(x) for x in (empty.recall, empty.f1, empty.average_precision, empty.roc_auc))
    assert empty.precision == 0 and full.average_precision == 1 and math.isnan(full.roc_auc)
    assert math.isnan(hidden.accuracy) and math.isnan(hidden.precision) and hidden.known == 0
    assert got.macro_f1 == pytest.approx((got.per_class[0].f1 + full.f1) / 2)  # the classes that hold somewhere
    absent, always = got.warnings
    assert absent.startswith("classes b, d: true of no row") and always.startswith("class c: true of all rows")
    plain = json.loads(json.dumps(got.to_dict(), allow_nan=False))
    assert plain["per_class"][1]["f1"] is None and plain["kind"] == "any_of"


def test_probabilities_count_from_a_half_and_are_what_the_log_loss_is_held_against() -> None:
    scores, targets, _ = drawn(40, 3)
    soft = np.clip(targets, 0.1, 0.7)
    hard, got = (judge_any_of(answered(scores, each), bootstrap=0) for each in (targets, soft))
    assert (got.macro_f1, got.macro_ap, got.exact_match) == (hard.macro_f1, hard.macro_ap, hard.exact_match)
    s = scores.astype(np.float64)
    assert got.log_loss == pytest.approx(-(soft * np.log(s) + (1 - soft) * np.log(1 - s)).mean())


def test_always_the_more_frequent_answer_is_the_rival() -> None:
    targets = np.float32([[1, 0], [1, 0], [0, 0], [1, 1]])
    got = judge_any_of(answered(np.full((4, 2), 0.6, np.float32), targets), bootstrap=0)
    assert (got.constant_accuracy, got.constant_exact_match) == (0.75, 0.5)
    assert got.accuracy == 0.5


def test_intervals_hold_the_figure_and_equal_seeds_give_equal_ones() -> None:
    got: list[AnyOfMetrics] = [judge_any_of(answered(*drawn(80, 3, 0.2)[:2]), bootstrap=300, seed=s) for s in (1, 1, 2)]
    one = got[0]
    for name in ("accuracy", "macro_f1", "macro_ap", "exact_match"):
        low, high = getattr(one, f"{name}_ci")
        assert 0 <= low < getattr(one, name) < high <= 1, name
    assert one.to_dict() == got[1].to_dict() != got[2].to_dict()


@pytest.mark.parametrize("column", [0, 2])
def test_resampled_figures_are_those_of_the_drawn_rows(column: int) -> None:
    scores, targets, least = drawn(12, 3, 0.2)
    predictions = answered(scores, targets, least)
    found = resample([answers_of(predictions, thresholds_of(predictions, None))], 5, seed=column)
    weight = np.random.default_rng([column, 2]).multinomial(12, np.full(12, 1 / 12), size=5)
    for k in range(5):
        picked = np.repeat(np.arange(12), weight[k])
        again = judge_any_of(answered(scores[picked], targets[picked], least), bootstrap=0)
        assert found.macro_f1[k] == pytest.approx(again.macro_f1)
        assert found.macro_ap[k] == pytest.approx(again.macro_ap)


def test_rows_that_cannot_be_judged_are_refused() -> None:
    scores, targets, _ = drawn(5, 2)
    targets[3] = np.nan
    one_of = Predictions(np.arange(1), np.float32([[1]]), None, LabelSpace.single(["a"]), ("x",))
    for predictions, code in (
        (answered(scores, None), "D004"),
        (answered(scores, targets), "D014"),
        (answered(scores * 2, drawn(5, 2)[1]), "D014"),
        (answered(scores[:0], targets[:0]), "D014"),
        (one_of, "D014"),
    ):
        with pytest.raises(DataError) as refused:
            judge_any_of(predictions)
        assert refused.value.code == code
    with pytest.raises(ConfigError):
        judge_any_of(answered(*drawn(5, 2)[:2]), bootstrap=-1)
