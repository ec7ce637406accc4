"""What engines are worth where images have several labels: the exact match, and the same answers as torch."""

from __future__ import annotations

import numpy as np
import pytest

from imgcls_fast.core.labels import LabelSpace, Task
from imgcls_fast.measuring.quality import Sample, accuracy_of, agreement_of
from imgcls_fast.measuring.tables import efficiency_tables

NAN = np.nan
TWO = LabelSpace((Task("kind", ("a", "b")), Task("marks", ("x", "y"), "any_of")))
TARGETS = np.float32([[1, 0, 1, 0], [0, 1, 0, NAN], [NAN, NAN, 1, 1]])
SCORES = np.float32([[0.7, 0.3, 0.7, 0.1], [0.4, 0.6, 0.2, 0.9], [0.5, 0.5, 0.8, 0.4]])


def sample(labels: LabelSpace = TWO, targets: np.ndarray | None = TARGETS, least: np.ndarray | None = None) -> Sample:
    return Sample("test", [], targets, 3, labels, least)


def test_an_image_counts_when_all_that_is_known_of_it_is_right() -> None:
    got = accuracy_of(SCORES, sample())
    assert got is not None and (got["hits"], got["rows"], got["figure"]) == (2, 3, "exact match")
    lower = accuracy_of(SCORES, sample(least=np.float32([0, 0, 0.5, 0.3])))
    assert lower is not None and lower["hits"] == 3
    assert accuracy_of(SCORES, sample(targets=None)) is None
    broken = SCORES.copy()
    broken[0, 1] = NAN
    assert accuracy_of(broken, sample())["hits"] == 1  # type: ignore[index]


def test_answers_are_compared_by_the_thresholds_of_the_model() -> None:
    other = SCORES.copy()
    other[0, 2] = 0.55
    assert agreement_of(other, SCORES, sample())["same_top1"] == 3
    got = agreement_of(other, SCORES, sample(least=np.float32([0, 0, 0.6, 0.5])))
    assert (got["same_top1"], got["max_score_diff"]) == (2, pytest.approx(0.15))


def test_one_label_data_have_an_accuracy_and_its_words() -> None:
    one = accuracy_of(SCORES[:, :2], sample(LabelSpace.single(["a", "b"]), np.float32([[1, 0], [0, 1], [0, 1]])))
    assert one is not None and one["hits"] == 2 and "figure" not in one
    times = {"end_to_end": dict.fromkeys(("p50_ms", "p90_ms", "p99_ms"), 1.0)}
    best = {"batch": 1, "images_per_s": 1.0}
    row = {"name": "torch", "precision": "fp32", "latency": times, "best": best, "bytes": 1}
    row |= dict.fromkeys(("ratio", "agreement", "gate"))
    heads = [efficiency_tables([{**row, "accuracy": found}])[1]["heads"][1] for found in (one, accuracy_of(SCORES, sample()), None)]
    assert heads == ["accuracy on test", "exact match on test", "accuracy"]
