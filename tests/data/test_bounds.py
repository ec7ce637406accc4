"""One image makes bounded work: small files that would cost minutes or gigabytes are refused, by everyone alike."""

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
from PIL import Image

from imgcls_fast import _C
from imgcls_fast.core import image_bounds as bounds
from imgcls_fast.data.decode import READABLE, Undecodable, decode_pixels, largest_file
from imgcls_fast.data.findings import ScanOptions
from imgcls_fast.data.proof import prove
from imgcls_fast.data.scan import scan
from imgcls_fast.loading.loader import dali_missing

PICTURE = Image.fromarray(np.random.default_rng(3).integers(0, 256, (16, 24, 3), dtype=np.uint8))


def encoded(kind: str, image: Image.Image = PICTURE, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def behind_head(jpeg: bytes, extra: bytes) -> bytes:
    return jpeg[:2] + extra + jpeg[2:]


def behind_ihdr(png: bytes, extra: bytes) -> bytes:
    return png[:33] + extra + png[33:]


def before_frame(gif: bytes, extra: bytes) -> bytes:
    at = 13 + (3 << ((gif[10] & 7) + 1))
    return gif[:at] + extra + gif[at:]


def scans(count: int) -> bytes:
    whole = encoded("JPEG", progressive=True)
    last = whole[whole.rfind(b"\xff\xda") : -2]
    return whole[:-2] + last * (count - prove(whole).scans) + b"\xff\xd9"


def planes(count: int) -> bytes:
    """A sequential JPEG whose second plane is coded again and again."""
    whole = bytearray(encoded("JPEG", subsampling=0))
    at = whole.index(b"\xff\xda")
    head, data = bytes(whole[:at]), bytes(whole[at + 14 : -2])
    one = [b"\xff\xda\0\x08\1" + bytes([k, 0x11 if k > 1 else 0]) + b"\0\x3f\0" + data[:40] for k in (1, 2, 3)]
    return head + b"".join(one) + one[1] * (count - 3) + b"\xff\xd9"


def tiff_with(tags: dict[int, int]) -> bytes:
    """A TIFF whose directory has these LONG tags, in the place of its own."""
    whole = encoded("TIFF")
    (at,) = struct.unpack_from("<I", whole, 4)
    (count,) = struct.unpack_from("<H", whole, at)
    own = [whole[at + 2 + 12 * k : at + 14 + 12 * k] for k in range(count)]
    kept = [entry for entry in own if struct.unpack_from("<H", entry)[0] not in tags]
    entries = sorted(kept + [struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items()])
    directory = struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)
    return whole[:4] + struct.pack("<I", len(whole)) + whole[8:] + directory


def webp_canvas(side: int) -> bytes:
    whole = encoded("WEBP", exif=b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0")
    edge = (side - 1).to_bytes(3, "little")
    return whole[:24] + edge + edge + whole[30:]


BOMBS: dict[str, tuple[Callable[[], bytes], str]] = {
    "scans of a JPEG": (lambda: scans(1200), "101 scans, the limit is 100"),
    "planes of a sequential JPEG": (lambda: planes(1200), "101 scans, the limit is 100"),
    "segments of a JPEG": (lambda: behind_head(encoded("JPEG"), b"\xff\xe3\0\2" * 5000), "segments before the picture"),
    "EXIF over segments": (
        lambda: behind_head(encoded("JPEG"), (b"\xff\xe1\xff\xffExif\0\0" + bytes(65527)) * 300),
        "16,777,216 bytes before the picture",
    ),
    "junk in a JPEG": (
        lambda: behind_head(encoded("JPEG"), b"\xff\xe3\0\2" + bytes(2 << 20)),
        "bytes before the picture",
    ),
    "chunks of a PNG": (lambda: behind_ihdr(encoded("PNG"), chunk(b"abCd", b"") * 6000), "chunks in"),
    "empty pixels of a PNG": (lambda: behind_ihdr(encoded("PNG"), chunk(b"IDAT", b"") * 6000), "chunks in"),
    "a text of a PNG": (
        lambda: behind_ihdr(encoded("PNG"), chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(30 << 20)))),
        "too large for PngImagePlugin.MAX_TEXT_CHUNK",
    ),
    "texts of a PNG": (
        lambda: behind_ihdr(encoded("PNG"), chunk(b"iTXt", b"k\0\1\0\0\0" + zlib.compress(bytes(1 << 20))) * 70),
        "Too much memory used in text chunks",
    ),
    "the profile of a PNG": (
        lambda: behind_ihdr(encoded("PNG"), chunk(b"iCCP", b"k\0\0" + zlib.compress(bytes(30 << 20)))),
        "too large for PngImagePlugin.MAX_TEXT_CHUNK",
    ),
    "pixels of a PNG": (lambda: encoded("PNG", Image.new("1", (20000, 20000))), "too large: 400 megapixels"),
    "comments of a GIF": (
        lambda: before_frame(encoded("GIF"), (b"\x21\xfe\xff" + bytes(255) + b"\0") * 5000),
        "1,048,576 bytes before the first frame",
    ),
    "the screen of a GIF": (
        lambda: encoded("GIF")[:6] + struct.pack("<HH", 65535, 65535) + encoded("GIF")[10:],
        "too large: 4,295 megapixels",
    ),
    "the canvas of a WebP": (lambda: webp_canvas(16384), "too large: 16,384 x 16,384"),
    "a tile of a TIFF": (lambda: tiff_with({322: 60000, 323: 60000}), "tiles of 3,600.0 megapixels"),
    "tags of a TIFF": (lambda: tiff_with(dict.fromkeys(range(30000, 36000), 1)), "tags in a directory"),
    "pixels of a TIFF": (lambda: tiff_with({256: 1 << 30, 257: 1 << 30}), "too large: "),
    "pixels of a BMP": (
        lambda: encoded("BMP")[:18] + struct.pack("<ii", 40000, 40000) + encoded("BMP")[26:],
        "too large: 1,600 megapixels",
    ),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_small_file_that_makes_endless_work_is_refused(name):
    make, reason = BOMBS[name]
    with pytest.raises(Undecodable) as caught:
        decode_pixels(make())
    assert reason in caught.value.reason


def test_the_scan_and_both_loaders_refuse_them_alike(kit, tmp_path, photo):
    """The scan and a loader that gets them later, because the files were exchanged."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    names = [f"{'ab'[k % 2]}/{k:02}.jpg" for k in range(len(BOMBS) + 4)]
    for k, name in enumerate(names):
        photo(k).save(tmp_path / name)
    manifest = kit.manifest(tmp_path, names)
    for k, (make, _) in enumerate(BOMBS.values()):
        (tmp_path / names[k]).write_bytes(make())
    found = {bad.path: bad.reason for bad in scan(tmp_path, ScanOptions(max_bad=100)).quarantine}
    assert sorted(found) == sorted(names[: len(BOMBS)])
    for backend in ["torch", *([] if dali_missing() else ["dali-cpu"])]:
        loader = kit.open(kit.sampler(manifest, 7), backend, 0)  # the predictor decodes as torch does
        batches = kit.epochs(loader, 0)
        loader.close()
        assert sorted(loader.bad) == list(range(len(BOMBS)))
        assert sum(batch.weight.sum() for batch in batches) == 4
    for k, (name, (_, reason)) in enumerate(BOMBS.items()):
        assert reason in loader.bad[k], name
        assert found[names[k]] == loader.bad[k] or "too large" in found[names[k]], name


def test_what_is_within_the_bounds_passes():
    assert prove(scans(99)).scans == 99 and decode_pixels(scans(99)).shape == (16, 24, 3)
    for kind in READABLE:
        assert bounds.excess(kind, encoded(kind), 50.0) is None
    many = behind_head(encoded("JPEG"), b"\xff\xe3\0\2" * 4000)
    assert decode_pixels(many).shape == (16, 24, 3)
    # markers that are none: a film behind the picture, as telephones append it
    film = encoded("JPEG") + bytes(range(256)) * 40 + b"\xff\xda" * 500
    assert decode_pixels(film).shape == (16, 24, 3)


@pytest.mark.parametrize("kind", READABLE)
def test_no_content_makes_the_bounds_themselves_fail(kind):
    whole, rng = encoded(kind), np.random.default_rng(7)
    for kept in range(len(whole)):
        bounds.excess(kind, whole[:kept], 50.0)
    for _ in range(300):
        content = bytearray(whole)
        for at in rng.integers(0, len(whole), 6):
            content[at] = rng.choice([0, 1, 255, int(rng.integers(256))])
        bounds.excess(kind, bytes(content), 50.0)
    bounds.excess("TIFF", b"II+\0\x08\0\0\0" + b"\xff" * 12, 50.0)


def test_a_file_far_larger_than_its_pixels_may_be_is_not_read(tmp_path: Path):
    path = tmp_path / "x.jpg"
    path.write_bytes(encoded("JPEG"))
    os.truncate(path, largest_file(50.0) + 1)  # sparse: it costs no disk
    with pytest.raises(Undecodable, match=r"too large: 668,435,457 bytes, the limit is 668,435,456"):
        decode_pixels(path)


# ---------------------------------------------------------------- the probe


def orientation_of(path: Path) -> int:
    return int(_C.probe([os.fsencode(path)], 1)["orientation"][0])


XMP = b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(b'<x tiff:Orientation="6"/>')
BIG = b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(bytes(1 << 20))
# 10 bits an empty block: more of them in a kilobyte than any encoder writes in a file
EMPTY_BLOCKS = b"XML:com.adobe.xmp\0\1\0\0\0" + b"\x78\x9c" + b"\x02\x08\x20\x80\x00" * 20000


@pytest.mark.parametrize(("bomb", "survived", "beyond"), [(BIG, 3, 5), (EMPTY_BLOCKS, 0, 1)], ids=["bytes", "blocks"])
def test_the_probe_expands_so_much_of_a_file_and_no_more(tmp_path: Path, bomb: bytes, survived: int, beyond: int):
    path = tmp_path / "x.png"
    path.write_bytes(behind_ihdr(encoded("PNG"), chunk(b"iTXt", bomb) * survived + chunk(b"iTXt", XMP)))
    assert orientation_of(path) == 6
    path.write_bytes(behind_ihdr(encoded("PNG"), chunk(b"iTXt", bomb) * beyond + chunk(b"iTXt", XMP)))
    assert orientation_of(path) == 1


def test_the_probe_looks_at_so_many_texts_and_no_more(tmp_path: Path):
    path = tmp_path / "x.png"
    for count, orientation in ((4000, 6), (5000, 1)):
        path.write_bytes(behind_ihdr(encoded("PNG"), chunk(b"tEXt", b"k\0v") * count + chunk(b"iTXt", XMP)))
        assert orientation_of(path) == orientation
