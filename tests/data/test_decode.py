"""The pixel policy: what every kind of picture becomes, and what is refused and how it is said."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from imgcls_fast.core.errors import DataError
from imgcls_fast.data import reach
from imgcls_fast.data.decode import (
    Undecodable,
    decode_pixels,
    full_decode,
    scale_to_8,
    sniff,
    turn,
)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


@pytest.fixture
def picture() -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF"])
def test_lossless_rgb_comes_back_exactly(picture, kind):
    pixels = decode_pixels(encoded(picture, kind))
    np.testing.assert_array_equal(pixels, np.asarray(picture))
    assert pixels.flags.c_contiguous and pixels.flags.writeable and pixels.dtype == np.uint8


def test_sources_of_every_kind_agree(picture, tmp_path):
    content = encoded(picture, "PNG")
    (tmp_path / "x.jpg").write_bytes(content)  # PNG data under another name: content decides
    for source in (content, tmp_path / "x.jpg", str(tmp_path / "x.jpg"), picture, np.asarray(picture)):
        np.testing.assert_array_equal(decode_pixels(source), np.asarray(picture))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_orientation_is_applied_or_ignored_as_asked(picture, kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    content = encoded(picture, kind, exif=exif, **options)
    stored = decode_pixels(encoded(picture, kind, **options))
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB"))
    np.testing.assert_array_equal(decode_pixels(content, exif="apply"), upright)
    np.testing.assert_array_equal(decode_pixels(content, exif="ignore"), stored)
    np.testing.assert_array_equal(turn(stored, orientation), upright)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16"])
@pytest.mark.parametrize(("color", "channels"), [("gray", 1), ("rgb", 3), ("rgba", 4)])
def test_every_mode_becomes_every_colour(picture, mode, color, channels):
    image = Image.fromarray(np.full((5, 7), 300, np.uint16)) if mode == "I;16" else picture.convert(mode)
    kind = "TIFF" if mode in ("CMYK", "YCbCr") else "PNG"
    pixels = decode_pixels(encoded(image, kind), color=color)
    assert pixels.shape == (5, 7, channels) and pixels.dtype == np.uint8
    if mode not in ("I;16", "P", "1", "CMYK", "YCbCr", "LA"):
        np.testing.assert_array_equal(decode_pixels(encoded(image, kind)), np.asarray(image.convert("RGB")))


def test_sixteen_bit_gray_is_scaled_and_not_clipped():
    values = np.array([[0, 128, 129, 256, 257, 30000, 65534, 65535]], np.uint16)
    expected = np.round(values / 257).astype(np.uint8)
    for source in (encoded(Image.fromarray(values), "PNG"), encoded(Image.fromarray(values), "TIFF"), values):
        np.testing.assert_array_equal(decode_pixels(source, color="gray")[:, :, 0], expected)
        np.testing.assert_array_equal(decode_pixels(source, color="rgb")[:, :, 1], expected)


def test_scaling_is_the_rounded_quotient_for_every_value():
    every = np.arange(65536)
    np.testing.assert_array_equal(scale_to_8(every), np.round(every / 257))


def test_alpha_is_dropped_without_blending_and_kept_when_asked(picture):
    rgba = np.dstack([np.asarray(picture), np.arange(35, dtype=np.uint8).reshape(5, 7)])
    content = encoded(Image.fromarray(rgba), "PNG")
    np.testing.assert_array_equal(decode_pixels(content), rgba[:, :, :3])
    np.testing.assert_array_equal(decode_pixels(content, color="rgba"), rgba)
    assert (decode_pixels(encoded(picture, "PNG"), color="rgba")[:, :, 3] == 255).all()


def test_a_transparent_palette_colour_gives_alpha():
    image = Image.fromarray(np.array([[0, 1]], np.uint8))
    image = image.convert("P")
    image.putpalette([10, 20, 30, 40, 50, 60])
    content = encoded(image, "PNG", transparency=1)
    np.testing.assert_array_equal(decode_pixels(content, color="rgba"), [[[10, 20, 30, 255], [40, 50, 60, 0]]])
    np.testing.assert_array_equal(decode_pixels(content), [[[10, 20, 30], [40, 50, 60]]])


def test_gray_is_the_luma_of_rgb(picture):
    np.testing.assert_array_equal(decode_pixels(picture, color="gray")[:, :, 0], np.asarray(picture.convert("L")))


def test_the_first_frame_stands_for_an_animation():
    frames = [Image.new("RGB", (4, 4), c) for c in ("red", "blue")]
    content = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(decode_pixels(content)[0, 0], [255, 0, 0])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty file"),
        (b"<!DOCTYPE html><html>404</html>", "HTML, not an image"),
        (b"just some words", "text, not an image"),
        (b"\0" * 500, "only zero bytes"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "format SVG is not supported: convert to PNG or JPEG"),
        (b"8BPS\0\x01", "format Photoshop (PSD) is not supported"),
        (b"\0\0\0\x1cftypavif", "format AVIF is not supported"),
        (b"\x89PNG\r\n\x1a\n", "damaged header"),
        (b"\x91\x92\x93\x94\0\x01", "not an image of a known format"),
    ],
)
def test_what_is_not_an_image_is_refused_in_plain_words(content, reason):
    with pytest.raises(Undecodable) as caught:
        decode_pixels(content)
    assert reason in caught.value.reason


def test_a_cut_jpeg_is_refused_and_the_numbers_are_told(picture):
    content = encoded(picture.resize((200, 200)), "JPEG")
    for share in (0.5, 0.9):
        cut = content[: int(len(content) * share)]
        with pytest.raises(Undecodable, match=rf"truncated: [\d,]+ of {len(cut):,} bytes decoded"):
            decode_pixels(cut)


def test_a_png_with_broken_data_is_not_passed_on_half_decoded(picture):
    """Pillow's getexif() loads a PNG, and a fault there used to leave an image that looked loaded."""
    content = bytearray(encoded(picture.resize((64, 64)), "PNG"))
    at = content.index(b"IDAT") + 4
    content[at + 2000 : at + 2100] = bytes(100)
    with pytest.raises(Undecodable):
        decode_pixels(bytes(content))


def test_a_cut_png_is_refused(picture):
    content = encoded(picture.resize((200, 200)), "PNG")
    with pytest.raises(Undecodable, match=r"truncated|damaged"):
        decode_pixels(content[: len(content) // 2])


def test_float_pixels_are_refused():
    content = encoded(Image.fromarray(np.zeros((2, 2), np.float32)), "TIFF")
    with pytest.raises(Undecodable, match="32-bit float"):
        decode_pixels(content)
    with pytest.raises(Undecodable, match="uint8"):
        decode_pixels(np.zeros((2, 2, 3), np.float32))


@pytest.mark.parametrize("shape", [(2, 2, 2), (2,), (0, 3), (1, 2, 2, 3)], ids=str)
def test_arrays_of_other_shapes_are_refused(shape):
    with pytest.raises(Undecodable, match="array"):
        decode_pixels(np.zeros(shape, np.uint8))


def test_a_large_image_is_refused_before_it_is_decoded(picture):
    content = encoded(picture, "PNG")
    with pytest.raises(Undecodable, match=r"too large: 7 x 5 = 0\.0 megapixels"):
        decode_pixels(content, max_megapixels=34e-6)
    assert decode_pixels(content, max_megapixels=35e-6).shape == (5, 7, 3)


def test_a_missing_file_is_out_of_reach_and_a_folder_is_a_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(reach, "WAITS_S", ())
    with pytest.raises(DataError) as caught:
        full_decode(tmp_path / "none.jpg")
    assert caught.value.code == "D015" and "none.jpg cannot be reached: No such file" in caught.value.message
    with pytest.raises(Undecodable, match="cannot be opened: Is a directory"):
        full_decode(tmp_path)


def test_full_decode_gives_the_size_as_stored(picture):
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind in ("JPEG", "PNG"):
        path_content = encoded(picture, kind, exif=exif)
        assert full_decode_of(path_content) == (7, 5, 6)


def full_decode_of(content: bytes) -> tuple[int, int, int]:
    import tempfile

    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        return full_decode(file.name)


def test_undecodable_survives_a_process_border():
    import copy

    fault = copy.copy(Undecodable("a.jpg", "empty file"))
    assert (fault.path, fault.reason, str(fault)) == ("a.jpg", "empty file", "a.jpg: empty file")


def test_odd_images_decode_as_pillow_does_or_are_refused(shared_data):
    """Whatever the files are like: a result that agrees with Pillow, or Undecodable; never another exception."""
    from PIL import Image as Pillow

    folder = shared_data / "odd_images"
    with open(folder / "MANIFEST.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    readable = {"JPEG", "MPO", "PNG", "WEBP", "BMP", "TIFF", "GIF"}
    for row in rows:
        path = folder / row["path"]
        try:
            pixels = decode_pixels(path, exif="ignore")
        except Undecodable as fault:
            assert fault.reason
            fine = row["expect"] == "decode" and row["format"] in readable and row["mode"] not in ("F", "LAB")
            fine &= row["label"] != "truncated"  # Pillow refuses these at load, and forgets that when asked again
            assert not fine, f"{row['path']} should decode: {fault.reason}"
            continue
        assert row["expect"] != "refuse" and row["label"] != "not-an-image", row["path"]
        if row["format"] != "TIFF" and not row["mode"].startswith("I"):
            with Pillow.open(path) as image:
                np.testing.assert_array_equal(pixels, np.asarray(image.convert("RGB")), err_msg=row["path"])


def test_every_variant_of_a_photo_stands_upright(shared_data):
    """exif2..exif8 in `photos` hold turned pixels and the tag that turns them back: the long way round must agree."""
    folder = shared_data / "photos"
    with open(folder / "MANIFEST.csv", newline="", encoding="utf-8") as file:
        rows = [r for r in csv.DictReader(file) if r["variant"]]
    assert {f"exif{i}" for i in range(2, 9)} <= {r["variant"] for r in rows}
    for row in rows:
        path = folder / row["path"]
        pixels = decode_pixels(path)
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image).convert("RGB")
        np.testing.assert_array_equal(pixels, np.asarray(upright), err_msg=row["path"])


def test_sniffing_never_fails_on_any_prefix(shared_data):
    for path in sorted(Path(shared_data / "odd_images" / "files").rglob("*"))[:100]:
        if path.is_file():
            head = path.read_bytes()[:1024]
            for n in (0, 1, 2, 3, 5, 11, 64):
                assert isinstance(sniff(head[:n]), str)
