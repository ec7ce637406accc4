"""Labels of every kind: what the columns of a score matrix mean, and how a manifest and predictions keep what is not known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from imgcls_fast.core.errors import DataError
from imgcls_fast.core.labels import LabelSpace, Task, demand_answers, known
from imgcls_fast.core.manifest import Manifest, PathList
from imgcls_fast.core.predictions import Predictions

NAN = np.nan
BOTH = LabelSpace((Task("color", ("red", "blue", "green")), Task("has", ("ears", "tail"), "any_of")))
COLOR = np.array([0, 2, -1, 1, 0, 0], np.int32)
HAS = np.array([[1, 0], [1, 1], [-1, -1], [0, -1], [1, 0], [0, 0]], np.int8)
TARGETS = np.array([[1, 0, 0, 1, 0], [0, 0, 1, 1, 1], [NAN] * 5, [0, 1, 0, 0, NAN], [1, 0, 0, 1, 0], [1, 0, 0, 0, 0]], np.float32)
SOFT = np.array([[0.2, 0.5, 0.3], [1, 0, 0], [NAN] * 3, [0, 0.5, 0.5], [0, 0, 1], [0.1, 0.1, 0.8]], np.float32)


def manifest(labels: LabelSpace = BOTH, answers: tuple[np.ndarray, ...] = (COLOR, HAS)) -> Manifest:
    n = len(answers[0])
    one = np.ones(n, np.int32)
    split = np.array([0, 0, 0, 1, 1, 2], np.uint8)[:n]
    paths = PathList.of([f"{k}.jpg" for k in range(n)])
    return Manifest(
        Path("/d"), paths, labels, answers, split, -one, one, one, np.ones(n, np.uint8), np.zeros((n, 16), np.uint8), np.zeros(n, np.uint8)
    )


def test_columns_of_several_tasks_have_names_that_never_collide():
    assert BOTH.classes == ("color: red", "color: blue", "color: green", "has: ears", "has: tail") and BOTH.size == 5
    assert LabelSpace.single(["a", "b"]).classes == ("a", "b")
    assert LabelSpace((Task("has", ("a", "b"), "any_of"),)).classes == ("a", "b")
    assert BOTH.slices == (slice(0, 3), slice(3, 5)) and BOTH.any_of.tolist() == [False] * 3 + [True] * 2
    assert BOTH.task("has") == (BOTH.tasks[1], slice(3, 5))
    assert not BOTH.is_single and not LabelSpace((Task("has", ("a",), "any_of"),)).is_single
    assert LabelSpace.from_dict(BOTH.to_dict()) == BOTH
    with pytest.raises(KeyError, match="hat"):
        BOTH.task("hat")


def test_a_kind_of_task_that_this_version_does_not_know_is_refused():
    value = BOTH.to_dict()
    value["tasks"][1]["kind"] = "ordered"
    with pytest.raises(ValueError, match="'has' is of kind 'ordered'"):
        LabelSpace.from_dict(value)


def test_scores_become_answers_by_the_best_class_or_by_thresholds():
    scores = np.array([[0.2, 0.5, 0.3, 0.5, 0.49], [0.4, 0.3, 0.3, 0.2, 0.9], [NAN, 0.9, 0.1, NAN, 0.8]], np.float32)
    assert BOTH.decide(scores).tolist() == [[0, 1, 0, 1, 0], [1, 0, 0, 0, 1], [0, 0, 0, 0, 1]]
    assert BOTH.decide(scores, [0.9, 0.9, 0.9, 0.1, 0.85])[:, 3:].tolist() == [[1, 0], [1, 1], [0, 0]]
    assert BOTH.decide(np.zeros((0, 5))).shape == (0, 5)


def test_labels_of_an_image_have_one_spelling_for_people():
    assert [BOTH.words(row) for row in TARGETS[:4]] == ["color: red, has: ears", "color: green, has: ears|tail", "", "color: blue"]
    assert LabelSpace.single("abc").words(SOFT[0]) == "b" and BOTH.tasks[1].words(np.array([True, False])) == "ears"


def test_two_models_agree_on_rows_with_the_same_finite_answers():
    scores = np.array([[0.2, 0.5, 0.3, 0.5, 0.49], [0.4, 0.3, 0.3, 0.2, 0.9], [NAN, 0.9, 0.1, 0.4, 0.8]], np.float32)
    other = scores + np.array([0, 0, 0, 0, 0.02], np.float32)
    assert BOTH.same_answers(scores, scores).tolist() == [True, True, False]
    assert BOTH.same_answers(scores, other).tolist() == [False, True, False]
    assert BOTH.same_answers(scores, other, [0, 0, 0, 0.5, 0.3]).tolist() == [True, True, False]


def test_targets_are_nan_where_nothing_is_known():
    rows = np.arange(6)
    np.testing.assert_array_equal(manifest().targets(rows), TARGETS)
    assert manifest().labelled.tolist() == [True, True, False, True, True, True]
    assert known(TARGETS, slice(3, 5)).tolist() == [True, True, False, True, True, True]
    one = manifest(LabelSpace.single("abc"), (COLOR,))
    np.testing.assert_array_equal(one.targets(rows), TARGETS[:, :3])
    assert one.label.tolist() == one.stratum.tolist() == COLOR.tolist() and one.label.dtype == np.int32
    soft = manifest(LabelSpace.single("abc"), (SOFT,))
    np.testing.assert_array_equal(soft.targets(rows), SOFT)
    assert soft.label.tolist() == [1, 0, -1, 1, 2, 2]


def test_rows_with_the_same_answers_are_one_stratum():
    stratum = manifest().stratum
    assert stratum[2] == -1 and stratum[0] == stratum[4] and len(set(stratum.tolist())) == 5
    assert sorted(manifest().spread(np.arange(6), 5).tolist()) != [0, 1, 2, 3, 4], "one of each stratum before a second of any"
    with pytest.raises(ValueError, match="one-label"):
        _ = manifest().label


def test_classes_are_counted_per_column_and_what_is_known_of_them():
    assert manifest().counts().tolist() == [3, 1, 1, 3, 1]
    assert manifest().known_counts().tolist() == [5, 5, 5, 5, 4]
    assert manifest().counts("train").tolist() == [1, 0, 1, 2, 1]
    assert manifest(LabelSpace.single("abc"), (SOFT,)).counts().tolist() == [1, 2, 2]


@pytest.mark.parametrize("kind", ["one-label", "soft", "several"])
def test_answers_of_every_kind_are_saved_taken_and_told_apart(tmp_path: Path, kind: str):
    single = LabelSpace.single("abc")
    made = {"one-label": manifest(single, (COLOR,)), "soft": manifest(single, (SOFT,)), "several": manifest()}[kind]
    made.save(tmp_path / "m.npz")
    read = Manifest.load(tmp_path / "m.npz")
    assert read.labels == made.labels and read.fingerprint == made.fingerprint
    for one, other in zip(read.answers, made.answers, strict=True):
        np.testing.assert_array_equal(one, other)
        assert one.dtype == other.dtype
    few = made.take(np.array([3, 1]))
    np.testing.assert_array_equal(few.targets(np.arange(2)), made.targets(np.array([3, 1])))
    other = replace(made, answers=(*made.answers[:-1], np.roll(made.answers[-1], 1, 0)))
    assert other.fingerprint != made.fingerprint


@pytest.mark.parametrize(
    ("task", "answer"),
    [
        (0, np.array([0, 3], np.int32)), (0, np.array([0.5, 0.5], np.float32)), (0, np.array([[1, 0], [0, 1]], np.float32)),
        (0, np.array([[0, 0, 1]], np.int8)), (1, np.array([[0, 2]], np.int8)), (1, np.array([[0, 1.5]], np.float32)),
        (1, np.array([0, 1], np.int8)), (1, np.array([["0", "1"]])), (0, np.array([[1, NAN, 0]], np.float32)),
    ],
)  # fmt: skip
def test_answers_that_no_scan_writes_are_refused(tmp_path: Path, task: int, answer: np.ndarray):
    with pytest.raises(ValueError, match=BOTH.tasks[task].name):
        demand_answers(BOTH.tasks[task], answer)
    answers = [COLOR, HAS]
    answers[task] = np.concatenate([answer] * 6)[:6]
    manifest(BOTH, tuple(answers)).save(tmp_path / "m.npz")
    with pytest.raises(DataError) as caught:
        Manifest.load(tmp_path / "m.npz")
    assert caught.value.code == "D009"


def test_a_manifest_needs_an_answer_column_per_task():
    with pytest.raises(ValueError, match="2 tasks"):
        manifest(BOTH, (COLOR,))
    with pytest.raises(ValueError, match="6 rows"):
        manifest(BOTH, (COLOR, HAS[:2]))


def predictions(targets: np.ndarray | None = TARGETS) -> Predictions:
    scores = np.random.default_rng(0).random((6, 5)).astype(np.float32)
    least = np.array([0.5, 0.5, 0.5, 0.3, 0.8], np.float32)
    return Predictions(np.arange(6), scores, targets, BOTH, tuple(f"{k}.jpg" for k in range(6)), "f", least)


@pytest.mark.parametrize("targets", [TARGETS, None], ids=["labelled", "not labelled"])
def test_predictions_of_several_tasks_are_saved_and_loaded(tmp_path: Path, targets: np.ndarray | None):
    made = predictions(targets)
    made.save(tmp_path)
    read = Predictions.load(tmp_path)
    np.testing.assert_array_equal(read.scores, made.scores)
    np.testing.assert_array_equal(read.thresholds, made.thresholds)
    assert (read.targets is None) == (targets is None)
    if targets is not None:
        np.testing.assert_array_equal(read.targets, targets)
        (tmp_path / "targets.npy").write_bytes((tmp_path / "targets.npy").read_bytes()[:-1] + b"\x01")
        with pytest.raises(DataError, match=r"targets\.npy is damaged"):
            Predictions.load(tmp_path)


def test_the_table_for_people_has_label_and_answer_of_each_task():
    head, first, second, third, *_ = predictions().to_csv().splitlines()
    assert head.startswith("row,path,color: label,color: pred,color: confidence,has: label,has: pred,p:color: red")
    cells = dict(zip(head.split(","), second.split(","), strict=True))
    assert (cells["color: label"], cells["has: label"]) == ("green", "ears|tail")
    assert third.split(",")[2] == "" and first.split(",")[5] == "ears"


def test_one_task_keeps_the_rows_of_which_it_is_known():
    of = predictions().of_task(1)
    assert of.rows.tolist() == [0, 1, 3, 4, 5] and of.labels == LabelSpace((BOTH.tasks[1],))
    assert of.scores.shape == of.targets.shape == (5, 2) and of.thresholds.tolist() == pytest.approx([0.3, 0.8])
    assert predictions(None).of_task(0).scores.shape == (6, 3)
    with pytest.raises(ValueError, match="5 columns"):
        replace(predictions(), thresholds=np.zeros(2, np.float32))
