"""The linear probe that a trained model must beat: honest features, honest rows, and a figure that can be made again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from imgcls_fast.core.batch import Batch
from imgcls_fast.core.manifest import LabelSpace
from imgcls_fast.training import baseline, session
from imgcls_fast.training.baseline import image_features, linear_probe

LABELS = LabelSpace.single(["dark", "light"])


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


def test_the_probe_tells_dark_from_light_and_leaves_padding_out() -> None:
    draw = np.random.default_rng(0)
    found = linear_probe(
        image_features, batches(draw, 60), batches(draw, 21), LABELS, name="noise", split="test", seed=0
    )
    assert (found["n"], found["features"], found["split"]) == (21, "noise", "test")
    assert found["accuracy"] == 1.0
    assert found["ci"][0] <= found["accuracy"] <= found["ci"][1]


def test_the_probe_gives_the_same_figure_each_time() -> None:
    def probe() -> dict[str, Any]:
        draw = np.random.default_rng(3)
        found = linear_probe(image_features, batches(draw, 40), batches(draw, 16), LABELS, name="", split="val", seed=0)
        return {name: value for name, value in found.items() if name != "seconds"}

    assert probe() == probe()


def test_the_probe_of_a_run_sees_evaluation_pixels_never_augmented_ones(
    configure: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    samplers = []
    real = baseline.open_loader

    def watch(sampler: Any, *arguments: Any, **named: Any) -> Any:
        samplers.append(sampler)
        return real(sampler, *arguments, **named)

    monkeypatch.setattr(baseline, "open_loader", watch)
    run = session.start(configure({"train.baseline": True, "train.epochs": 1}))
    assert [sampler.training for sampler in samplers] == [False, False]
    assert run.read_json("baseline.json")["n"] == len(run.manifest.rows("test"))
