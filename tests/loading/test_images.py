"""The rows that stand for all images: every class is among them, whatever its place in the alphabet."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from imgcls_fast.core.bundle import Bundle, write_bundle
from imgcls_fast.core.config_verbs import ExportConfig
from imgcls_fast.core.manifest import Manifest
from imgcls_fast.data.findings import ScanOptions
from imgcls_fast.data.scan import scan
from imgcls_fast.exporting import onnx_export
from imgcls_fast.exporting.materials import Materials
from imgcls_fast.exporting.session import export_bundle
from imgcls_fast.loading.loader import comparison_rows

CLASSES = ("anthracite", "basalt", "chalk")  # two dark ones, and the last one white


@pytest.fixture
def stones(tmp_path: Path) -> Manifest:
    """40 training and 40 test images of each class, a folder a class."""
    draw = np.random.default_rng(0)
    for k, name in enumerate(CLASSES):
        folder = tmp_path / "stones" / name
        folder.mkdir(parents=True)
        for n in range(80):
            low = 250 if k == 2 else 100 + 10 * k
            Image.fromarray(draw.integers(low, low + 5, (32, 32, 3), np.uint8)).save(folder / f"{n:02}.png")
    manifest = scan(tmp_path / "stones", ScanOptions(threads=1)).manifest
    return manifest.with_splits(np.arange(len(manifest)) % 2 * 2)


def bursting(bundle: Bundle, folder: Path) -> Bundle:
    """The same network with a channel that nobody reads, and that white images drive to 120,000; FP16 ends at 65,504."""
    from safetensors.torch import load_file, save

    state = load_file(bundle.weights)
    state["backbone.stem.0.weight"][0] = 0
    state["backbone.stem.0.weight"][0, :, 1, 1] = 2e4  # white is 2 in each of three channels, dark is below 0
    for name, value in (("running_mean", 0), ("running_var", 1), ("weight", 1), ("bias", 0)):
        state[f"backbone.stem.1.{name}"][0] = value
    state["backbone.stages.0.0.first.0.weight"][:, 0] = 0
    return write_bundle(
        folder, lambda file: file.write(save(state)) and None, arch=bundle.arch, labels=bundle.labels,
        pixels=bundle.pixels, temperature=bundle.temperature, provenance={},
    )  # fmt: skip


def materials_of(bundle: Bundle, manifest: Manifest, tmp_path: Path, **settings: Any) -> Materials:
    return Materials(bundle, manifest, tmp_path / "exports", ExportConfig(**settings))


def test_an_fp16_export_finds_that_the_last_class_alone_leaves_its_range(
    stones: Manifest, bundle_of: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")

    class Asked(Exception):
        """AutoCast has been asked for."""

    def autocast(base: Path, path: Path, precision: str, images: np.ndarray) -> None:
        raise Asked((images.min((1, 2, 3)) >= 250).sum())

    monkeypatch.setattr(onnx_export, "autocast", autocast)
    materials = materials_of(bursting(bundle_of(), tmp_path / "bursting"), stones, tmp_path, verify_images=12)
    materials.say = (said := []).append
    with pytest.raises(Asked) as asked:
        export_bundle(materials, "onnx", "fp16")
    assert asked.value.args[0] > 10 and "leave FP16's range on 120 images" in said[0]


def test_the_rows_of_a_comparison_hold_every_class_and_prefer_test_rows(stones: Manifest) -> None:
    rows = comparison_rows(stones, 12)
    assert set(stones.split[rows]) == {2} and np.bincount(stones.label[rows]).tolist() == [4, 4, 4]
    assert set(stones.label[rows[:3]]) == {0, 1, 2}, "BF16 is compared on the first four"
    more = comparison_rows(stones, 123)
    assert np.bincount(stones.split[more]).tolist() == [3, 0, 120] and set(stones.label[more[120:]]) == {0, 1, 2}
    assert len(comparison_rows(stones, 0)) == 0 and len(comparison_rows(stones, 999)) == 240


@pytest.mark.parametrize("looked_at", [3, 16, 48])
def test_the_first_calibration_images_hold_every_class(
    looked_at: int, stones: Manifest, bundle_of: Callable[..., Any], tmp_path: Path
) -> None:
    materials = materials_of(bundle_of(), stones, tmp_path, calibration_images=90)
    white = materials.calibration[:looked_at].min((1, 2, 3)) >= 250
    assert white.sum() == looked_at // 3
