"""What DALI may see: only JPEG and PNG that were proven well-formed on the very bytes; everything else is Pillow's."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from imgcls_fast.data.proof import JPEG, PNG, png_is_sound, prove
from imgcls_fast.data.quarantine import examine
from imgcls_fast.data.scan import scan
from imgcls_fast.loading.loader import dali_missing

needs_dali = pytest.mark.skipif(dali_missing() is not None, reason=str(dali_missing()))
N, BATCH = 64, 32  # from 32 on, one WebP ended the process


def picture(mode: str = "RGB", size: tuple[int, int] = (37, 29), seed: int = 1) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    return Image.fromarray(noise, "RGBA").convert("RGB").convert(mode)


def encoded(kind: str, mode: str = "RGB", size: tuple[int, int] = (37, 29), **options: Any) -> bytes:
    out = io.BytesIO()
    picture(mode, size).save(out, kind, **options)
    return out.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(pixels: bytes, *before: bytes, head: bytes = struct.pack(">IIBBBBB", 5, 3, 8, 0, 0, 0, 0)) -> bytes:
    """A PNG of 5 x 3 gray pixels with any stream."""
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + b"".join(before) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
def test_what_encoders_write_as_jpeg_is_sound(mode, progressive, subsampling):
    options: dict[str, Any] = {"subsampling": subsampling, "progressive": progressive, "optimize": progressive}
    found = prove(encoded("JPEG", mode, restart_marker_blocks=0 if progressive else 2, **options))
    assert (found.kind, found.sound, found.whole, found.width, found.height) == (JPEG, True, True, 37, 29)
    assert found.scans == 1 if not progressive else found.scans > 1


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_what_encoders_write_as_png_is_sound(mode):
    image = picture("L").point(lambda v: v * 257, "I").convert("I;16") if mode == "I;16" else picture("RGB")
    out = io.BytesIO()
    text = PngImagePlugin.PngInfo()
    text.add_text("Software", "any")
    text.add_itxt("XML:com.adobe.xmp", "<x/>" * 100, zip=True)
    image = image if mode == "I;16" else image.convert(mode)
    image.save(out, "PNG", pnginfo=text, icc_profile=bytes(3000))
    found = prove(out.getvalue())
    assert (found.kind, found.sound, found.width, found.height) == (PNG, True, 37, 29)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_no_file_that_lost_a_piece_is_sound(kind):
    whole = encoded(kind)
    assert prove(whole).sound
    for kept in range(len(whole)):
        found = prove(whole[:kept])
        assert not (found.sound and found.whole), kept


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_what_is_sound_pillow_decodes_however_it_was_changed(tmp_path, kind):
    """The other way round is not promised: an unsound file may be a good picture."""
    rng, path, sound = np.random.default_rng(5), tmp_path / "x", 0
    originals = [encoded(kind), encoded(kind, "L"), encoded(kind, size=(16, 16), **_progressive(kind))]
    for k in range(600):
        content = bytearray(originals[k % len(originals)])
        for _ in range(int(rng.integers(1, 4))):
            at = int(rng.integers(2, min(len(content), 700 if k % 2 else len(content))))
            content[at] = int(rng.integers(256))
        if prove(bytes(content)).sound:
            sound += 1
            path.write_bytes(content)
            assert examine(path).ok, f"{k}: {examine(path).reason}"
    assert sound > (20 if kind == "JPEG" else 0)


def _progressive(kind: str) -> dict[str, Any]:
    return {"progressive": True} if kind == "JPEG" else {}


ROWS = zlib.compress(bytes(18))
PNG_CASES = {
    "whole": (png(ROWS), True),
    "a byte too few": (png(zlib.compress(bytes(17))), False),
    "a byte too many": (png(zlib.compress(bytes(19))), False),
    "an unknown filter": (png(zlib.compress(b"\x05" + bytes(17))), False),
    "a filter of the last row": (png(zlib.compress(bytes(12) + b"\x09" + bytes(5))), False),
    "no end of the stream": (png(ROWS[:-4]), False),
    "a wrong sum": (png(ROWS[:-1] + b"\0"), False),
    "no stream": (png(b""), False),
    "noise": (png(b"noise"), False),
    "an unknown critical chunk": (png(ROWS, chunk(b"ABCD", b"")), False),
    "an unknown ancillary chunk": (png(ROWS, chunk(b"abCd", b"x")), True),
    "two headers": (png(ROWS, chunk(b"IHDR", bytes(13))), False),
    "a palette without entries": (png(ROWS, chunk(b"PLTE", b"")), False),
    "a transparent colour of a wrong size": (png(ROWS, chunk(b"tRNS", b"xyz")), False),
    "depth 3": (png(ROWS, head=struct.pack(">IIBBBBB", 5, 3, 3, 0, 0, 0, 0)), False),
    "colours without palette": (png(ROWS, head=struct.pack(">IIBBBBB", 5, 3, 8, 3, 0, 0, 0)), False),
    "a bomb of text": (png(ROWS, chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(2 << 20)))), False),
    "bombs of text": (png(ROWS, *[chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(300_000)))] * 4), False),
    "text": (png(ROWS, chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(3000)))), True),
    "pixels in two places": (png(ROWS[:9], chunk(b"IDAT", ROWS[:4]), chunk(b"tEXt", b"k\0v")), False),
}


@pytest.mark.parametrize("case", PNG_CASES)
def test_a_png_is_sound_only_when_every_decoder_goes_through_it(case):
    content, sound = PNG_CASES[case]
    assert png_is_sound(content) is sound
    out = io.BytesIO()
    Image.new("L", (5, 3)).save(out, "PNG")
    assert png_is_sound(out.getvalue())


# ---------------------------------------------------------------- the loader


@pytest.fixture
def photos(tmp_path, photo) -> Path:
    for k in range(N):
        photo(k).save(tmp_path / f"{k:02}.{'png' if k % 8 == 7 else 'jpg'}")
    return tmp_path


def other_format(kind: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        with Image.open(path) as image:
            image.convert("P" if kind == "GIF" else "RGB").save(path, kind)

    return change


def damaged_webp(path: Path) -> None:
    """A container whose chunk promises more than there is: what libwebp's caller in DALI walked beyond."""
    with Image.open(path) as image:
        image.save(path, "WEBP")
    whole = bytearray(path.read_bytes())
    whole[16:20] = struct.pack("<I", 0x7FFFFFF0)
    path.write_bytes(whole)


def known_webp(path: Path) -> None:
    shared = Path(os.environ.get("IMGCLS_SHARED_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")
    found = shared.parent / "cases" / "C01-webp-kills-dali" / "passes_the_scan.webp"
    if not found.exists():
        pytest.skip("the WebP of case C01 is not here")
    path.write_bytes(found.read_bytes())


CHANGES: dict[str, Callable[[Path], Any]] = {
    "emptied": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "HTML": lambda path: path.write_text("<html><body>404</body></html>"),
    "PNG": other_format("PNG"),
    "WebP": other_format("WEBP"),
    "GIF": other_format("GIF"),
    "BMP": other_format("BMP"),
    "TIFF": other_format("TIFF"),
    "a damaged WebP": damaged_webp,
    "the WebP of case C01": known_webp,
}


@needs_dali
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("change", CHANGES)
def test_files_exchanged_after_the_scan_neither_end_the_process_nor_reach_dali_unproven(
    kit, photos, monkeypatch, training, change
):
    manifest = kit.manifest(photos, sorted(path.name for path in photos.iterdir()))
    sampler = kit.sampler(manifest, BATCH, kit.strong if training else None)
    for row in (3, 7, 20, 40, 55):
        CHANGES[change](manifest.path(row))
    loader = kit.open(sampler, "dali-cpu", 2)
    seen: list[bytes] = []
    real = loader._graph.arguments

    def watched(request: Any, files: dict[int, bytes]) -> Any:
        seen.extend(files.values())
        return real(request, files)

    monkeypatch.setattr(loader._graph, "arguments", watched)
    batches = kit.epochs(loader, 0, 1)
    loader.close()
    assert seen and all(prove(content).sound for content in seen)
    theirs = kit.open(sampler, "torch", 0)
    expected = kit.epochs(theirs, 0, 1)
    assert loader.bad == theirs.bad
    for ours, other in zip(batches, expected, strict=True):
        np.testing.assert_array_equal(ours.rows, other.rows)


@needs_dali
def test_a_png_is_inflated_for_proof_by_the_scan_and_not_again_while_its_bytes_are_the_same(
    kit, tmp_path, photo, monkeypatch
):
    for k in range(8):
        (tmp_path / "ab"[k % 2]).mkdir(exist_ok=True)
        photo(k).save(tmp_path / "ab"[k % 2] / f"{k}.png")
    manifest = scan(tmp_path).manifest
    proven: list[bytes] = []
    monkeypatch.setattr("imgcls_fast.loading.reading.prove", lambda content: proven.append(content) or prove(content))
    sampler = kit.sampler(manifest, 4)
    clean = kit.run(sampler, "dali-cpu", 1)
    assert not proven
    photo(50).save(manifest.path(3))
    batches = kit.run(sampler, "dali-cpu", 1)
    assert proven and set(proven) == {manifest.path(3).read_bytes()}
    assert not np.array_equal(batches[0].pixels[3], clean[0].pixels[3])
    np.testing.assert_array_equal(batches[1].pixels, clean[1].pixels)


@needs_dali
def test_what_dali_refuses_although_it_was_proven_goes_to_pillow_and_the_rest_is_as_before(kit, photos, monkeypatch):
    manifest = kit.manifest(photos, sorted(path.name for path in photos.iterdir()))
    sampler = kit.sampler(manifest, 8, kit.plain)
    clean = kit.run(sampler, "dali-cpu", 2)
    loader = kit.open(sampler, "dali-cpu", 2)
    real = type(loader._reader).is_for_dali

    def careless(self: Any, row: int, content: bytes) -> bool:
        return row not in self.refused and (row == 5 or real(self, row, content))

    monkeypatch.setattr(type(loader._reader), "is_for_dali", careless)
    path = manifest.path(5)
    path.write_bytes(path.read_bytes()[:20] + b"junk" + path.read_bytes()[20:])
    batches = kit.epochs(loader, 0)
    loader.close()
    assert loader.bad == {}
    for ours, was in zip(batches, clean, strict=True):
        np.testing.assert_array_equal(ours.rows, was.rows)
        np.testing.assert_array_equal(ours.pixels[ours.rows != 5], was.pixels[was.rows != 5])
