"""Predictions on disk: aligned with file names, whatever those are called."""

from __future__ import annotations

import os

import numpy as np
import pytest

from imgcls_fast.core.errors import DataError
from imgcls_fast.core.labels import LabelSpace
from imgcls_fast.core.predictions import Predictions

LABELS = LabelSpace.single(["a", "b", "ž,"])
PATHS = ("x.jpg", os.fsdecode(b"caf\xe9.jpg"), 'q"uo,te\n.jpg', "花.png")


def example(targets: np.ndarray | None) -> Predictions:
    scores = np.random.default_rng(0).dirichlet([1, 1, 1], 4).astype(np.float32)
    return Predictions(np.array([1, 4, 5, 9]), scores, targets, LABELS, PATHS, "abc")


@pytest.mark.parametrize("labelled", ["all", "some", "none"])
def test_what_is_saved_is_loaded_with_odd_names_and_unknown_labels(tmp_path, labelled):
    targets = np.eye(3, dtype=np.float32)[[2, 0, 1, 2]]
    if labelled == "some":
        targets[2] = np.nan
    ours = example(None if labelled == "none" else targets)
    ours.save(tmp_path)
    theirs = Predictions.load(tmp_path)
    assert theirs.paths == ours.paths and theirs.labels == ours.labels and theirs.fingerprint == "abc"
    for name in ("rows", "scores", "predicted"):
        np.testing.assert_array_equal(getattr(theirs, name), getattr(ours, name))
    if labelled == "none":
        assert theirs.targets is None
        with pytest.raises(DataError) as caught:
            _ = theirs.truth
        assert caught.value.code == "D004"
    else:
        np.testing.assert_array_equal(theirs.targets, targets)


def test_batches_are_gathered_sorted_without_padding_and_each_row_once():
    rows = [np.array([9, 2, -1]), np.array([2, 5, -1])]
    scores = [
        np.array([[9, 0, 0], [2, 0, 0], [7, 7, 7]], np.float32),
        np.array([[2, 0, 0], [5, 0, 0], [7, 7, 7]], np.float32),
    ]
    gathered = Predictions.gather(rows, scores, None, LABELS, [f"{k}.jpg" for k in range(10)])
    assert gathered.rows.tolist() == [2, 5, 9] and gathered.scores[:, 0].tolist() == [2, 5, 9]
    assert gathered.paths == ("2.jpg", "5.jpg", "9.jpg")
    assert len(Predictions.gather([], [], None, LABELS, [])) == 0


@pytest.mark.parametrize("name", ["scores.npy", "predictions.csv", "predictions.json"])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "foreign"])
def test_damaged_files_give_d001(tmp_path, name, damage):
    example(np.eye(3, dtype=np.float32)[[2, 0, 1, 2]]).save(tmp_path)
    path = tmp_path / name
    whole = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes({"empty": b"", "cut": whole[: len(whole) // 3], "foreign": b"[1, 2]"}[damage])
    with pytest.raises(DataError) as caught:
        Predictions.load(tmp_path)
    assert caught.value.code == "D001" and str(tmp_path) in caught.value.message


def test_rows_must_increase_and_lengths_agree():
    scores = np.ones((2, 3), np.float32)
    with pytest.raises(ValueError, match="strictly increasing"):
        Predictions(np.array([3, 3]), scores, None, LABELS, ("a", "b"))
    with pytest.raises(ValueError, match=r"2 rows need scores \(2, 3\) and 2 paths"):
        Predictions(np.array([3, 4]), scores, None, LABELS, ("a",))
    with pytest.raises(ValueError, match="targets"):
        Predictions(np.array([3, 4]), scores, scores[:1], LABELS, ("a", "b"))
