"""The embedded digits, the check for changed files, and channel statistics."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from imgcls_fast.core.config import RunConfig
from imgcls_fast.core.errors import HardwareError
from imgcls_fast.data import reach
from imgcls_fast.data.decode import decode_pixels
from imgcls_fast.data.digits import write_digits
from imgcls_fast.data.prepare import changed_files, channel_statistics, prepare, statistics

PLANTED = {"train/3/cut.png", "train/7/empty.png", "train/8/not_found.png", "train/4/copy_of_a_test_image.png"}


def contents(folder: Path) -> dict[str, str]:
    return {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in folder.rglob("*")
        if p.is_file()
    }


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("cache")
    write_digits(place)
    return place


# ---------------------------------------------------------------- digits


def test_all_1797_digits_are_there_and_four_planted_files(cache):
    from sklearn.datasets import load_digits

    files = contents(write_digits(cache))
    assert files.keys() >= PLANTED and len(files) == 1797 + 4
    digits = load_digits()
    for split, share in (("train", 0.7), ("val", 0.1), ("test", 0.2)):
        count = sum(name.startswith(split) and name not in PLANTED for name in files)
        assert abs(count / 1797 - share) < 0.01
    for label in range(10):
        count = sum(name.split("/")[1] == str(label) and name not in PLANTED for name in files)
        assert count == (digits.target == label).sum()


def test_each_picture_is_the_digit_of_its_name(cache):
    from sklearn.datasets import load_digits

    digits = load_digits()
    nth = [0] * 10
    folder = write_digits(cache)
    found = {p.name: p for p in folder.rglob("[0-9]_*.png")}
    assert len(found) == 1797
    for pixels, label in list(zip(digits.images, digits.target, strict=True))[:300]:
        with Image.open(found[f"{label}_{nth[label]:03}.png"]) as image:
            assert image.size == (32, 32) and image.mode == "L"
            small = np.asarray(image.resize((8, 8), Image.Resampling.BOX)) / (255 / 16)
        assert np.abs(small - pixels).mean() < 1
        nth[label] += 1


def test_the_first_run_meets_three_bad_files_and_one_duplicate_of_a_test_image(cache):
    prepared = prepare(RunConfig(), cache)
    assert len(prepared.manifest) == 1797
    assert {bad.path for bad in prepared.found.quarantine} == PLANTED - {"train/4/copy_of_a_test_image.png"}
    assert prepared.found.dropped == 1
    assert "train/4/copy_of_a_test_image.png" not in list(prepared.manifest.paths)
    facts = prepared.facts()
    assert facts["images"] == 1797 == sum(facts["splits"].values()) == sum(facts["counts"].values())


def test_a_second_call_reuses_the_folder_and_writing_again_gives_the_same_bytes(cache, tmp_path):
    folder = write_digits(cache)
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    assert write_digits(cache) == folder
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before
    assert contents(write_digits(tmp_path)) == contents(folder)
    assert os.listdir(tmp_path) == [folder.name]


def test_two_processes_that_write_at_once_end_with_one_whole_folder(cache, tmp_path):
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=write_digits, args=(tmp_path,)) for _ in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(120)
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert len(os.listdir(tmp_path)) == 1
    assert contents(write_digits(tmp_path)) == contents(write_digits(cache))


def test_a_writer_that_comes_second_takes_the_folder_of_the_first(tmp_path, cache, monkeypatch):
    rename = os.rename

    def later(source: Path, target: Path) -> None:
        rename(source, target)  # the other process
        Path(source).mkdir()
        (Path(source) / "x").touch()
        rename(source, target)  # this one

    monkeypatch.setattr(os, "rename", later)
    assert contents(write_digits(tmp_path)) == contents(write_digits(cache))
    assert len(os.listdir(tmp_path)) == 1


def test_a_cache_that_cannot_be_written_gives_h003(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(HardwareError) as caught:
        write_digits(tmp_path / "file")
    assert caught.value.code == "H003"


# ---------------------------------------------------------------- prepare


@pytest.fixture
def scanned(kit, tmp_path, photo):
    names = [f"{k}.png" for k in range(200)]
    for k, name in enumerate(names):
        photo(k, 12, 9).save(tmp_path / name)
    digest = [np.frombuffer(hashlib.sha256((tmp_path / name).read_bytes()).digest()[:16], np.uint8) for name in names]
    return replace(kit.manifest(tmp_path, names), digest=np.stack(digest))


@pytest.mark.parametrize("threads", [0, 1, 4])
def test_exactly_the_changed_files_are_named_in_order(scanned, threads, monkeypatch):
    monkeypatch.setattr(reach, "WAITS_S", (0.05,))
    assert changed_files(scanned, threads).all == []
    flipped = scanned.path(130)
    content = bytearray(flipped.read_bytes())
    content[-20] ^= 1
    flipped.write_bytes(content)
    scanned.path(3).unlink()
    scanned.path(64).write_bytes(b"")
    scanned.path(199).unlink()
    scanned.path(199).mkdir()
    os.utime(scanned.path(5), (0, 0))  # touched, not changed
    assert changed_files(scanned, threads).all == ["3.png", "64.png", "130.png", "199.png"]


@pytest.mark.parametrize("color", ["gray", "rgb", "rgba"])
def test_channel_statistics_are_those_of_all_pixels_with_every_image_counting_the_same(
    kit, album_manifest, scanned, color
):
    for manifest in (album_manifest, scanned):
        images = [decode_pixels(manifest.path(row), color=color) / 255.0 for row in range(len(manifest))]
        flat = [image.reshape(-1, image.shape[2]) for image in images]
        mean = np.mean([pixels.mean(0) for pixels in flat], 0)
        variance = np.mean([(pixels**2).mean(0) for pixels in flat], 0) - mean**2
        got_mean, got_deviation = channel_statistics(manifest, color)
        np.testing.assert_allclose(got_mean, mean, atol=1e-9)
        np.testing.assert_allclose(got_deviation, np.sqrt(np.maximum(variance, 1e-6)), atol=1e-9)


def test_channel_statistics_look_at_training_rows_only_and_pass_over_bad_files(scanned):
    split = np.full(len(scanned), 2, np.uint8)
    split[:3] = 0
    manifest = scanned.with_splits(split)
    manifest.path(1).write_bytes(b"bad")
    expected = np.mean([decode_pixels(manifest.path(row)).reshape(-1, 3).mean(0) / 255 for row in (0, 2)], 0)
    np.testing.assert_allclose(channel_statistics(manifest, "rgb")[0], expected, atol=1e-9)


def test_channel_statistics_have_one_number_a_channel_also_when_no_image_can_be_read(scanned):
    for row in range(len(scanned)):
        scanned.path(row).write_bytes(b"")
    mean, deviation = channel_statistics(scanned, "rgb")
    assert len(mean) == len(deviation) == 3 and min(deviation) > 0


def test_a_uniform_image_has_no_deviation_to_divide_by_zero(kit, tmp_path):
    Image.new("RGB", (8, 8), (255, 0, 51)).save(tmp_path / "a.png")
    mean, deviation = channel_statistics(kit.manifest(tmp_path, ["a.png"]), "rgb")
    np.testing.assert_allclose(mean, (1, 0, 0.2), atol=1e-12)
    np.testing.assert_allclose(deviation, 1e-3)


def test_statistics_are_plain_values_about_all_images(cache):
    import json

    found = statistics(prepare(RunConfig(), cache))
    json.dumps(found)
    assert found["width"] == {"min": 32, "p5": 32, "median": 32, "p95": 32, "max": 32} == found["height"]
    assert sum(sum(counts.values()) for counts in found["per_split"].values()) == 1797
    assert found["turned_by_exif"] == 0 and 1 <= found["imbalance"] < 1.1 and len(found["mean"]) == 3
