"""The linear probe that a trained model must beat: honest features, honest rows, and a figure that can be made again."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

import numpy as np
import pytest

from imgcls_fast.core.batch import Batch
from imgcls_fast.core.predictions import Predictions
from imgcls_fast.training import baseline, session
from imgcls_fast.training.baseline import fit_probe, image_features, read_features


def batches(draw: np.random.Generator, n: int, size: int = 8) -> list[Batch]:
    """Dark and light noise in turn; the last batch is padded with an image that must not count."""
    out = []
    for first in range(0, n, size):
        rows = np.arange(first, first + size)
        rows[rows >= n] = -1
        kind = np.where(rows >= 0, rows % 2, 1)
        pixels = draw.integers(0, 120, (size, 16, 16, 3)) + 100 * kind[:, None, None, None]
        hot = np.eye(2, dtype=np.float32)[kind] * (rows >= 0)[:, None]
        out.append(Batch(pixels.astype(np.uint8), hot, (rows >= 0).astype(np.float32), rows))
    return out


@pytest.mark.parametrize("shape", [(1, 8, 8, 3), (3, 17, 17, 1), (2, 96, 96, 3), (2, 32, 32, 4)], ids=str)
def test_features_are_finite_equal_each_time_and_do_not_depend_on_the_rest_of_the_batch(shape: tuple[int, ...]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    features = image_features(pixels)
    assert features.dtype == np.float32
    assert np.isfinite(features).all()
    np.testing.assert_array_equal(features, image_features(pixels))
    np.testing.assert_allclose(features[:1], image_features(pixels[:1]), rtol=1e-6)


def probe_of(draw: np.random.Generator, train: int, judged: int) -> tuple[np.ndarray, int]:
    x, y, _, _ = read_features(image_features, from_list(batches(draw, train)), 60)
    probe, used = fit_probe(x, y.argmax(1), 60, 0)
    x, y, rows, _ = read_features(image_features, from_list(batches(draw, judged)), 60)
    assert rows.tolist() == list(range(judged))
    return probe.predict_proba(x), used


def from_list(parts: list[Batch]) -> Generator[Batch, None, None]:
    yield from parts


def test_the_probe_tells_dark_from_light_and_leaves_padding_out() -> None:
    scores, used = probe_of(np.random.default_rng(0), 60, 21)
    assert used == 60 and (scores.argmax(1) == np.arange(21) % 2).all()


def test_the_probe_gives_the_same_scores_each_time() -> None:
    np.testing.assert_array_equal(*(probe_of(np.random.default_rng(3), 40, 16)[0] for _ in range(2)))


def test_reading_stops_when_the_time_is_up_but_not_before_enough_has_been_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baseline, "LEAST_ROWS", 100)
    parts = batches(np.random.default_rng(0), 400)
    x, y, rows, limit = read_features(image_features, from_list(parts), 0)
    assert len(x) == len(y) == 104 and rows.tolist() == list(range(104)) and limit == "0 s of reading"
    assert read_features(image_features, from_list(parts), 600)[3] == ""
    monkeypatch.setattr(baseline, "_MOST_BYTES", 200 * x[0].nbytes)
    held, *_, limit = read_features(image_features, from_list(parts), 600)
    assert len(held) == 208 and limit == "0 MB of features"


def test_the_probe_is_fitted_to_every_row_that_time_allows_and_not_to_two_thousand() -> None:
    """CIFAR-10: 0.50 from 2,000 rows, 0.57 from 20,000."""
    draw = np.random.default_rng(0)
    y = np.arange(9000) % 3
    x = (draw.normal(0, 1, (9000, 8)) + np.eye(3, 8)[y]).astype(np.float32)
    assert fit_probe(x, y, 600, 0)[1] == 9000
    assert fit_probe(x, y, 0, 0)[1] == 2000


def test_a_label_whose_first_image_comes_late_is_fitted_all_the_same() -> None:
    x = np.random.default_rng(0).normal(0, 1, (2600, 2)).astype(np.float32)
    assert fit_probe(x, (np.arange(2600) >= 2500).astype(np.int64), 0, 0)[1] == 2501


def test_the_first_fit_is_bounded_by_its_work_where_features_and_classes_are_many(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    draw = np.random.default_rng(0)
    y = np.arange(3000) % 500
    x = draw.normal(0, 1, (3000, 16)).astype(np.float32)
    flop = 4 * 300 * 16  # of one row and class
    monkeypatch.setattr(baseline, "_FIRST_FLOP", flop * 200 * 200)
    assert fit_probe(x, y, 0, 0)[1] == 200  # as many classes as rows
    monkeypatch.setattr(baseline, "_FIRST_FLOP", 1)
    assert fit_probe(x, y, 0, 0)[1] == 100
    monkeypatch.setattr(baseline, "_FIRST_FLOP", flop * 700 * 500)
    assert fit_probe(x, y % 2, 0, 0)[1] == 2000


def test_the_probe_of_a_run_sees_evaluation_pixels_never_augmented_ones(
    configure: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[list[int]] = []
    real = baseline.read_rows

    def watch(manifest: Any, rows: Any, *arguments: Any, **named: Any) -> Any:
        read.append(sorted(rows.tolist()))
        return real(manifest, rows, *arguments, **named)

    monkeypatch.setattr(baseline, "read_rows", watch)  # which knows no augmentation
    run = session.start(configure({"train.baseline": True, "train.epochs": 1}))
    assert read == [run.manifest.rows(split).tolist() for split in ("train", "test")]
    assert run.read_json("baseline.json")["n"] == len(run.manifest.rows("test"))


def test_the_model_and_its_baseline_are_compared_row_by_row_and_the_report_says_so(
    configure: Callable[..., Any],
) -> None:
    events: list[dict[str, Any]] = []
    run = session.start(configure({"train.baseline": True, "train.epochs": 1}), [events.append])
    found, manifest = run.read_json("baseline.json"), run.manifest
    test, train = len(manifest.rows("test")), len(manifest.rows("train"))
    assert (found["n"], found["of"], found["train_rows"], found["train_of"]) == (test, test, train, train)
    assert found["limit"] == "" and 0 <= found["balanced_accuracy"] <= 1 and not found["imbalanced"]
    assert found["majority"]["accuracy"] == pytest.approx(1 / 3) and "balanced_gain" in events[-1]["against"]
    ours, theirs = run.predictions("test"), Predictions.load(run.evaluation("baseline"))
    assert (ours.rows == theirs.rows).all() and found["accuracy"] == (theirs.predicted == theirs.truth).mean()
    against = events[-1]["against"]
    right, was = ours.predicted == ours.truth, theirs.predicted == theirs.truth
    assert (against["gained"], against["lost"]) == ((right & ~was).sum(), (was & ~right).sum())
    words = {"better": "is better than the baseline", "worse": "is worse than the baseline"}
    even = "is not better than the baseline" if against["gain"] < 0 else "cannot be told apart from the baseline"
    assert words.get(against["verdict"], even) in run.report_path.read_text("utf-8")
    assert "validation images" in run.read_json("bundle/bundle.json")["provenance"]["calibration"]
