"""Files that go bad after the scan: named once, never substituted, and nothing else changes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from imgcls_fast.core.manifest import FLAG_PILLOW
from imgcls_fast.loading.loader import dali_missing

needs_dali = pytest.mark.skipif(dali_missing() is not None, reason=str(dali_missing()))
BACKENDS = pytest.mark.parametrize(
    ("backend", "workers"),
    [("torch", 0), ("torch", 2), pytest.param("dali-cpu", 2, marks=needs_dali)],
    ids=["torch-0", "torch-2", "dali-cpu"],
)
SPLIT = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
N, BATCH = 24, 6


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def cut_end(path: Path) -> None:
    """A JPEG without its last line of blocks, a PNG without the end of its pixels."""
    path.write_bytes(path.read_bytes()[:-60])


def html(path: Path) -> None:
    path.write_text("<html><body>404 Not Found</body></html>")


def empty(path: Path) -> None:
    path.write_bytes(b"")


def larger(path: Path) -> None:
    Image.new("RGB", (400, 300), "red").save(path)


def smaller(path: Path) -> None:
    Image.new("RGB", (20, 10), "red").save(path)


def turned(path: Path) -> None:
    with Image.open(path) as image:
        image.transpose(Image.Transpose.ROTATE_90).save(path)


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES = [cut, cut_end, html, empty, larger, smaller, turned, folder]


@pytest.fixture
def photos(tmp_path, photo) -> Path:
    """24 photos: every third a PNG."""
    for k in range(N):
        photo(k).save(tmp_path / f"{k:02}.{'png' if k % 3 == 2 else 'jpg'}")
    return tmp_path


class Listener:
    """Remembers what on_bad was told."""

    def __init__(self) -> None:
        self.told: list[tuple[int, str, int]] = []

    def __call__(self, row: int, reason: str, epoch: int) -> None:
        self.told.append((row, reason, epoch))

    @property
    def rows(self) -> list[int]:
        return sorted(row for row, _, _ in self.told)


def assert_only_these_are_padding(kit, batches: list, clean: list, bad: set[int]) -> None:
    """Bad rows have weight 0, row -1, no target and a filler of the same batch; all else is bitwise as in `clean`."""
    assert len(batches) == len(clean)
    for ours, was in zip(batches, clean, strict=True):
        wrong = np.isin(was.rows, list(bad)) | (was.rows < 0)
        assert ours.pixels.shape == was.pixels.shape
        np.testing.assert_array_equal(ours.rows, np.where(wrong, -1, was.rows))
        np.testing.assert_array_equal(ours.weight, np.where(wrong, 0, 1))
        np.testing.assert_array_equal(ours.targets, np.where(wrong[:, None], 0, was.targets))
        np.testing.assert_array_equal(ours.pixels[~wrong], was.pixels[~wrong])
        good = {image.tobytes() for image in ours.pixels[~wrong]} or {bytes(ours.pixels[0].size)}
        assert all(image.tobytes() in good for image in ours.pixels[wrong])


@BACKENDS
@SPLIT
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda d: d.__name__)
def test_a_file_gone_bad_after_the_scan_is_reported_once_and_becomes_padding(
    kit, photos, backend, workers, training, damage
):
    manifest = kit.manifest(photos, sorted(p.name for p in photos.iterdir()))
    sampler = kit.sampler(manifest, BATCH, kit.strong if training else None)
    clean = kit.run(sampler, backend, workers, epochs=(0, 1))
    bad = {4, 17}  # a JPEG and a PNG
    for row in bad:
        damage(manifest.path(row))
    listener = Listener()
    loader = kit.open(sampler, backend, workers, on_bad=listener)
    batches = kit.epochs(loader, 0, 1)
    loader.close()
    assert listener.rows == sorted(bad)
    assert loader.bad == {row: reason for row, reason, _ in listener.told}
    assert all(loader.bad.values())
    assert_only_these_are_padding(kit, batches, clean, bad)


@needs_dali
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda d: d.__name__)
def test_both_backends_give_the_same_reason(kit, photos, damage):
    manifest = kit.manifest(photos, sorted(p.name for p in photos.iterdir()))
    damage(manifest.path(4))
    reasons = []
    for backend in ("torch", "dali-cpu"):
        loader = kit.open(kit.sampler(manifest, BATCH, kit.plain), backend, 0)
        kit.epochs(loader, 0)
        loader.close()
        reasons.append(loader.bad)
    assert reasons[0] == reasons[1] and list(reasons[0]) == [4]


@BACKENDS
@SPLIT
def test_several_bad_files_in_one_batch_and_a_batch_with_nothing_else(kit, photos, backend, workers, training):
    manifest = kit.manifest(photos, sorted(p.name for p in photos.iterdir()))
    sampler = kit.sampler(manifest, BATCH, kit.strong if training else None)
    clean = kit.run(sampler, backend, workers, epochs=(0, 1))
    rows = [batch.rows.tolist() for batch in clean]
    bad = set(rows[1][1:5]) | set(rows[2])
    for k, row in enumerate(sorted(bad)):
        DAMAGES[k % len(DAMAGES)](manifest.path(row))
    listener = Listener()
    batches = kit.run(sampler, backend, workers, epochs=(0, 1), on_bad=listener)
    assert listener.rows == sorted(bad)
    assert_only_these_are_padding(kit, batches, clean, bad)
    assert not batches[2].pixels.any() and not batches[2].weight.any()


@BACKENDS
def test_every_file_bad_ends_the_epoch_with_nothing_but_padding(kit, photos, backend, workers):
    manifest = kit.manifest(photos, sorted(p.name for p in photos.iterdir()))
    for row in range(N):
        html(manifest.path(row))
    listener = Listener()
    batches = kit.run(kit.sampler(manifest, BATCH, kit.strong), backend, workers, epochs=(0, 1), on_bad=listener)
    assert listener.rows == list(range(N))
    assert len(batches) == 2 * N // BATCH and not any(batch.weight.any() for batch in batches)


@BACKENDS
@SPLIT
@pytest.mark.parametrize("damage", [cut, larger], ids=lambda d: d.__name__)
def test_a_file_that_goes_bad_while_the_epoch_runs_is_found_at_its_turn(
    kit, photos, backend, workers, training, damage
):
    manifest = kit.manifest(photos, sorted(p.name for p in photos.iterdir()))
    sampler = kit.sampler(manifest, 2, kit.strong if training else None)
    clean = kit.run(sampler, backend, workers)
    late = int(clean[-1].rows[1])  # far behind what is prepared ahead
    listener = Listener()
    loader = kit.open(sampler, backend, workers, on_bad=listener)
    batches = []
    for batch in loader.epoch(0):
        batches.append(kit.copy(batch))
        if len(batches) == 1:
            damage(manifest.path(late))
    loader.close()
    assert listener.rows == [late]
    assert_only_these_are_padding(kit, batches, clean, {late})


@BACKENDS
@SPLIT
def test_a_bad_file_in_the_batch_prepared_ahead_leaves_the_current_one_alone(kit, photos, backend, workers, training):
    manifest = kit.manifest(photos, sorted(p.name for p in photos.iterdir()))
    sampler = kit.sampler(manifest, BATCH, kit.strong if training else None)
    clean = kit.run(sampler, backend, workers)
    bad = {int(clean[1].rows[2])}
    cut(manifest.path(*bad))
    listener = Listener()
    loader = kit.open(sampler, backend, workers, on_bad=listener)
    running = loader.epoch(0)
    first = kit.copy(next(running))
    kit.assert_same([first], clean[:1])
    rest = [kit.copy(batch) for batch in running]
    loader.close()
    assert listener.rows == sorted(bad)
    assert_only_these_are_padding(kit, [first, *rest], clean, bad)


@BACKENDS
def test_the_epoch_named_in_the_report_is_the_one_that_found_it(kit, photos, backend, workers):
    manifest = kit.manifest(photos, sorted(p.name for p in photos.iterdir()))
    sampler = kit.sampler(manifest, 2, kit.plain)
    listener = Listener()
    loader = kit.open(sampler, backend, workers, on_bad=listener)
    kit.epochs(loader, 0)
    late = int(sampler.request(1, sampler.steps - 1).rows[0])
    html(manifest.path(late))
    kit.epochs(loader, 1, 2)
    loader.close()
    assert [(row, epoch) for row, _, epoch in listener.told] == [(late, 1)]


@BACKENDS
def test_known_bad_rows_are_padding_from_the_start_and_not_reported_again(kit, photos, backend, workers):
    manifest = kit.manifest(photos, sorted(p.name for p in photos.iterdir()))
    sampler = kit.sampler(manifest, BATCH, kit.strong)
    clean = kit.run(sampler, backend, workers)
    listener = Listener()
    loader = kit.open(sampler, backend, workers, bad={3: "known", 9: "known"}, on_bad=listener)
    batches = kit.epochs(loader, 0)
    loader.close()
    assert listener.told == [] and loader.bad == {3: "known", 9: "known"}
    assert_only_these_are_padding(kit, batches, clean, {3, 9})


@BACKENDS
def test_a_row_once_bad_stays_bad_when_its_file_is_repaired_so_that_a_resumed_run_sees_the_same(
    kit, photos, backend, workers
):
    manifest = kit.manifest(photos, sorted(p.name for p in photos.iterdir()))
    sampler = kit.sampler(manifest, BATCH, kit.strong)
    clean = kit.run(sampler, backend, workers, epochs=(0, 1))
    path = manifest.path(5)
    shutil.copy(path, photos / "copy")
    cut(path)
    loader = kit.open(sampler, backend, workers)
    batches = kit.epochs(loader, 0)
    shutil.copy(photos / "copy", path)
    batches += kit.epochs(loader, 1)
    resumed = kit.open(sampler, backend, workers, bad=loader.bad)
    kit.assert_same(kit.epochs(resumed, 1), batches[sampler.steps :])
    loader.close()
    resumed.close()
    assert_only_these_are_padding(kit, batches, clean, {5})


@BACKENDS
def test_a_bad_file_among_those_that_only_pillow_reads(kit, tmp_path, photo, backend, workers):
    for k in range(8):
        photo(k).save(tmp_path / f"{k}.{'gif' if k < 4 else 'jpg'}")
    manifest = kit.manifest(tmp_path, [f"{k}.{'gif' if k < 4 else 'jpg'}" for k in range(8)])
    sampler = kit.sampler(manifest, 4)
    clean = kit.run(sampler, backend, workers, (0, 1))
    for row in (0, 2, 5):
        html(manifest.path(row))
    listener = Listener()
    batches = kit.run(sampler, backend, workers, (0, 1), on_bad=listener)
    assert listener.rows == [0, 2, 5]
    assert_only_these_are_padding(kit, batches, clean, {0, 2, 5})


def as_gif(path: Path) -> None:
    with Image.open(path) as image:
        image.convert("P").save(path, "GIF")


def as_bmp(path: Path) -> None:
    with Image.open(path) as image:
        image.save(path, "BMP")


def without_png_end(path: Path) -> None:
    with Image.open(path) as image:
        image.save(path, "PNG")
    path.write_bytes(path.read_bytes()[:-12])  # all pixels are there, the chunk IEND is not


def with_trailer(path: Path) -> None:
    with Image.open(path) as image:
        image.save(path, "JPEG")
    path.write_bytes(path.read_bytes() + b"SEFT and other things that phones write")


@BACKENDS
@SPLIT
@pytest.mark.parametrize("change", [as_gif, as_bmp, without_png_end, with_trailer], ids=lambda d: d.__name__)
def test_a_file_that_dali_refuses_or_doubts_and_pillow_reads_is_delivered_as_pillow_reads_it(
    kit, photos, backend, workers, training, change: Callable[[Path], None]
):
    manifest = kit.manifest(photos, sorted(p.name for p in photos.iterdir()))
    sampler = kit.sampler(manifest, BATCH, kit.strong if training else None)
    change(manifest.path(5))
    assert not manifest.flags[5] & FLAG_PILLOW
    listener = Listener()
    batches = kit.run(sampler, backend, workers, epochs=(0, 1), on_bad=listener)
    assert listener.told == []
    expected = kit.run(sampler, "torch", 0, epochs=(0, 1))
    for ours, theirs in zip(batches, expected, strict=True):
        np.testing.assert_array_equal(ours.rows, theirs.rows)
        np.testing.assert_array_equal(ours.pixels[ours.rows == 5], theirs.pixels[theirs.rows == 5])


@BACKENDS
def test_a_cut_file_is_found_whatever_the_crop_so_that_a_resumed_run_finds_it_too(
    kit, tmp_path, photo, backend, workers
):
    names = ["base.jpg", "progressive.jpg", "a.png", "a.webp", "a.bmp", "good.jpg"]
    for k, name in enumerate(names):
        photo(k, 400, 300).save(tmp_path / name, progressive=name.startswith("prog"))
    manifest = kit.manifest(tmp_path, names)
    small = replace(kit.plain, scale=(0.05, 0.1))
    for k, name in enumerate(names[:5]):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: -len(whole) // 20])
        for epoch in range(1 if (backend, workers) == ("torch", 2) else 4):  # a crop does not depend on the process
            loader = kit.open(kit.sampler(manifest, 6, small), backend, workers)
            kit.epochs(loader, epoch)
            loader.close()
            assert list(loader.bad) == [k], epoch
        (tmp_path / name).write_bytes(whole)


@needs_dali
def test_a_failure_that_no_file_explains_is_not_blamed_on_one(kit, photos, monkeypatch):
    manifest = kit.manifest(photos, sorted(p.name for p in photos.iterdir()))
    listener = Listener()
    loader = kit.open(kit.sampler(manifest, BATCH, kit.plain), "dali-cpu", 1, on_bad=listener)
    monkeypatch.setattr(
        type(loader._graph), "arguments", lambda self, request, encoded: [[np.zeros(1, np.uint8)] * BATCH] * 4
    )
    with pytest.raises(RuntimeError, match="every file of the batch is readable"):
        list(loader.epoch(0))
    loader.close()
    assert listener.told == []
