"""Gray images of 16 bits that use fewer: as bright as they were made, the same in every part that decodes."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from imgcls_fast.core.manifest import FLAG_WIDE, Manifest
from imgcls_fast.core.pixels import Pixels
from imgcls_fast.core.settings import build_config
from imgcls_fast.data.decode import decode_pixels, scale_to_8
from imgcls_fast.data.depth import used_bits
from imgcls_fast.data.findings import ScanOptions
from imgcls_fast.data.prepare import prepare, statistics
from imgcls_fast.data.scan import inspect
from imgcls_fast.loading.loader import dali_missing
from imgcls_fast.training.defaults import Notes
from imgcls_fast.training.plan_model import Start
from imgcls_fast.training.plan_numbers import _bits

NOTICE = "16-bit gray use"


def deep(path: Path, bits: int, seed: int = 0, side: int = 40) -> Path:
    """Noise of so many bits in a file of 16; the highest value occurs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng([bits, seed]).integers(0, 1 << bits, (side, side)).astype(np.uint16)
    values[0, 0] = (1 << bits) - 1
    Image.fromarray(values).save(path)
    return path


def folder(root: Path, bits: int, n: int = 6, ending: str = "png") -> Path:
    for c in "ab":
        for k in range(n):
            deep(root / c / f"{k}.{ending}", bits, seed=k + 100 * ord(c))
    return root


@pytest.mark.parametrize("bits", range(8, 17))
def test_scaling_is_the_rounded_quotient_for_every_value_and_number_of_bits(bits: int) -> None:
    every = np.arange(65536, dtype=np.uint16)
    np.testing.assert_array_equal(scale_to_8(every, bits), np.minimum(np.round(every / ((1 << bits) - 1) * 255), 255))


def test_the_bits_are_those_of_gray_and_not_of_colour() -> None:
    """Colour of 16 bits is read by its high byte from a file, and so it is from an array."""
    values = np.array([[0, 4095, 30000, 65535]], np.uint16)
    colour = decode_pixels(np.repeat(values[:, :, None], 3, 2), bits=12)
    np.testing.assert_array_equal(colour[0, :, 0], [0, 16, 117, 255])
    for gray in (values, values[:, :, None]):
        assert decode_pixels(gray, color="gray", bits=12)[0, :, 0].tolist() == [0, 255, 255, 255]


@pytest.mark.parametrize("ending", ["png", "tif"])
@pytest.mark.parametrize("bits", [8, 9, 12, 15, 16])
def test_the_bits_that_images_use_are_measured(tmp_path: Path, bits: int, ending: str) -> None:
    manifest = inspect(folder(tmp_path, bits, 2, ending)).manifest
    assert (manifest.flags & FLAG_WIDE).all()
    assert used_bits(manifest.with_splits(np.zeros(len(manifest)))) == bits


def test_one_bright_image_counts_and_those_that_are_not_learnt_from_do_not(tmp_path: Path) -> None:
    deep(folder(tmp_path, 12) / "a" / "bright.png", 14)
    manifest = inspect(tmp_path).manifest
    split = np.zeros(len(manifest), np.uint8)
    assert used_bits(manifest.with_splits(split)) == 14
    split[list(manifest.paths).index("a/bright.png")] = 2
    assert used_bits(manifest.with_splits(split)) == 12
    assert used_bits(manifest.with_splits(split).take(np.zeros(0, np.int64))) is None


def test_a_damaged_image_is_passed_over(tmp_path: Path) -> None:
    manifest = inspect(folder(tmp_path, 12, 2)).manifest
    manifest.path(0).write_bytes(b"no image")
    assert used_bits(manifest.with_splits(np.zeros(len(manifest)))) == 12


def test_twelve_bits_are_told_at_the_scan_with_the_setting_that_keeps_them(tmp_path: Path) -> None:
    (notice,) = (n for n in inspect(folder(tmp_path, 12)).notices if NOTICE in n)
    assert "12 images of 16-bit gray use 12 bits (0 to 4,095)" in notice and "pixels.bits=12" in notice
    assert not any(NOTICE in n for n in inspect(tmp_path, ScanOptions(bits=12)).notices)
    assert any("too dark" in n for n in inspect(tmp_path, ScanOptions(bits=16)).notices)
    assert any("becomes white" in n for n in inspect(tmp_path, ScanOptions(bits=8)).notices)


def test_images_of_the_whole_range_are_nothing_to_speak_of(tmp_path: Path) -> None:
    assert not any("16-bit" in n for n in inspect(folder(tmp_path, 16)).notices)


def test_dark_colour_of_sixteen_bits_is_told(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 4096, (8, 8, 3)).astype(">u2")
    for c in "ab":
        (tmp_path / c).mkdir()
        (tmp_path / c / "1.png").write_bytes(png16(values))
    (notice,) = (n for n in inspect(tmp_path).notices if "16-bit" in n)
    assert "2 images of 16-bit colour use the lowest 4,095 of 65,535" in notice and "scale them to 8 bits" in notice


def png16(values: np.ndarray) -> bytes:
    """A PNG of 16-bit RGB, which Pillow cannot write."""
    import struct
    import zlib

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    high, wide = values.shape[:2]
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    head = struct.pack(">IIBBBBB", wide, high, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_statistics_are_those_of_the_pixels_that_training_sees(tmp_path: Path) -> None:
    folder(tmp_path / "d", 12, 10)
    prepared = prepare(build_config({"data.source": str(tmp_path / "d")}), tmp_path / "cache")
    found = statistics(prepared)
    assert found["bits"] == 12 and found["mean"] == pytest.approx([0.5] * 3, abs=0.02)
    assert statistics(prepared, 16)["mean"] == pytest.approx([0.5 / 16] * 3, abs=0.01)


def test_statistics_decode_images_as_large_as_the_scan_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a limit above 50 megapixels the larger images were scanned, and were missing in the means and the bits."""
    import imgcls_fast as ic
    from imgcls_fast.data import depth
    from imgcls_fast.data import prepare as module

    limits: set[float] = set()

    def noting(*arguments: Any, max_megapixels: float = 50.0, **named: Any) -> np.ndarray:
        limits.add(max_megapixels)
        return decode_pixels(*arguments, max_megapixels=max_megapixels, **named)

    for place in (depth, module):
        monkeypatch.setattr(place, "decode_pixels", noting)
    ic.data_stats(folder(tmp_path, 12), overrides={"data.max_megapixels": 60})
    assert limits == {60.0}


def backends() -> list[Any]:
    missing = dali_missing()
    return ["torch", pytest.param("dali-cpu", marks=pytest.mark.skipif(bool(missing), reason=str(missing)))]


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("ending", ["png", "tif"])
def test_every_loader_gives_the_pixels_of_the_specification(tmp_path: Path, kit: Any, backend: str, ending: str) -> None:
    names = [f"a/{k}.{ending}" for k in range(4)]
    folder(tmp_path, 12, 4, ending)
    pixels = kit.pixels(40, "rgb", 1.0, bits=12)
    loader = kit.open(kit.sampler(kit.manifest(tmp_path, names), 4, pixels=pixels), backend, workers=0)
    (batch,) = (kit.copy(batch) for batch in loader.epoch(0))
    loader.close()
    expected = [decode_pixels(tmp_path / names[row], bits=12) for row in batch.rows]
    np.testing.assert_array_equal(batch.pixels, np.stack(expected))
    assert batch.pixels.max() == 255


def test_predict_reads_files_arrays_and_bytes_alike(bundle_of: Callable[..., Any], tmp_path: Path) -> None:
    from imgcls_fast.engines.predictor import Predictor
    from imgcls_fast.engines.runtimes import open_engine

    path = deep(tmp_path / "a.png", 12)
    values = np.asarray(Image.open(path)).astype(np.uint16)
    engine = open_engine(bundle_of())
    engine.pixels = replace(engine.pixels, bits=12)
    predictor = Predictor(engine)
    seen = [predictor.preprocess(form) for form in (path, path.read_bytes(), values, Image.open(io.BytesIO(path.read_bytes())))]
    assert len({pixels.tobytes() for pixels in seen}) == 1 and seen[0].mean() == pytest.approx(127.5, abs=8)


def test_a_specification_without_the_setting_is_the_one_of_before() -> None:
    usual = Pixels(8, 1.0, "bilinear", "gray", "apply", (0.5,), (0.5,))
    assert "bits" not in usual.to_dict() and Pixels.from_dict(usual.to_dict()) == usual
    twelve = replace(usual, bits=12)
    assert twelve.to_dict()["bits"] == 12 and Pixels.from_dict(twelve.to_dict()) == twelve


def test_a_server_that_cannot_scale_so_gets_no_decoder() -> None:
    pytest.importorskip("nvidia.dali")
    from imgcls_fast.exporting.triton_decode import decode_pipeline

    with pytest.raises(ValueError, match="trained on 12"):
        decode_pipeline(Pixels(32, 1.0, "bilinear", "rgb", "apply", (0.5,) * 3, (0.25,) * 3, bits=12), gpu=False)


def planned(manifest: Manifest, changes: dict[str, Any]) -> Any:
    from imgcls_fast.training.plan import Machine, make_plan

    return make_plan(build_config({"model.init": "scratch", "model.arch": "small-cnn", **changes}), manifest, Machine(cpus=1))


def test_the_plan_keeps_the_bits_in_the_pixel_specification(tmp_path: Path) -> None:
    manifest = inspect(folder(tmp_path, 12)).manifest.with_splits(np.arange(12) % 3 // 2)
    plan = planned(manifest, {})
    assert plan.pixels.bits == plan.config.pixels.bits == 12
    assert ("pixels.bits", "12", "16-bit training images use 0 to 4,095") in plan.rows
    assert planned(manifest, {"pixels.bits": 14}).pixels.bits == 14
    usual = planned(replace(manifest, flags=np.zeros_like(manifest.flags)), {})
    assert usual.pixels.bits == usual.config.pixels.bits == 16


def test_a_run_of_before_there_was_the_setting_goes_on_without_a_word(tmp_path: Path) -> None:
    from imgcls_fast.core.run import Run
    from imgcls_fast.training.identity import require_same_trajectory

    now = {"optim.lr": 0.1, "pixels.bits": "auto"}
    assert require_same_trajectory({"optim.lr": 0.1}, now, Run(tmp_path), tmp_path) == []


def test_more_images_than_are_looked_at_are_told_with_their_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("advice", "depth"):
        monkeypatch.setattr(f"imgcls_fast.data.{name}.LOOKED_AT", 4)
    (notice,) = (n for n in inspect(folder(tmp_path, 12, 3)).notices if NOTICE in n)
    assert "in the 4 that were looked at" in notice and "brighter in the rest becomes white" in notice


def test_a_run_that_begins_with_another_keeps_its_bits_also_all_sixteen(tmp_path: Path) -> None:
    manifest = inspect(folder(tmp_path, 12, 2)).manifest.with_splits(np.zeros(4))
    theirs = Pixels(32, 1.0, "bilinear", "gray", "apply", (0.5,), (0.2,))
    notes = Notes(build_config({}))
    assert _bits(notes, manifest, Start("file", pixels=theirs)) == 16
    assert notes.rows == [("pixels.bits", "16", "of the starting weights")]
    (told,) = notes.told
    assert "use 12 bits and are read as 16" in told and "--set pixels.bits=12" in told
