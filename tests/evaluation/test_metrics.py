"""Each figure against scikit-learn or its formula, on usual and on odd predictions."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from imgcls_fast.core.errors import ConfigError, DataError
from imgcls_fast.core.labels import LabelSpace, Task
from imgcls_fast.core.predictions import Predictions
from imgcls_fast.evaluation.metrics import average, confusion_matrix, judge

ODD = ("usual", "two classes", "one row", "absent", "never", "absent and never", "ties", "perfect", "wrong", "unequal")
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{text}") for text in ("y_pred contains classes", "A single label was")
]


def odd(kind: str, drawn) -> tuple[np.ndarray, np.ndarray]:
    scores, truth = drawn(1 if kind == "one row" else 240, 2 if kind == "two classes" else 5)
    size = scores.shape[1]
    if kind.startswith("absent"):
        truth[truth == 2] = 3
    if kind.endswith("never"):
        scores[:, 1] *= 1e-4
        scores /= scores.sum(1, keepdims=True)
    if kind == "ties":
        scores = np.random.default_rng(0).permuted(np.tile([0.375, 0.375, 0.125, 0.125, 0], (240, 1)), axis=1)
    if kind in ("perfect", "wrong"):
        scores = np.eye(size)[truth if kind == "perfect" else (truth + 1) % size]
    if kind == "unequal":
        truth = np.where(np.arange(240) < 200, 0, truth)
    return scores.astype(np.float32), truth


@pytest.fixture(params=ODD)
def case(request, drawn):
    return odd(request.param, drawn)


def test_precision_recall_f1_and_support_of_each_class_are_scikit_learns(case, predictions_of):
    scores, truth = case
    got = judge(predictions_of(scores, truth), bootstrap=0).per_class
    wanted = sk.precision_recall_fscore_support(
        truth, scores.argmax(1), labels=range(scores.shape[1]), zero_division=0, average=None
    )
    np.testing.assert_allclose([(c.precision, c.recall, c.f1, c.support) for c in got], np.array(wanted).T, rtol=1e-12)
    assert [c.predicted for c in got] == np.bincount(scores.argmax(1), minlength=scores.shape[1]).tolist()


def test_macro_micro_and_weighted_are_each_what_scikit_learn_calls_so(case, predictions_of):
    scores, truth = case
    got = judge(predictions_of(scores, truth), bootstrap=0)
    everything, present = range(scores.shape[1]), sorted(set(truth.tolist()))
    for name, labels in (("macro", present), ("micro", everything), ("weighted", everything)):
        wanted = sk.precision_recall_fscore_support(
            truth, scores.argmax(1), labels=labels, average=name, zero_division=0
        )
        figures = average(got, name)
        np.testing.assert_allclose([figures.precision, figures.recall, figures.f1], wanted[:3], rtol=1e-12)
    assert got.macro_f1 == average(got, "macro").f1
    assert average(got, "micro").f1 == pytest.approx(got.accuracy)
    assert average(got, "weighted").recall == pytest.approx(got.accuracy)


def test_the_three_averages_differ_on_unequal_classes(drawn, predictions_of):
    got = judge(predictions_of(*odd("unequal", drawn)), bootstrap=0)
    assert len({round(average(got, name).f1, 3) for name in ("macro", "micro", "weighted")}) == 3


@pytest.mark.parametrize("name", ["Macro", "MACRO", "macro ", "Weighted", "samples", "none", ""])
def test_regression_3_macro_with_a_capital_is_refused_and_never_silently_weighted(name, drawn, predictions_of):
    with pytest.raises(ConfigError) as caught:
        average(judge(predictions_of(*drawn(20, 3)), bootstrap=0), name)
    assert caught.value.code == "C003"
    assert repr(name) in caught.value.message and "'macro', 'micro', 'weighted'" in caught.value.message


def test_accuracy_balanced_accuracy_and_confusion_are_scikit_learns(case, predictions_of):
    scores, truth = case
    got = judge(predictions_of(scores, truth), bootstrap=0)
    assert got.accuracy == pytest.approx(sk.accuracy_score(truth, scores.argmax(1)))
    assert got.balanced_accuracy == pytest.approx(sk.balanced_accuracy_score(truth, scores.argmax(1)))
    wanted = sk.confusion_matrix(truth, scores.argmax(1), labels=range(scores.shape[1]))
    np.testing.assert_array_equal(got.confusion, wanted)
    assert got.confusion.sum() == got.n == len(truth)


def test_a_row_of_the_confusion_is_a_truth():
    got = confusion_matrix(np.array([0, 0, 2]), np.array([1, 1, 2]), 3)
    assert got.tolist() == [[0, 2, 0], [0, 0, 0], [0, 0, 1]]


def test_roc_auc_and_average_precision_are_scikit_learns_or_nan_where_undefined(case, predictions_of):
    scores, truth = case
    got = judge(predictions_of(scores, truth), bootstrap=0)
    areas, precisions = [], []
    for k, figures in enumerate(got.per_class):
        positive = truth == k
        area = sk.roc_auc_score(positive, scores[:, k]) if 0 < positive.sum() < len(truth) else math.nan
        precision = sk.average_precision_score(positive, scores[:, k]) if positive.any() else math.nan
        np.testing.assert_allclose([figures.roc_auc, figures.average_precision], [area, precision], rtol=1e-9)
        areas.append(area)
        precisions.append(precision)
    known = [area for area in areas if area == area]
    assert got.roc_auc == pytest.approx(np.mean(known) if known else math.nan, nan_ok=True)
    assert got.average_precision == pytest.approx(np.nanmean(precisions))


def test_macro_roc_auc_is_scikit_learns_one_against_the_rest(drawn, predictions_of):
    scores, truth = drawn(300, 4)
    wanted = sk.roc_auc_score(truth, scores.astype(np.float64), multi_class="ovr", average="macro")
    assert judge(predictions_of(scores, truth), bootstrap=0).roc_auc == pytest.approx(wanted)


@pytest.mark.parametrize("size", [3, 5, 12])
def test_top_k_is_scikit_learns(size, drawn, predictions_of):
    scores, truth = drawn(200, size, skill=0.5)
    got = judge(predictions_of(scores, truth), top_k=range(1, size), bootstrap=0)
    wanted = {k: sk.top_k_accuracy_score(truth, scores, k=k, labels=range(size)) for k in range(1, size)}
    assert got.top_k == pytest.approx(wanted)


def test_top_1_is_the_accuracy_and_k_of_all_classes_is_left_out(case, predictions_of):
    scores, truth = case
    size = scores.shape[1]
    got = judge(predictions_of(scores, truth), top_k=(1, size - 1, size, size + 7), bootstrap=0)
    assert got.top_k[1] == got.accuracy and sorted(got.top_k) == sorted({1, size - 1})


def test_equal_scores_rank_by_column(drawn, predictions_of):
    scores, truth = odd("ties", drawn)
    order = np.argsort(-scores, axis=1, kind="stable")
    got = judge(predictions_of(scores, truth), top_k=(1, 2, 3, 4), bootstrap=0).top_k
    assert got == pytest.approx({k: (order[:, :k] == truth[:, None]).any(1).mean() for k in (1, 2, 3, 4)})


def test_log_loss_and_brier_score_are_scikit_learns(case, predictions_of):
    scores, truth = case
    got = judge(predictions_of(scores, truth), bootstrap=0)
    labels = range(scores.shape[1])
    assert got.log_loss == pytest.approx(sk.log_loss(truth, scores, labels=labels), rel=1e-5, abs=1e-6)
    wanted = sk.brier_score_loss(truth, scores, labels=list(labels), scale_by_half=False)
    assert got.brier == pytest.approx(wanted, rel=1e-5, abs=1e-6)


def test_a_score_of_zero_for_the_truth_costs_sixteen_nats_and_not_infinity(predictions_of):
    got = judge(predictions_of(np.array([[0, 1], [1, 0]], np.float32), [0, 0]), bootstrap=0)
    assert got.log_loss == pytest.approx(-math.log(np.finfo(np.float32).eps) / 2)


@st.composite
def any_predictions(draw) -> tuple[np.ndarray, np.ndarray]:
    size, n = draw(st.integers(2, 6)), draw(st.integers(1, 30))
    parts = draw(st.lists(st.lists(st.integers(0, 4), min_size=size, max_size=size), min_size=n, max_size=n))
    counts = np.array(parts, np.float64) + (np.sum(parts, axis=1, keepdims=True) == 0)
    truth = draw(st.lists(st.integers(0, size - 1), min_size=n, max_size=n))
    return (counts / counts.sum(1, keepdims=True)).astype(np.float32), np.array(truth)


@settings(deadline=None, max_examples=80)
@given(any_predictions())
def test_regression_4_every_share_lies_between_0_and_1_whatever_the_predictions(predictions_of, case):
    got = judge(predictions_of(*case), bootstrap=40)
    shares = [got.accuracy, got.balanced_accuracy, got.ece, got.brier / 2, *got.top_k.values()]
    shares += [*got.accuracy_ci, *got.macro_f1_ci, *got.coverage.accuracy, *got.coverage.fraction]
    shares += [value for figures in got.averages.values() for value in vars(figures).values()]
    known = (c.roc_auc for c in got.per_class if c.roc_auc == c.roc_auc)
    assert all(-1e-7 <= share <= 1 + 1e-7 for share in [*shares, *known])
    assert 0 <= got.accuracy_ci[0] <= got.accuracy_ci[1] <= 1 and got.macro_f1_ci[0] <= got.macro_f1_ci[1]
    assert 0 <= got.log_loss <= 16 and got.coverage.accuracy[-1] == pytest.approx(got.accuracy)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 25), st.randoms(use_true_random=False))
def test_regression_4_and_7_no_figure_and_no_file_name_depends_on_batches_or_their_order(drawn, size, random):
    scores, truth = drawn(50, 4)
    targets, rows = np.eye(4, dtype=np.float32)[truth], 3 * np.arange(50) + 2  # of 152 files
    names, labels = [f"image {k}.jpg" for k in range(152)], LabelSpace.single("abcd")
    whole = Predictions.gather([rows], [scores], [targets], labels, names)
    order = np.array(random.sample(range(50), 50))
    padded = np.concatenate([order, np.full(-50 % size, -1)]).reshape(-1, size)
    batches = [np.where(batch[:, None] < 0, 9.0, scores[batch]) for batch in padded]
    row_batches = [np.where(batch < 0, -1, rows[batch]) for batch in padded]
    parted = Predictions.gather(row_batches, batches, [targets[batch] for batch in padded], labels, names)
    assert parted.paths == tuple(names[row] for row in rows)
    np.testing.assert_array_equal(parted.scores, scores)
    np.testing.assert_array_equal(parted.truth, truth)
    assert judge(parted, bootstrap=20).to_dict() == judge(whole, bootstrap=20).to_dict()
    own = scores[np.arange(50), truth].astype(np.float64)
    assert judge(parted, bootstrap=0).log_loss == pytest.approx(float(np.mean(-np.log(own))))


@pytest.mark.parametrize(
    ("value", "why"), [(np.nan, "NaN or inf"), (np.inf, "NaN or inf"), (-np.inf, "NaN or inf"), (7.5, "softmax"), (-0.1, "softmax")]
)  # fmt: skip
def test_scores_that_are_no_probabilities_are_d014_with_the_file_named(value, why, drawn, predictions_of):
    scores, truth = drawn(10, 3)
    scores[4, 1] = scores[6, 0] = value
    with pytest.raises(DataError) as caught:
        judge(predictions_of(scores, truth))
    assert caught.value.code == "D014" and "2 of 10 rows" in caught.value.message
    assert "row 9, 4.jpg" in caught.value.where and why in caught.value.why


def test_no_labels_is_d004_and_one_missing_label_names_its_file(drawn, predictions_of):
    scores, truth = drawn(10, 3)
    with pytest.raises(DataError) as caught:
        judge(predictions_of(scores, None))
    assert caught.value.code == "D004"
    some = predictions_of(scores, truth)
    some.targets[7] = 0
    with pytest.raises(DataError) as caught:
        judge(some)
    assert caught.value.code == "D014" and "7.jpg" in caught.value.where


def test_no_rows_and_other_kinds_of_task_are_d014(drawn, predictions_of):
    with pytest.raises(DataError) as caught:
        judge(predictions_of(np.zeros((0, 3), np.float32), np.zeros(0, np.int64)))
    assert caught.value.code == "D014" and "no rows" in caught.value.message
    scores, truth = drawn(4, 2)
    rows, targets = np.arange(4), np.eye(2, dtype=np.float32)[truth]
    for tasks in ((Task("tags", ("a", "b"), "any_of"),), (Task("x", ("a",)), Task("y", ("b",)))):
        with pytest.raises(DataError) as caught:
            judge(Predictions(rows, scores, targets, LabelSpace(tasks), ("p",) * 4))
        assert caught.value.code == "D014" and tasks[-1].name in caught.value.message


@pytest.mark.parametrize("option", [{"top_k": (0,)}, {"bootstrap": -1}, {"confidence": 1.0}, {"confidence": 0}])
def test_impossible_options_are_c003(option, drawn, predictions_of):
    with pytest.raises(ConfigError) as caught:
        judge(predictions_of(*drawn(4, 3)), **option)
    assert caught.value.code == "C003" and next(iter(option)) in caught.value.message


def test_warnings_name_absent_and_never_predicted_classes(drawn, predictions_of):
    warned = " | ".join(judge(predictions_of(*odd("absent and never", drawn)), bootstrap=0).warnings)
    assert "class class 2: no true rows" in warned and "class class 1: never predicted" in warned
    assert judge(predictions_of(*drawn(240, 5)), bootstrap=0).warnings == ()
    alone = judge(predictions_of(drawn(9, 3)[0], [0] * 9), bootstrap=0)
    assert "same true class" in " ".join(alone.warnings) and math.isnan(alone.roc_auc)
    assert "do not sum to 1" in " ".join(judge(predictions_of(drawn(9, 3)[0] / 2, [0] * 9), bootstrap=0).warnings)


def test_the_facts_are_strict_json_with_null_for_what_is_undefined(case, predictions_of):
    got = judge(predictions_of(*case), bootstrap=30)
    facts = json.loads(json.dumps(got.to_dict(), allow_nan=False))
    assert facts["accuracy"] == got.accuracy and facts["macro_f1"] == got.macro_f1
    assert facts["confusion"] == got.confusion.tolist() and len(facts["per_class"]) == len(got.classes)
    undefined = [math.isnan(c.roc_auc) for c in got.per_class]
    assert [c["roc_auc"] is None for c in facts["per_class"]] == undefined


@pytest.mark.parametrize(
    ("sizes", "imbalanced"),
    [((44, 8, 3, 21), True), ((45, 45, 45, 45, 45), False), ((12, 10, 10), False), ((7, 3), True), ((55, 45), False), ((9,), False),
     ((60, *[10] * 40), True), ((13, *[10] * 99), False)],
    ids=str,
)  # fmt: skip
def test_the_largest_class_is_named_and_called_imbalanced_where_it_is_beyond_its_fair_share(sizes, imbalanced, predictions_of):
    truth = np.repeat(np.arange(len(sizes)), sizes)
    scores = np.full((len(truth), max(2, len(sizes))), 1 / max(2, len(sizes)), np.float32)
    metrics = judge(predictions_of(scores, truth), bootstrap=0)
    assert metrics.imbalanced is imbalanced
    assert (metrics.majority.name, metrics.majority.accuracy) == (f"class {np.argmax(sizes)}", max(sizes) / sum(sizes))
    facts = metrics.to_dict()
    assert facts["imbalanced"] is imbalanced and facts["majority"]["class"] == metrics.majority.name
    assert facts["majority"]["against"]["rows"] == len(truth)
