"""Evaluation pixels of every backend against torchvision's Resize and CenterCrop, on real photos."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps
from torchvision.transforms import v2

from imgcls_fast.loading.loader import dali_missing

needs_dali = pytest.mark.skipif(dali_missing() is not None, reason=str(dali_missing()))
BACKENDS = pytest.mark.parametrize("backend", ["torch", pytest.param("dali-cpu", marks=needs_dali)])
_FILTERS = {"bilinear": v2.InterpolationMode.BILINEAR, "bicubic": v2.InterpolationMode.BICUBIC}


def by_torchvision(path: Path, size: int, resize_to: int, interpolation: str, mode: str = "RGB") -> np.ndarray:
    view = v2.Compose([v2.Resize(resize_to, _FILTERS[interpolation]), v2.CenterCrop(size)])
    with Image.open(path) as image:
        return np.asarray(view(ImageOps.exif_transpose(image).convert("RGB").convert(mode)))


def compare(kit, files: list[Path], backend: str, interpolation: str = "bilinear", color: str = "rgb", **more) -> tuple:
    """(images, max, mean, share of pixel values beyond 2) of the difference to torchvision, in levels."""
    pixels = kit.pixels(more.get("size", 224), color, more.get("crop_pct", 0.875), interpolation=interpolation)
    manifest = kit.manifest(files[0].parent, [str(path) for path in files])
    batches = kit.run(kit.sampler(manifest, 20, None, pixels), backend, 2, once=True)
    got = {
        int(row): image for batch in batches for row, image in zip(batch.rows, batch.pixels, strict=True) if row >= 0
    }
    assert len(got) == len(files)
    mode = {"rgb": "RGB", "gray": "L"}[color]
    edge = more.get("without_edge", 0)
    greatest, total, beyond = 0, 0.0, 0.0
    for row, path in enumerate(files):
        want = by_torchvision(path, pixels.size, pixels.resize_to, interpolation, mode).reshape(got[row].shape)
        difference = np.abs(got[row].astype(int) - want)[edge : pixels.size - edge, edge : pixels.size - edge]
        greatest, total = max(greatest, int(difference.max())), total + float(difference.mean())
        beyond += float((difference > 2).mean())
    return len(files), greatest, total / len(files), beyond / len(files)


@BACKENDS
@pytest.mark.parametrize("color", ["rgb", "gray"])
def test_sixty_photos_are_within_two_levels_of_torchvision(kit, shared_data, backend, color):
    files = sorted((shared_data / "jpeg_full" / "images").iterdir())[::4][:60]
    count, greatest, mean, _ = compare(kit, files, backend, color=color)
    assert count >= 55 and greatest <= 2 and mean <= 0.25, (greatest, mean)


@BACKENDS
def test_without_a_margin_only_the_outermost_pixels_leave_the_two_levels(kit, shared_data, backend):
    """With crop_pct 1 the image's edge is in view, where DALI repeats it and Pillow renormalises its filter."""
    files = sorted((shared_data / "jpeg_full" / "images").iterdir())[::11]
    _, _, mean, beyond = compare(kit, files, backend, size=192, crop_pct=1.0)
    assert mean <= 0.25 and beyond <= 2e-3, (mean, beyond)
    _, greatest, mean, _ = compare(kit, files, backend, size=192, crop_pct=1.0, without_edge=1)
    assert greatest <= 2 and mean <= 0.25, (greatest, mean)


@BACKENDS
def test_bicubic_is_within_two_levels_but_for_overshoot_at_hard_edges(kit, shared_data, backend):
    """Pillow clips to 0..255 between its two passes, DALI after both."""
    files = sorted((shared_data / "jpeg_full" / "images").iterdir())[::11]
    _, greatest, mean, beyond = compare(kit, files, backend, "bicubic")
    assert greatest <= (2 if backend == "torch" else 24) and mean <= 0.25 and beyond <= 2e-3, (greatest, mean, beyond)


@BACKENDS
def test_every_variant_of_the_flower_photos_is_within_two_levels(kit, shared_data, backend):
    import csv

    with open(shared_data / "photos" / "MANIFEST.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    chosen: dict[str, list[Path]] = {}
    for row in rows:
        if len(chosen.setdefault(row["variant"], [])) < 3:
            chosen[row["variant"]].append(shared_data / "photos" / row["path"])
    assert len(chosen) >= 15
    for variant, files in chosen.items():
        _, greatest, mean, _ = compare(kit, files, backend, size=128)
        assert greatest <= 2 and mean <= 0.3, (variant, greatest, mean)


@needs_dali
@pytest.mark.parametrize("augmented", [True, False], ids=["training", "evaluation"])
def test_both_backends_agree_on_a_mixed_batch_of_flower_photos(kit, shared_data, augmented):
    root = shared_data / "photos"
    names = sorted(p.relative_to(root).as_posix() for p in (root / "val").rglob("*") if p.is_file())
    sampler = kit.sampler(kit.manifest(root, names), 20, kit.strong if augmented else None, kit.pixels(160))
    ours, theirs = (kit.run(sampler, backend, 2, once=True) for backend in ("dali-cpu", "torch"))
    for one, two in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one.rows, two.rows)
        difference = np.abs(one.pixels.astype(int) - two.pixels).reshape(len(one.rows), -1).mean(1)
        assert difference.max() < 1, one.rows[difference.argmax()]


@BACKENDS
def test_all_full_size_photos_are_within_two_levels_of_torchvision(kit, shared_data, backend):
    count, greatest, mean, _ = compare(kit, sorted((shared_data / "jpeg_full" / "images").iterdir()), backend)
    print(f"\n{backend:10} {count} images   max {greatest} levels   mean {mean:.4f} levels")  # noqa: T201 (the table)
    assert count >= 200 and greatest <= 2 and mean <= 0.25
