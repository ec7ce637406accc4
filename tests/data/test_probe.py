"""The header probe tells what Pillow tells, without decoding."""

from __future__ import annotations

import io
import os
import struct
import tarfile
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from imgcls_fast import _C

FORMATS = {"JPEG": 1, "MPO": 1, "PNG": 2, "WEBP": 3, "BMP": 4, "TIFF": 5, "GIF": 6}
PALETTE, ALPHA, CMYK, ODD_BMP, INTERLACED = 2, 4, 8, 16, 32  # bits of the column "detail"


def probe_one(path: Path) -> dict[str, int]:
    rows = _C.probe([os.fsencode(path)], 1)
    assert all(column.shape == (1,) for column in rows.values())
    return {name: int(column[0]) for name, column in rows.items()}


def picture(mode: str = "RGB", size: tuple[int, int] = (37, 23)) -> Image.Image:
    ramp = np.arange(size[0] * size[1] * 4, dtype=np.uint32).reshape(size[1], size[0], 4)
    rgba = Image.fromarray((ramp % 251).astype(np.uint8), "RGBA")
    if mode == "I;16":
        return Image.fromarray((ramp[..., 0] % 65521).astype(np.uint16))
    return rgba.convert("RGB").convert(mode) if mode not in ("RGBA", "LA") else rgba.convert(mode)


def orientation_of(image: Image.Image) -> int:
    value = image.getexif().get(274, 1)
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def stored_size(image: Image.Image) -> tuple[int, int]:
    """Pillow turns the size of a TIFF (only) as its orientation says; the probe reports every file as stored."""
    turned = image.format == "TIFF" and orientation_of(image) >= 5
    return (image.size[1], image.size[0]) if turned else image.size


@pytest.fixture(scope="module")
def shared_files(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    unpacked = tmp_path_factory.mktemp("messy")
    with tarfile.open(shared_data / "photos_messy" / "messy.tar") as tar:
        tar.extractall(unpacked, filter="data")
    return [path for root in (shared_data, unpacked) for path in sorted(root.rglob("*")) if path.is_file()]


@pytest.fixture
def quiet_pillow(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # a bomb's header is asked for here, not its pixels
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def too_large_for_a_column(path: Path) -> bool:
    return path.name == "badwidth.bmp"  # Pillow reads the width -127 as 4294967169


@pytest.mark.slow
@pytest.mark.usefixtures("quiet_pillow")
def test_equals_pillow_on_every_shared_file_that_pillow_opens(shared_files: list[Path]) -> None:
    rows = _C.probe([os.fsencode(path) for path in shared_files], 2)
    seen = dict.fromkeys(FORMATS.values(), 0)
    wrong: list[str] = []
    for i, path in enumerate(shared_files):
        try:
            image = Image.open(path)
        except (OSError, SyntaxError, ValueError):
            continue
        with image:
            if image.format not in FORMATS or too_large_for_a_column(path):
                continue
            got = tuple(int(rows[name][i]) for name in ("status", "format", "width", "height"))
            seen[FORMATS[image.format]] += 1
            if got != (0, FORMATS[image.format], *stored_size(image)):
                wrong.append(f"{path}: {got}, Pillow {image.format} {image.size}")
            try:
                orientation = orientation_of(image)  # for a PNG this decodes, which may fail
            except (OSError, SyntaxError, ValueError):
                continue
            if rows["orientation"][i] != orientation:
                wrong.append(f"{path}: orientation {rows['orientation'][i]}, Pillow {orientation}")
    assert not wrong
    assert min(seen.values()) >= 10
    assert sum(seen.values()) >= 2000


@pytest.mark.usefixtures("quiet_pillow")
def test_a_file_marked_truncated_does_not_load_and_a_sound_one_is_not_marked(shared_data: Path) -> None:
    files = [p for p in sorted((shared_data / "odd_images" / "files").rglob("*")) if p.is_file()]
    rows = _C.probe([os.fsencode(path) for path in files], 2)
    marked = 0
    for i, path in enumerate(files):
        small = int(rows["width"][i]) * int(rows["height"][i]) <= 4_000_000  # some are bombs
        if rows["status"][i] == 0 and rows["truncated"][i] and small:
            marked += 1
            with pytest.raises((OSError, SyntaxError, ValueError, IndexError)), Image.open(path) as image:
                image.load()
    assert marked >= 10


SAVED = [  # name, Pillow mode, save arguments, channels, bits, detail
    ("rgb.jpg", "RGB", {}, 3, 8, 0),
    ("gray.jpg", "L", {}, 1, 8, 0),
    ("cmyk.jpg", "CMYK", {}, 4, 8, CMYK),
    ("progressive.jpg", "RGB", {"progressive": True}, 3, 8, INTERLACED),
    ("rgb.png", "RGB", {}, 3, 8, 0),
    ("rgba.png", "RGBA", {}, 4, 8, ALPHA),
    ("gray.png", "L", {}, 1, 8, 0),
    ("gray-alpha.png", "LA", {}, 2, 8, ALPHA),
    ("bits.png", "1", {}, 1, 1, 0),
    ("deep.png", "I;16", {}, 1, 16, 0),
    ("palette.png", "P", {"bits": 8}, 1, 8, PALETTE),
    ("transparent.png", "P", {"bits": 8, "transparency": 3}, 1, 8, PALETTE | ALPHA),
    ("lossy.webp", "RGB", {}, 3, 8, 0),
    ("lossless.webp", "RGB", {"lossless": True}, 3, 8, 0),
    ("alpha.webp", "RGBA", {}, 4, 8, ALPHA),
    ("alpha-lossless.webp", "RGBA", {"lossless": True}, 4, 8, ALPHA),
    ("rgb.bmp", "RGB", {}, 3, 8, 0),
    ("gray.bmp", "L", {}, 1, 8, PALETTE | ODD_BMP),
    ("bits.bmp", "1", {}, 1, 1, PALETTE | ODD_BMP),
    ("rgb.tif", "RGB", {}, 3, 8, 0),
    ("lzw.tif", "RGB", {"compression": "tiff_lzw"}, 3, 8, 0),
    ("rgba.tif", "RGBA", {}, 4, 8, ALPHA),
    ("cmyk.tif", "CMYK", {}, 4, 8, CMYK),
    ("deep.tif", "I;16", {}, 1, 16, 0),
    ("palette.tif", "P", {}, 1, 8, PALETTE),
    ("big.tif", "RGB", {"big_tiff": True}, 3, 8, 0),
    ("palette.gif", "P", {"interlace": 0}, 1, 8, PALETTE),
    ("interlaced.gif", "P", {"interlace": 1}, 1, 8, PALETTE | INTERLACED),
    ("transparent.gif", "P", {"transparency": 3, "interlace": 0}, 1, 8, PALETTE | ALPHA),
]


@pytest.mark.parametrize("size", [(1, 1), (37, 23), (640, 3)], ids=str)
@pytest.mark.parametrize(
    ("name", "mode", "options", "channels", "bits", "detail"), SAVED, ids=[row[0] for row in SAVED]
)
def test_tells_what_pillow_saved(
    tmp_path: Path,
    name: str,
    mode: str,
    options: dict[str, object],
    channels: int,
    bits: int,
    detail: int,
    size: tuple[int, int],
) -> None:
    path = tmp_path / name
    image = picture(mode, size)
    if "transparency" in options:
        image.putpixel((0, 0), 3)  # a colour that nothing uses is dropped
    image.save(path, **options)
    got = probe_one(path)
    if name == "interlaced.gif" and min(size) < 16:
        detail = PALETTE  # Pillow does not interlace small ones
    with Image.open(path) as image:
        assert got["format"] == FORMATS[image.format or ""]
    assert (got["status"], got["width"], got["height"]) == (0, *size)
    assert (got["orientation"], got["animated"], got["truncated"]) == (1, 0, 0)
    assert got["channels"] == channels
    assert got["size_bytes"] == path.stat().st_size
    assert got["detail"] & ~PALETTE == detail & ~PALETTE
    if "palette" not in name and name.split(".")[1] != "gif":  # Pillow shortens the table of small palette images
        assert (got["bit_depth"], got["detail"]) == (bits, detail)


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tif"])
def test_tells_the_exif_orientation_and_1_for_a_value_outside_1_to_8(
    tmp_path: Path, name: str, orientation: int
) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    exif[270] = "a description that does not fit into the entry itself"
    path = tmp_path / name
    picture().save(path, exif=exif.tobytes() if name != "a.tif" else exif)
    got = probe_one(path)
    assert got["orientation"] == (orientation if 1 <= orientation <= 8 else 1)
    assert (got["width"], got["height"]) == (37, 23)
    with Image.open(path) as image:
        assert orientation_of(image) == got["orientation"]


def tiff_block(endian: str, orientation: int, tag_type: int = 3) -> bytes:
    """A TIFF block with the orientation tag alone."""
    value = struct.pack(endian + ("H2x" if tag_type == 3 else "L"), orientation)
    head = (b"MM" if endian == ">" else b"II") + struct.pack(endian + "HL", 42, 8)
    return head + struct.pack(endian + "HHHL", 1, 274, tag_type, 1) + value + bytes(4)


@pytest.mark.parametrize("tag_type", [3, 4], ids=["short", "long"])
@pytest.mark.parametrize("endian", ["<", ">"], ids=["little", "big"])
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp"])
def test_reads_exif_of_both_byte_orders(tmp_path: Path, name: str, endian: str, tag_type: int) -> None:
    path = tmp_path / name
    picture().save(path, exif=b"Exif\0\0" + tiff_block(endian, 6, tag_type))
    assert probe_one(path)["orientation"] == 6


@pytest.mark.parametrize("endian", ["<", ">"], ids=["little", "big"])
@pytest.mark.parametrize("big", [False, True], ids=["classic", "BigTIFF"])
def test_reads_tiff_of_both_byte_orders_and_widths(tmp_path: Path, endian: str, big: bool) -> None:
    word = "Q" if big else "L"
    tags = [(256, 5), (257, 4), (258, 8), (259, 1), (262, 1), (273, 400), (274, 8), (277, 1), (278, 4), (279, 20)]
    mark = b"MM" if endian == ">" else b"II"
    head = mark + (struct.pack(endian + "HHHQ", 43, 8, 0, 16) if big else struct.pack(endian + "HL", 42, 8))
    body = struct.pack(endian + ("Q" if big else "H"), len(tags))
    for tag, value in tags:
        body += struct.pack(endian + "HH" + word, tag, 3, 1)
        body += struct.pack(endian + ("H6x" if big else "H2x"), value)
    path = tmp_path / "a.tif"
    path.write_bytes((head + body + bytes(8)).ljust(400, b"\0") + bytes(20))
    got = probe_one(path)
    assert (got["status"], got["width"], got["height"], got["orientation"]) == (0, 5, 4, 8)
    assert (got["bit_depth"], got["channels"], got["truncated"]) == (8, 1, 0)
    if not (big and endian == ">"):  # Pillow does not know this one
        with Image.open(path) as image:
            assert (stored_size(image), orientation_of(image)) == ((5, 4), 8)


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">L", len(body)) + name + body + struct.pack(">L", zlib.crc32(name + body))


def hex_profile(block: bytes) -> bytes:
    digits = block.hex()
    lines = "\n".join(digits[i : i + 72] for i in range(0, len(digits), 72))
    return f"\nexif\n{len(block):8}\n{lines}\n".encode()


XMP = b'<x:xmpmeta><rdf:Description tiff:Orientation="8"/></x:xmpmeta>'
PROFILE = hex_profile(b"Exif\0\0" + tiff_block(">", 5))
PNG_METADATA = {
    "eXIf": (chunk(b"eXIf", tiff_block("<", 3)), 3),
    "tEXt profile": (chunk(b"tEXt", b"Raw profile type exif\0" + PROFILE), 5),
    "zTXt profile": (chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(PROFILE, 9)), 5),
    "zTXt stored": (chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(PROFILE, 0)), 5),
    "zTXt long": (chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(PROFILE + b"\n" * 9000, 6)), 5),
    "iTXt XMP": (chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0en\0key\0" + XMP), 8),
    "compressed iTXt XMP": (chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(XMP)), 8),
    "eXIf before XMP": (chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP) + chunk(b"eXIf", tiff_block("<", 3)), 3),
    "broken zTXt": (chunk(b"zTXt", b"Raw profile type exif\0\0x\x9cbroken"), 1),
}


@pytest.mark.parametrize("place", ["before", "behind"])
@pytest.mark.parametrize(("extra", "orientation"), PNG_METADATA.values(), ids=list(PNG_METADATA))
def test_finds_a_png_orientation_before_and_behind_the_pixels(
    tmp_path: Path, extra: bytes, orientation: int, place: str
) -> None:
    buffer = io.BytesIO()
    picture(size=(300, 200)).save(buffer, "PNG")
    plain = buffer.getvalue()
    at = plain.index(b"IDAT" if place == "before" else b"IEND") - 4
    path = tmp_path / "a.png"
    path.write_bytes(plain[:at] + extra + plain[at:])
    assert probe_one(path)["orientation"] == orientation
    with Image.open(path) as image:
        if "broken" not in str(extra):
            assert orientation_of(image) == orientation


@pytest.mark.parametrize("form", [b'tiff:Orientation="6"', b"<tiff:Orientation>6</tiff:Orientation>"])
@pytest.mark.parametrize("name", ["a.jpg", "a.webp"])
def test_takes_the_orientation_from_xmp_when_exif_has_none(tmp_path: Path, name: str, form: bytes) -> None:
    path = tmp_path / name
    picture().save(path, xmp=b"<x:xmpmeta tiff:Orientation=6>" + form)
    assert probe_one(path)["orientation"] == 6
    exif = Image.Exif()
    exif[274] = 3
    picture().save(path, xmp=form, exif=exif.tobytes())
    assert probe_one(path)["orientation"] == 3


def test_steps_over_a_thumbnail_and_joins_exif_that_spans_segments(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    picture(size=(8, 8)).save(buffer, "JPEG")
    thumbnail = buffer.getvalue()  # has a frame and an end marker of its own
    buffer = io.BytesIO()
    picture().save(buffer, "JPEG")
    photo = buffer.getvalue()

    def app1(body: bytes) -> bytes:
        return b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body

    whole = tiff_block(">", 7)
    parts = app1(b"Exif\0\0" + whole[:13]) + app1(b"Exif\0\0" + whole[13:]) + app1(b"other" + thumbnail * 50)
    path = tmp_path / "a.jpg"
    path.write_bytes(photo[:2] + parts + photo[2:])
    got = probe_one(path)
    assert (got["width"], got["height"], got["orientation"], got["truncated"]) == (37, 23, 7, 0)
    with Image.open(path) as image:
        assert orientation_of(image) == 7
    path.write_bytes((photo[:2] + parts + photo[2:])[:-2])
    assert probe_one(path)["truncated"] == 1


@pytest.mark.parametrize("frames", [1, 2, 5])
@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png", "a.tif"])
def test_tells_animations_from_stills(tmp_path: Path, name: str, frames: int) -> None:
    path = tmp_path / name
    images = [picture(size=(40, 30)).rotate(17 * i) for i in range(frames)]
    images[0].save(path, save_all=True, append_images=images[1:])
    assert probe_one(path)["animated"] == (frames > 1)
    with Image.open(path) as image:
        assert image.is_animated == (frames > 1)


def test_a_still_in_front_of_an_apng_counts_as_a_frame(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    images = [picture(size=(40, 30)).rotate(17 * i) for i in range(2)]
    images[0].save(path, save_all=True, append_images=images[1:], default_image=True)
    with Image.open(path) as image:
        assert probe_one(path)["animated"] == image.is_animated


def test_a_png_text_that_only_looks_like_a_profile_is_ignored(tmp_path: Path) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("Raw profile", PROFILE.decode())
    picture().save(tmp_path / "a.png", pnginfo=info)
    assert probe_one(tmp_path / "a.png")["orientation"] == 1


@pytest.mark.parametrize("threads", [1, 2, 16])
@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 1000])
def test_rows_keep_the_order_of_the_paths_for_any_count_and_threads(tmp_path: Path, count: int, threads: int) -> None:
    files = [tmp_path / f"{i}.png" for i in range(40)]
    for i, path in enumerate(files[:count]):
        picture("L", (i + 1, 40 - i)).save(path)
    rows = _C.probe([os.fsencode(files[i % 40]) for i in range(count)], threads)
    assert rows["width"].tolist() == [i % 40 + 1 for i in range(count)]
    assert rows["height"].tolist() == [40 - i % 40 for i in range(count)]
    assert {name: str(column.dtype) for name, column in rows.items()} == {
        "format": "uint8",
        "status": "uint8",
        "width": "int32",
        "height": "int32",
        "channels": "uint8",
        "bit_depth": "uint8",
        "orientation": "uint8",
        "animated": "uint8",
        "truncated": "uint8",
        "detail": "uint8",
        "size_bytes": "int64",
    }


def test_refuses_a_senseless_call() -> None:
    with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
        _C.probe([], 0)
    with pytest.raises(TypeError):
        _C.probe(["text"], 1)  # type: ignore[list-item]


def test_build_info_is_complete_and_a_machine_without_a_gpu_says_why() -> None:
    info = _C.build_info()
    assert set(info) == {"version", "compiler", "cuda", "cuda_archs", "cuda_version", "why_no_cuda", "isa"}
    assert info["isa"] == _C.isa() in ("base", "avx2", "avx512")
    assert info["cuda"] == (info["why_no_cuda"] == "") == (info["cuda_version"] != "")
    status = _C.cuda_status()
    assert (status["devices"] == 0) == (status["error"] != "")
