"""A disk that is out of reach for a moment: waited for, then an error that stops the work; never a bad image."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from imgcls_fast.core.errors import DataError
from imgcls_fast.data import reach
from imgcls_fast.data.decode import Undecodable, decode_pixels
from imgcls_fast.data.examine import Files
from imgcls_fast.data.findings import ScanOptions
from imgcls_fast.data.scan import scan
from imgcls_fast.loading.loader import dali_missing

needs_dali = pytest.mark.skipif(dali_missing() is not None, reason=str(dali_missing()))
BACKENDS = pytest.mark.parametrize(
    ("backend", "workers"),
    [("torch", 0), ("torch", 2), pytest.param("dali-cpu", 2, marks=needs_dali)],
    ids=["torch-0", "torch-2", "dali-cpu"],
)
FAULTS = [errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EACCES, errno.EMFILE, errno.ENOENT]


@pytest.fixture
def no_patience(monkeypatch):
    monkeypatch.setattr(reach, "WAITS_S", (0.01, 0.01))


@pytest.fixture
def patience(monkeypatch):
    monkeypatch.setattr(reach, "WAITS_S", (0.05,) * 600)


@pytest.fixture
def photos(tmp_path, photo) -> Path:
    for k in range(12):
        photo(k).save(tmp_path / f"{k:02}.{'png' if k % 3 == 2 else 'jpg'}")
    return tmp_path


def failing_open(monkeypatch: pytest.MonkeyPatch, name: str, code: int, times: int) -> list[int]:
    """The first `times` openings of files called `name` fail with `code`; returns the count of them."""
    real, seen = os.open, [0]

    def faulty(path: Any, *arguments: Any, **more: Any) -> int:
        if os.fsdecode(path).endswith(name):
            seen[0] += 1
            if seen[0] <= times:
                raise OSError(code, os.strerror(code), path)
        return real(path, *arguments, **more)

    monkeypatch.setattr(os, "open", faulty)
    return seen


@pytest.mark.parametrize("code", FAULTS, ids=lambda code: errno.errorcode[code])
def test_a_fault_of_the_disk_is_tried_again_and_then_d015_that_names_the_file(
    photos, monkeypatch, no_patience, caplog, code
):
    failing_open(monkeypatch, "03.jpg", code, 2)
    monkeypatch.setattr(reach, "_warned_at", -1e9)
    assert decode_pixels(photos / "03.jpg").shape == (70, 90, 3)
    assert "03.jpg cannot be reached" in caplog.text and len(caplog.records) == 1
    failing_open(monkeypatch, "04.jpg", code, 3)
    with pytest.raises(DataError) as caught:
        decode_pixels(photos / "04.jpg")
    assert caught.value.code == "D015" and caught.value.where == str(photos / "04.jpg")
    assert os.strerror(code) in caught.value.message


def test_a_fault_in_the_middle_of_a_file_is_one_of_the_disk(photos, no_patience):
    tries = []

    def work(file: Any) -> bytes:
        tries.append(file.read(10))
        if len(tries) < 3:
            raise OSError(errno.EIO, "Input/output error")
        return tries[-1]

    assert reach.with_file(photos / "00.jpg", work) == (photos / "00.jpg").read_bytes()[:10]
    assert tries[0] == tries[2]


def test_the_waits_of_a_whole_outage_are_between_ten_and_twenty_seconds():
    assert 10 <= sum(reach.WAITS_S) <= 20 and list(reach.WAITS_S) == sorted(reach.WAITS_S)


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo], ids=["folder", "pipe"])
def test_what_no_waiting_makes_a_file_is_a_bad_image_at_once(tmp_path, make: Callable[[Path], None]):
    make(tmp_path / "x.jpg")
    with pytest.raises(Undecodable):
        decode_pixels(tmp_path / "x.jpg")
    with pytest.raises(Undecodable):
        decode_pixels(tmp_path / ("n" * 5000))
    with pytest.raises(Undecodable):
        decode_pixels("nul\0.jpg")


def test_a_missing_file_that_was_never_seen_is_not_waited_for(tmp_path):
    with pytest.raises(FileNotFoundError):
        reach.read(tmp_path / "none", seen=False)


@BACKENDS
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("which", ["jpeg", "gif"])
def test_files_that_went_away_stop_the_epoch_with_d015_and_no_row_is_bad(
    kit, photos, photo, backend, workers, training, which, no_patience
):
    photo(50).save(photos / "30.gif")
    manifest = kit.manifest(photos, sorted(p.name for p in photos.iterdir()))
    sampler = kit.sampler(manifest, 4, kit.strong if training else None)
    clean = kit.run(sampler, backend, workers, epochs=(0, 1))
    told: list[Any] = []
    loader = kit.open(sampler, backend, workers, on_bad=lambda *what: told.append(what))
    gone = manifest.path(12 if which == "gif" else 4)
    gone.rename(photos / "away")
    delivered = []
    with pytest.raises(DataError) as caught:
        for epoch in (0, 1):
            for batch in loader.epoch(epoch):
                delivered.append(kit.copy(batch))
    assert caught.value.code == "D015" and caught.value.where == str(gone)
    assert told == [] and loader.bad == {}
    kit.assert_same(delivered, clean[: len(delivered)])
    (photos / "away").rename(gone)
    loader.close()
    again = kit.open(sampler, backend, workers)
    epoch, index = divmod(len(delivered), sampler.steps)
    kit.assert_same(kit.epochs(again, epoch, start=index), clean[len(delivered) :][: sampler.steps - index])
    again.close()


@BACKENDS
def test_what_was_away_between_two_epochs_only_is_read_again(kit, photos, backend, workers, no_patience):
    """A loader that reads ahead meets the first files of the next epoch while they are away."""
    manifest = kit.manifest(photos, sorted(p.name for p in photos.iterdir()))
    sampler = kit.sampler(manifest, 4)
    clean = kit.run(sampler, backend, workers)
    loader = kit.open(sampler, backend, workers)
    running = loader.epoch(0)
    batches = [kit.copy(next(running))]
    manifest.path(0).rename(photos / "away")
    batches += [kit.copy(batch) for batch in running]
    time.sleep(0.2)
    (photos / "away").rename(manifest.path(0))
    kit.assert_same(batches, clean)
    kit.assert_same(kit.epochs(loader, 1), clean)
    loader.close()
    assert loader.bad == {}


@BACKENDS
def test_a_folder_that_comes_back_in_time_changes_no_bit(kit, photos, tmp_path, backend, workers, patience):
    manifest = kit.manifest(photos, sorted(p.name for p in photos.iterdir()))
    sampler = kit.sampler(manifest, 2, kit.strong)
    clean = kit.run(sampler, backend, workers, epochs=(0, 1))
    away = tmp_path.with_name(tmp_path.name + "-away")
    loader = kit.open(sampler, backend, workers)
    running = loader.epoch(0)
    batches = [kit.copy(next(running))]
    photos.rename(away)
    back = threading.Timer(0.5, away.rename, [photos])
    back.start()
    batches += [kit.copy(batch) for batch in running] + kit.epochs(loader, 1)
    back.join()
    loader.close()
    assert loader.bad == {}
    kit.assert_same(batches, clean)


@pytest.fixture
def many(tmp_path, photo) -> Path:
    """Ten batches of 32 files."""
    folder = tmp_path / "many"
    folder.mkdir()
    for k in range(4):
        photo(k, 24, 20).save(folder / f"000{k}.jpg")
    for k in range(4, 320):
        os.link(folder / f"000{k % 4}.jpg", folder / f"{k:04}.jpg")
    return folder


@BACKENDS
@pytest.mark.parametrize("part", [1, 2], ids=["all-away", "half-away"])
def test_a_folder_that_stays_away_is_waited_for_as_long_as_one_file(kit, many, backend, workers, monkeypatch, part):
    monkeypatch.setattr(reach, "WAITS_S", (0.5, 0.5, 0.5))
    sampler = kit.sampler(kit.manifest(many, sorted(p.name for p in many.iterdir())), 32)
    loader = kit.open(sampler, backend, workers)
    running = loader.epoch(0)
    next(running)
    for path in list(many.iterdir())[::part]:
        path.unlink()
    begin = time.monotonic()
    with pytest.raises(DataError) as caught:
        list(running)
    loader.close()
    # one patience is 1.5 s; one for each file would be 24 s for a batch alone
    assert time.monotonic() - begin < 18
    assert caught.value.code == "D015" and loader.bad == {}


@BACKENDS
def test_a_wait_for_files_can_be_called_off(kit, many, backend, workers, monkeypatch):
    monkeypatch.setattr(reach, "WAITS_S", (60.0,))
    sampler = kit.sampler(kit.manifest(many, sorted(p.name for p in many.iterdir())), 32)
    loader = kit.open(sampler, backend, workers)
    running = loader.epoch(0)
    next(running)
    many.rename(many.with_name("away"))
    begin = time.monotonic()
    threading.Timer(0.5, loader.hurry).start()
    with pytest.raises(DataError, match="cannot be reached"):
        list(running)
    loader.close()
    assert time.monotonic() - begin < 30


def test_files_that_fail_one_after_the_other_are_each_waited_for_when_the_first_came_back(photos, monkeypatch):
    monkeypatch.setattr(reach, "WAITS_S", (0.1, 0.1, 0.1))
    shared = reach.Patience()
    for name in ("03.jpg", "04.jpg", "06.jpg", "07.jpg"):
        failing_open(monkeypatch, name, errno.EIO, 2)
        assert reach.read(photos / name, patience=shared) == (photos / name).read_bytes()


def test_in_an_outage_that_was_waited_for_no_further_file_is(photos, monkeypatch):
    monkeypatch.setattr(reach, "WAITS_S", (0.1, 20.0))
    shared, now = reach.Patience(), [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        now[0] += seconds

    monkeypatch.setattr(time, "sleep", sleep)
    for name in ("03.jpg", "04.jpg", "06.jpg"):
        (photos / name).unlink()
    for name in ("03.jpg", "04.jpg"):
        with pytest.raises(DataError, match="20 s of trying"):
            reach.read(photos / name, patience=shared)
        assert sum(slept) == pytest.approx(20.1)
    now[0] += 25.0
    with pytest.raises(DataError):
        reach.read(photos / "06.jpg", patience=shared)
    assert sum(slept) == pytest.approx(40.2), "a new outage is waited for again"


def classes(root: Path) -> Path:
    for c in "ab":
        (root / c).mkdir(parents=True)
        for k in range(4):
            noise = np.random.default_rng(ord(c) + k).integers(0, 256, (9, 12, 3), dtype=np.uint8)
            Image.fromarray(noise).save(root / c / f"{k}.{'tif' if k == 3 else 'png'}")
    return root


@pytest.mark.parametrize("name", ["0.png", "3.tif"])
@pytest.mark.parametrize("when", ["before the probe", "before the digest", "before the decoding"])
def test_a_file_that_vanishes_while_the_scan_runs_is_d015_and_not_bad(tmp_path, monkeypatch, no_patience, when, name):
    root = classes(tmp_path / "x")
    step = {"before the probe": "look", "before the digest": "_hash", "before the decoding": "_decode_suspects"}[when]
    real = getattr(Files, step)

    def without(self: Files, *arguments: Any) -> Any:
        (root / "a" / name).unlink(missing_ok=True)
        return real(self, *arguments)

    monkeypatch.setattr(Files, step, without)
    if when == "before the decoding" and name == "0.png":
        pytest.skip("a sound PNG is not decoded by the scan")
    with pytest.raises(DataError) as caught:
        scan(root)
    assert caught.value.code == "D015" and caught.value.where.endswith(name)


def test_the_scan_waits_for_files_that_come_back(tmp_path, monkeypatch, patience):
    root = classes(tmp_path / "x")
    expected = scan(root).manifest.fingerprint
    real = Files.look

    def late(self: Files) -> None:
        root.rename(tmp_path / "away")
        threading.Timer(0.4, (tmp_path / "away").rename, [root]).start()
        real(self)

    monkeypatch.setattr(Files, "look", late)
    result = scan(root)
    assert result.manifest.fingerprint == expected and not result.quarantine


def test_a_broken_link_is_a_bad_image_at_the_scan_and_costs_no_waiting(tmp_path, monkeypatch):
    def never(seconds: float) -> None:
        raise AssertionError("waited")

    root = classes(tmp_path / "x")
    (root / "a" / "link.png").symlink_to("nowhere")
    monkeypatch.setattr(time, "sleep", never)
    result = scan(root, ScanOptions(max_bad=2))
    assert [bad.reason for bad in result.quarantine] == ["broken symbolic link"]
