"""Thumbnails: every sound file gets an upright picture, and nothing that lies in a folder can stop the report."""

from __future__ import annotations

import base64
import csv
import io
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from imgcls_fast.data.store import reader
from imgcls_fast.evaluation import thumbnails
from imgcls_fast.evaluation.thumbnails import FORMATS, MAX_BYTES, SIDE

MODES = {"JPEG": ("L", "RGB", "CMYK"), "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"), "WEBP": ("RGB", "RGBA")}
MODES |= {"BMP": ("1", "L", "P", "RGB"), "TIFF": ("1", "L", "RGB", "RGBA", "CMYK", "I;16", "F"), "GIF": ("L", "P")}


def thumbnail(path: Path, *, partial: bool = False) -> str | None:
    """The picture of a file that a report looks at as it looks at all of them."""
    return thumbnails.thumbnail(reader(path.parent, MAX_BYTES)(path.name), partial=partial)


def gradient(width: int, height: int) -> Image.Image:
    """Black on the left, white on the right."""
    return Image.fromarray(np.tile(np.linspace(0, 255, width, dtype=np.uint8), (height, 1)))


def in_mode(image: Image.Image, mode: str) -> Image.Image:
    if mode == "I;16":
        return Image.fromarray(np.asarray(image).astype(np.uint16) * 257)
    return image.convert("RGB").convert(mode) if mode in ("CMYK", "P") else image.convert(mode)


def shown(address: str | None) -> np.ndarray:
    """(H, W, 3) uint8 pixels of a thumbnail."""
    assert address is not None
    head, _, body = address.partition(",")
    assert head == "data:image/jpeg;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(body))))


@pytest.mark.parametrize("kind, mode", [(kind, mode) for kind in MODES for mode in MODES[kind]])
def test_sound_files_of_every_format_and_mode_are_shown(tmp_path, kind, mode):
    path = tmp_path / "image"
    in_mode(gradient(400, 200), mode).save(path, kind)
    pixels = shown(thumbnail(path)).astype(int)
    assert pixels.shape == (SIDE // 2, SIDE, 3)
    assert pixels[:, :20].mean() < 60 and pixels[:, -20:].mean() > 195


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_exif_orientation_is_obeyed(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    gradient(200, 120).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    with Image.open(tmp_path / "turned.jpg") as image:
        upright = np.asarray(ImageOps.exif_transpose(image).resize((16, 16))).astype(int)
    ours = shown(thumbnail(tmp_path / "turned.jpg"))
    assert ours.shape[:2] == ((96, 160) if orientation < 5 else (160, 96))
    assert np.abs(np.asarray(Image.fromarray(ours).convert("L").resize((16, 16))).astype(int) - upright).max() < 16


def test_damaged_exif_does_not_hide_sound_pixels(tmp_path):
    gradient(40, 20).save(tmp_path / "a.jpg", exif=b"Exif\0\0\xff\xff\xff\xff\0\0\0\x08")
    assert shown(thumbnail(tmp_path / "a.jpg")).shape == (20, 40, 3)


def test_transparent_pixels_are_shown_white(tmp_path):
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "a.png")
    assert shown(thumbnail(tmp_path / "a.png")).min() > 250


def test_of_a_truncated_jpeg_the_part_that_is_there_is_shown_when_asked(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (160, 160, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.jpg")
    whole = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(whole[: len(whole) // 2])
    assert thumbnail(tmp_path / "a.jpg") is None
    pixels = shown(thumbnail(tmp_path / "a.jpg", partial=True)).astype(float)
    assert pixels[:48].std() > 20 and pixels[-48:].std() < 3
    (tmp_path / "a.jpg").write_bytes(whole[: whole.index(b"\xff\xda") + 14])  # all but the pixels
    assert thumbnail(tmp_path / "a.jpg", partial=True) is None


@pytest.mark.parametrize(
    "content", [b"", b"<!doctype html>", b"\xff\xd8\xff", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"\0" * 999]
)
def test_what_is_no_image_has_no_picture(tmp_path, content):
    (tmp_path / "a.jpg").write_bytes(content)
    assert thumbnail(tmp_path / "a.jpg", partial=True) is None


def test_pipes_folders_missing_files_and_impossible_names_have_no_picture(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")  # opening it would wait for ever
    for path in (
        tmp_path / "pipe.jpg",
        tmp_path,
        tmp_path / "gone.jpg",
        tmp_path / "nul\0.jpg",
        tmp_path / ("x" * 999),
    ):
        assert thumbnail(path, partial=True) is None


def test_an_image_of_absurd_size_is_not_decoded(tmp_path):
    Image.new("1", (9, 9)).save(tmp_path / "a.bmp")
    head = bytearray((tmp_path / "a.bmp").read_bytes())
    for side in (9_000, 200_000):  # above our limit, and above Pillow's
        head[18:26] = struct.pack("<ii", side, side)
        (tmp_path / "a.bmp").write_bytes(head)
        assert thumbnail(tmp_path / "a.bmp", partial=True) is None


def test_no_odd_file_stops_the_report_and_those_that_pillow_decodes_are_shown(shared_data: Path):
    folder, missing = shared_data / "odd_images", []
    with open(folder / "MANIFEST.csv", encoding="utf-8", newline="") as file:
        for line in csv.DictReader(file):
            picture = thumbnail(folder / line["path"], partial=line["expect"] != "decode")
            if picture is None and line["expect"] == "decode" and line["format"] in FORMATS:
                missing.append(Path(line["path"]).name)
    # these two are decoded only by a Pillow that was told to forgive truncated PNG files
    assert set(missing) <= {"broken_data_stream.png", "truncated_end_chunk.png"}


def test_what_makes_endless_work_or_crashes_decoders_gets_no_picture(tmp_path):
    """The files that a report shows are those that were refused."""
    out = io.BytesIO()
    Image.new("RGB", (24, 16), "red").save(out, "JPEG", progressive=True)
    whole = out.getvalue()
    scans = whole[:-2] + whole[whole.rfind(b"\xff\xda") : -2] * 500 + b"\xff\xd9"
    out = io.BytesIO()
    Image.new("RGB", (24, 16), "red").save(out, "WEBP")
    webp = bytearray(out.getvalue())
    webp[16:20] = b"\xf0\xff\xff\x7f"
    for k, content in enumerate((scans, bytes(webp))):
        (tmp_path / str(k)).write_bytes(content)
        assert thumbnail(tmp_path / str(k), partial=True) is None
