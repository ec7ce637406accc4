"""Several questions about each image: judged one by one, each where its answer is known."""

from __future__ import annotations

import json

import numpy as np
import pytest
from sklearn import metrics as sk

from imgcls_fast.core.errors import DataError
from imgcls_fast.core.figures import FIGURES, MONITORS, usual_figures
from imgcls_fast.core.labels import LabelSpace, Task
from imgcls_fast.core.predictions import Predictions
from imgcls_fast.core.undecoded import Undecoded
from imgcls_fast.evaluation.metrics import Metrics, judge, without
from imgcls_fast.evaluation.multilabel import judge_any_of
from imgcls_fast.evaluation.tasks import TaskMetrics, judge_all, judge_tasks

TWO = LabelSpace((Task("color", ("red", "green", "blue")), Task("marks", ("dot", "bar"), "any_of")))


def two_tasks(n: int = 60, unknown: float = 0.2, seed: int = 0, thresholds: np.ndarray | None = None) -> Predictions:
    draw = np.random.default_rng([n, seed])
    targets = np.zeros((n, 5), np.float32)
    color = draw.integers(0, 3, n)
    targets[np.arange(n), color] = 1
    targets[:, 3:] = draw.random((n, 2)) < 0.4
    logits = 3 * targets + draw.normal(size=(n, 5))
    scores = np.empty((n, 5), np.float32)
    e = np.exp(logits[:, :3])
    scores[:, :3] = e / e.sum(1, keepdims=True)
    scores[:, 3:] = 1 / (1 + np.exp(1.5 - logits[:, 3:]))
    targets[np.ix_(np.flatnonzero(draw.random(n) < unknown), [0, 1, 2])] = np.nan
    targets[:, 3:][draw.random((n, 2)) < unknown] = np.nan
    return Predictions(np.arange(n) * 2, scores, targets, TWO, tuple(f"{k}.png" for k in range(n)), "", thresholds)


def test_each_task_is_judged_where_it_is_known_and_the_headline_is_the_mean() -> None:
    least = np.float32([0, 0, 0, 0.3, 0.6])
    predictions = two_tasks(thresholds=least)
    got = judge_tasks(predictions, bootstrap=50)
    color, marks = predictions.of_task(0), predictions.of_task(1)
    assert got.tasks["color"].to_dict() == judge(color, bootstrap=50).to_dict()
    assert got.tasks["marks"].to_dict() == judge_any_of(marks, least[3:], bootstrap=50).to_dict()
    for name in ("accuracy", "macro_f1", "log_loss", "macro_ap", "balanced_accuracy"):
        assert getattr(got, name) == pytest.approx(np.mean([getattr(one, name) for one in got.tasks.values()])), name
    truth = color.targets.argmax(1)  # type: ignore[union-attr]
    ap = sk.average_precision_score(np.eye(3)[truth], color.scores, average="macro")
    assert got.tasks["color"].macro_ap == pytest.approx(ap)
    for name in ("accuracy", "macro_f1", "macro_ap", "exact_match"):
        low, high = getattr(got, f"{name}_ci")
        assert low < getattr(got, name) < high


def test_a_row_matches_exactly_when_all_that_is_known_of_it_is_right() -> None:
    predictions = two_tasks()
    known = ~np.isnan(predictions.targets)
    right = predictions.answers == (np.nan_to_num(predictions.targets) == 1)
    some = known.any(1)
    got = judge_tasks(predictions, bootstrap=0)
    assert got.n == some.sum() and got.exact_match == pytest.approx((right | ~known)[some].all(1).mean())
    gone = [text for text in got.warnings if "no label at all" in text]
    assert len(gone) == int(not some.all())


def test_a_task_without_an_answer_is_left_out_by_name_and_nothing_at_all_is_refused() -> None:
    predictions = two_tasks()
    targets = predictions.targets.copy()  # type: ignore[union-attr]
    targets[:, :3] = np.nan
    got = judge_tasks(Predictions(predictions.rows, predictions.scores, targets, TWO, predictions.paths), bootstrap=0)
    assert list(got.tasks) == ["marks"] and "color: no image has an answer, so this task is not judged" in got.warnings
    targets[:] = np.nan
    for unlabelled, code in ((targets, "D014"), (None, "D004")):
        with pytest.raises(DataError) as refused:
            judge_tasks(Predictions(predictions.rows, predictions.scores, unlabelled, TWO, predictions.paths))
        assert refused.value.code == code


def test_facts_are_strict_json_and_say_the_means_first() -> None:
    got = without(judge_tasks(two_tasks(), bootstrap=10), Undecoded(), ["one notice"], {"changed_files": ("a.png",)})
    plain = json.loads(json.dumps(got.to_dict(), allow_nan=False))
    assert plain["tasks"]["color"]["kind"] == "one_of" and "confusion" in plain["tasks"]["color"]
    assert {"accuracy", "exact_match", "macro_f1", "macro_ap", "log_loss", "n"} <= plain.keys()
    assert plain["warnings"][-1] == "one notice" and plain["changed_files"] == ["a.png"]
    head = json.loads(json.dumps(got.headline(), allow_nan=False))
    assert [task["name"] for task in head["tasks"]] == ["color", "marks"]
    assert {name.split(": ")[0] for name, *_ in head["worst"]} <= {"color", "marks"}
    assert repr(got).startswith("TaskMetrics(accuracy=0.")


def test_one_label_data_are_judged_as_ever_and_one_any_of_task_is_a_task(predictions_of, drawn) -> None:
    single = predictions_of(*drawn(30, 3))
    found = judge_all(single, bootstrap=10)
    assert isinstance(found, Metrics) and found.to_dict() == judge(single, bootstrap=10).to_dict()
    only = judge_all(two_tasks(unknown=0).of_task(1), bootstrap=10)
    assert isinstance(only, TaskMetrics) and list(only.tasks) == ["marks"]
    assert only.accuracy_ci == only.tasks["marks"].accuracy_ci


def test_soft_labels_are_judged_by_their_most_probable_class_and_a_note_says_so(predictions_of, drawn) -> None:
    scores, truth = drawn(40, 3)
    hard = predictions_of(scores, truth)
    targets = np.full((40, 3), 0.1, np.float32)
    targets[np.arange(40), truth] = 0.8
    soft = judge(Predictions(hard.rows, scores, targets, hard.labels, hard.paths), bootstrap=0)
    assert soft.accuracy == judge(hard, bootstrap=0).accuracy
    assert soft.log_loss == pytest.approx(-(targets * np.log(scores)).sum(1).mean(), rel=1e-6)
    assert "labels are probabilities" in soft.warnings[-1] and "80%" in soft.warnings[-1]


def test_every_entry_of_the_table_of_figures_can_be_read_from_both_kinds_of_metrics(predictions_of, drawn) -> None:
    single, several = judge(predictions_of(*drawn(30, 3)), bootstrap=0), judge_tasks(two_tasks(), bootstrap=0)
    for figure in FIGURES:
        assert np.isfinite(figure.value(single)) and np.isfinite(figure.value(several)), figure.name
        assert figure.field in several.to_dict()
    assert [f.column for f in usual_figures(single=True)] == ["val_loss", "val_accuracy", "val_macro_f1", "val_balanced_accuracy"]
    assert set(MONITORS) == {f"val/{figure.name}" for figure in FIGURES}
