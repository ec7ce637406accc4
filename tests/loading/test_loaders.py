"""The contract that every loader backend keeps: the same rows, crops and sizes, whoever decodes."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from imgcls_fast.core.errors import ConfigError, HardwareError
from imgcls_fast.core.manifest import FLAG_PILLOW
from imgcls_fast.core.pixels import CHANNELS
from imgcls_fast.data.decode import decode_pixels
from imgcls_fast.loading.backend import make_batch
from imgcls_fast.loading.loader import dali_missing, open_loader
from imgcls_fast.loading.render import render

dali = pytest.param("dali-cpu", 2, marks=pytest.mark.skipif(dali_missing() is not None, reason=str(dali_missing())))
needs_dali = pytest.mark.skipif(dali_missing() is not None, reason=str(dali_missing()))
BACKENDS = pytest.mark.parametrize(
    ("backend", "workers"), [("torch", 0), ("torch", 2), dali], ids=["torch-0", "torch-2", "dali-cpu"]
)


def level_difference(ours: list, theirs: list) -> tuple[int, float, float]:
    """Greatest difference, greatest mean over one image, and mean over all, in levels."""
    parts = [np.abs(a.pixels.astype(int) - b.pixels) for a, b in zip(ours, theirs, strict=True)]
    images = np.concatenate([part.reshape(len(part), -1) for part in parts])
    return int(images.max()), float(images.mean(1).max()), float(images.mean())


# ---------------------------------------------------------------- rows, targets, shapes


@BACKENDS
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_batches_are_what_the_sampler_asked_for(kit, album_manifest, backend, workers, training):
    sampler = kit.sampler(album_manifest, 8, kit.strong if training else None)
    loader = kit.open(sampler, backend, workers)
    try:
        for epoch in (0, 1):
            batches = list(loader.epoch(epoch))
            assert len(batches) == sampler.steps
            for index, batch in enumerate(batches):
                wanted = sampler.request(epoch, index)
                assert len(batch) == 8
                assert batch.pixels.shape == (8, 40, 40, 3) and batch.pixels.is_contiguous()
                assert [str(x.dtype) for x in (batch.pixels, batch.targets, batch.weight, batch.rows)] == [
                    "torch.uint8", "torch.float32", "torch.float32", "torch.int64",
                ]  # fmt: skip
                np.testing.assert_array_equal(batch.rows, wanted.rows)
                np.testing.assert_array_equal(batch.weight, wanted.rows >= 0)
                one_hot = np.eye(3, dtype=np.float32)[wanted.rows % 3] * (wanted.rows >= 0)[:, None]
                np.testing.assert_array_equal(batch.targets, one_hot)
        assert loader.bad == {}
    finally:
        loader.close()


@BACKENDS
@pytest.mark.parametrize("batch_size", [1, 7, 16, 90])
def test_evaluation_delivers_each_row_once_whatever_the_batch_size(kit, album_manifest, backend, workers, batch_size):
    whole = kit.run(kit.sampler(album_manifest, len(album_manifest)), backend, workers, once=True)[0]
    batches = kit.run(kit.sampler(album_manifest, batch_size), backend, workers, once=True)
    rows = np.concatenate([batch.rows for batch in batches])
    pixels = np.concatenate([batch.pixels for batch in batches])
    assert rows[rows >= 0].tolist() == list(range(len(album_manifest)))
    np.testing.assert_array_equal(pixels[rows >= 0], whole.pixels)
    last = batches[-1]
    for k in np.flatnonzero(last.rows < 0):  # padding repeats a good row of its batch
        assert any((last.pixels[k] == last.pixels[g]).all() for g in np.flatnonzero(last.rows >= 0))


@BACKENDS
def test_a_delivered_batch_is_not_overwritten_by_later_ones(kit, album_manifest, backend, workers):
    loader = kit.open(kit.sampler(album_manifest, 4, kit.strong), backend, workers)
    try:
        held, copies = [], []
        for batch in loader.epoch(0):
            held.append(batch)
            copies.append(kit.copy(batch))
    finally:
        loader.close()
    kit.assert_same([kit.copy(batch) for batch in held], copies)


@BACKENDS
def test_epochs_differ_and_one_asked_for_again_is_the_same(kit, album_manifest, backend, workers):
    loader = kit.open(kit.sampler(album_manifest, 8, kit.strong), backend, workers)
    try:
        first, again, later, once_more = (kit.epochs(loader, epoch) for epoch in (0, 0, 5, 0))
    finally:
        loader.close()
    kit.assert_same(first, again)
    kit.assert_same(first, once_more)
    assert not np.array_equal(first[0].rows, later[0].rows)


@pytest.mark.parametrize(
    ("backend", "counts"), [("torch", (0, 1, 2)), pytest.param("dali-cpu", (1, 2, 3), marks=needs_dali)]
)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_the_number_of_workers_changes_no_bit(kit, album_manifest, backend, counts, training):
    sampler = kit.sampler(album_manifest, 6, kit.strong if training else None)
    runs = [kit.run(sampler, backend, workers, epochs=(0, 1)) for workers in counts]
    for other in runs[1:]:
        kit.assert_same(runs[0], other)


@BACKENDS
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_resume_in_the_middle_delivers_the_rest_bit_for_bit(kit, album_manifest, backend, workers, training):
    sampler = kit.sampler(album_manifest, 6, kit.strong if training else None)
    whole = kit.run(sampler, backend, workers, epochs=(1, 2))
    steps = sampler.steps
    for start in (1, 3, steps - 1):
        loader = kit.open(sampler, backend, workers)
        rest = kit.epochs(loader, 1, start=start) + kit.epochs(loader, 2)
        kit.assert_same(rest, whole[start:])
        loader.close()


@BACKENDS
def test_an_epoch_left_early_does_not_disturb_the_next_one(kit, album_manifest, backend, workers):
    sampler = kit.sampler(album_manifest, 6, kit.strong)
    whole = kit.run(sampler, backend, workers, epochs=(0, 1))
    loader = kit.open(sampler, backend, workers)
    try:
        for batch in loader.epoch(0):
            np.testing.assert_array_equal(batch.rows, whole[0].rows)
            break
        kit.assert_same(kit.epochs(loader, 1), whole[sampler.steps :])
        kit.assert_same(kit.epochs(loader, 0, start=2), whole[2 : sampler.steps])
    finally:
        loader.close()


# ---------------------------------------------------------------- pixels


@pytest.mark.parametrize("color", ["rgb", "gray", "rgba"])
@pytest.mark.parametrize("augmented", ["color", "plain", "evaluation"])
def test_the_torch_loader_is_decode_crop_resize_flip_and_colour(kit, album_manifest, color, augmented):
    pixels = kit.pixels(color=color)
    augment = {"color": kit.strong, "plain": kit.plain, "evaluation": None}[augmented]
    sampler = kit.sampler(album_manifest, 8, augment, pixels)
    for index, batch in enumerate(kit.run(sampler, "torch", 0)):
        assert batch.pixels.shape == (8, 40, 40, CHANNELS[color])
        request = sampler.request(0, index)
        for k in np.flatnonzero(request.rows >= 0):
            image = decode_pixels(album_manifest.path(int(request.rows[k])), color=color)
            np.testing.assert_array_equal(batch.pixels[k], render(image, request, int(k), pixels))


@needs_dali
@pytest.mark.parametrize("color", ["rgb", "gray"])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("exif", ["apply", "ignore"])
@pytest.mark.parametrize("augmented", ["color", "plain", "evaluation"])
def test_both_backends_draw_the_same_crops_of_every_kind_of_image(
    kit, album_manifest, color, interpolation, exif, augmented
):
    pixels = kit.pixels(color=color, interpolation=interpolation, exif=exif)
    augment = {"color": kit.strong, "plain": kit.plain, "evaluation": None}[augmented]
    sampler = kit.sampler(album_manifest, 8, augment, pixels)
    epochs = (0, 1) if augment else (0,)
    one, two = kit.run(sampler, "torch", 0, epochs), kit.run(sampler, "dali-cpu", 1, epochs)
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a.rows, b.rows)
        np.testing.assert_array_equal(a.weight, b.weight)
        np.testing.assert_array_equal(a.targets, b.targets)
    greatest, worst_image, mean = level_difference(one, two)
    assert mean < 0.5 and worst_image < 1.0, (greatest, worst_image, mean)


@needs_dali
@pytest.mark.parametrize(("size", "crop_pct"), [(40, 1.0), (40, 0.875), (200, 0.95), (33, 0.5)])
def test_evaluation_pixels_agree_for_every_crop_share_also_when_images_are_smaller(kit, album_manifest, size, crop_pct):
    sampler = kit.sampler(album_manifest, 8, None, kit.pixels(size, crop_pct=crop_pct))
    one, two = kit.run(sampler, "torch", 0), kit.run(sampler, "dali-cpu", 1)
    greatest, worst_image, mean = level_difference(one, two)
    assert greatest <= 2 and worst_image < 0.5 and mean <= 0.25, (greatest, worst_image, mean)


@needs_dali
@pytest.mark.parametrize("name", ["photo.gif", "deep.png", "photo.tif", "long.png", "tall.jpg"])
def test_rows_that_dali_cannot_decode_come_from_pillow_bit_for_bit(kit, album, album_manifest, name):
    row = list(album_manifest.paths).index(name)
    sampler = kit.sampler(album_manifest, 8, kit.strong)
    assert sampler.needs_pillow(np.array([row]))[0]
    for a, b in zip(kit.run(sampler, "torch", 0), kit.run(sampler, "dali-cpu", 1), strict=True):
        for k in np.flatnonzero(a.rows == row):
            np.testing.assert_array_equal(a.pixels[k], b.pixels[k])


@needs_dali
@pytest.mark.parametrize("augmented", [True, False])
def test_a_split_that_only_pillow_reads_works_on_dali_too(kit, tmp_path, photo, augmented):
    for k in range(5):
        photo(k).convert("P").save(tmp_path / f"{k}.gif")
    manifest = kit.manifest(tmp_path, [f"{k}.gif" for k in range(5)])
    assert (manifest.flags & FLAG_PILLOW).all()
    sampler = kit.sampler(manifest, 2, kit.strong if augmented else None)
    kit.assert_same(kit.run(sampler, "torch", 0, (0, 1)), kit.run(sampler, "dali-cpu", 1, (0, 1)))


@BACKENDS
def test_file_names_that_are_not_utf8_are_read(kit, tmp_path, photo, backend, workers):
    names = [os.fsdecode(name) for name in (b"caf\xe9.jpg", b"\xff\xfe.png", "ž.jpg".encode(), b"a'b\"c\\d\n.jpg")]
    for k, name in enumerate(names):
        photo(k).save(tmp_path / name, "PNG" if name.endswith("png") else "JPEG")
    loader = kit.open(kit.sampler(kit.manifest(tmp_path, names), 4), backend, workers)
    batch = kit.epochs(loader, 0)[0]
    loader.close()
    assert batch.rows.tolist() == [0, 1, 2, 3] and loader.bad == {}
    means = batch.pixels.reshape(4, -1).mean(1)
    expected = [np.asarray(photo(k).resize((45, 45)))[2:42, 2:42].mean() for k in range(4)]
    np.testing.assert_allclose(means, expected, atol=8)


@BACKENDS
def test_absolute_paths_outside_the_root_are_read(kit, tmp_path, photo, backend, workers):
    (tmp_path / "root").mkdir()
    (tmp_path / "elsewhere").mkdir()
    photo(1).save(tmp_path / "root" / "in.png")
    photo(2).save(tmp_path / "elsewhere" / "out.png")
    manifest = kit.manifest(tmp_path / "root", ["in.png", str(tmp_path / "elsewhere" / "out.png")])
    loader = kit.open(kit.sampler(manifest, 2), backend, workers)
    assert [batch.rows.tolist() for batch in kit.epochs(loader, 0)] == [[0, 1]]
    assert loader.bad == {}
    loader.close()


@needs_dali
def test_a_relative_root_is_read(kit, tmp_path, photo, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photo(1).save("in.jpg")
    manifest = kit.manifest(Path("."), ["in.jpg"])
    one, two = (kit.run(kit.sampler(manifest, 1), backend) for backend in ("torch", "dali-cpu"))
    assert level_difference(one, two)[0] <= 2


# ---------------------------------------------------------------- what a backend cannot do


@needs_dali
def test_dali_refuses_rgba_by_name_and_the_torch_loader_keeps_the_alpha(kit, album_manifest, album):
    sampler = kit.sampler(album_manifest, 8, None, kit.pixels(color="rgba"))
    for backend in ("dali-cpu", "dali-gpu"):
        with pytest.raises(ConfigError) as caught:
            kit.open(sampler, backend)
        assert caught.value.code == "C004" and "rgba" in caught.value.message and caught.value.try_ == "--loader torch"
    row = list(album_manifest.paths).index("rgba.png")
    batches = kit.run(sampler, "torch", 0)
    alpha = np.concatenate([b.pixels for b in batches])[np.concatenate([b.rows for b in batches]) == row][0, :, :, 3]
    whole = np.asarray(Image.open(album / "rgba.png").getchannel("A").resize((57, 45), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(alpha, whole[2:42, 8:48])


@needs_dali
def test_dali_gpu_without_a_gpu_device_is_refused(kit, album_manifest):
    with pytest.raises(HardwareError) as caught:
        kit.open(kit.sampler(album_manifest, 8), "dali-gpu", device="cpu")
    assert caught.value.code == "H001"


def test_without_dali_the_error_names_the_other_loader(kit, album_manifest, monkeypatch):
    monkeypatch.setattr("imgcls_fast.loading.loader.dali_missing", lambda: "it is not installed")
    with pytest.raises(HardwareError) as caught:
        open_loader(kit.sampler(album_manifest, 8), "dali-cpu", workers=1)
    assert caught.value.code == "H004" and caught.value.try_ == "--loader torch"


def test_a_batch_can_be_moved_to_page_locked_memory_as_torchs_dataloader_asks(kit, album_manifest):
    from torch.utils.data._utils.pin_memory import pin_memory

    class Tensor:
        def pin_memory(self) -> str:
            return "pinned"

    sampler = kit.sampler(album_manifest, 8)
    batch = make_batch(album_manifest, sampler.request(0, 0), np.zeros((8, 40, 40, 3), np.uint8))
    fake = type(batch)(Tensor(), Tensor(), Tensor(), Tensor())
    moved, failed = pin_memory((fake, {}))
    assert (moved.pixels, moved.targets, moved.weight, moved.rows, failed) == ("pinned",) * 4 + ({},)
