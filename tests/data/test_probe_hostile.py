"""The header probe meets missing, cut and hostile files: always a valid row, never an exception or a crash."""

from __future__ import annotations

import io
import os
import socket
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from imgcls_fast import _C

OK, UNREADABLE, EMPTY, FOREIGN, DAMAGED = range(5)


def probe_one(path: Path) -> dict[str, int]:
    return {name: int(column[0]) for name, column in _C.probe([os.fsencode(path)], 1).items()}


def assert_valid(row: dict[str, int]) -> None:
    assert row["status"] in range(5)
    assert row["format"] in range(7)
    assert row["orientation"] in range(1, 9)
    assert row["truncated"] in (0, 1)
    assert row["animated"] in (0, 1)
    if row["status"] == OK:
        assert row["width"] > 0
        assert row["height"] > 0
        assert row["format"] > 0


def encoded(name: str, frames: int = 1, **options: Any) -> bytes:
    rng = np.random.default_rng(3)
    images = [Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)) for _ in range(frames)]
    exif = Image.Exif()
    exif[274] = 6
    exif[270] = "outside of its entry"
    if name not in ("GIF", "BMP"):
        options["exif"] = exif.tobytes() if name != "TIFF" else exif
    if frames > 1:
        options |= {"save_all": True, "append_images": images[1:]}
    buffer = io.BytesIO()
    images[0].save(buffer, name, **options)
    return buffer.getvalue()


WHOLE = {
    "JPEG": encoded("JPEG"),
    "progressive JPEG": encoded("JPEG", progressive=True),
    "PNG": encoded("PNG"),
    "APNG": encoded("PNG", frames=3),
    "WebP": encoded("WEBP"),
    "lossless WebP": encoded("WEBP", lossless=True),
    "animated WebP": encoded("WEBP", frames=3),
    "BMP": encoded("BMP"),
    "TIFF": encoded("TIFF"),
    "LZW TIFF": encoded("TIFF", compression="tiff_lzw"),
    "TIFF pages": encoded("TIFF", frames=3),
    "GIF": encoded("GIF"),
    "animated GIF": encoded("GIF", frames=3),
}


@pytest.mark.parametrize("kind", WHOLE)
def test_marks_a_file_that_lost_its_end(tmp_path: Path, kind: str) -> None:
    whole, path = WHOLE[kind], tmp_path / "file"
    path.write_bytes(whole)
    complete = probe_one(path)
    assert (complete["status"], complete["width"], complete["height"], complete["truncated"]) == (OK, 64, 48, 0)
    cuts = range(len(whole) // 17, len(whole) - 20, len(whole) // 17)
    for kept in (1, 2, 3, 7, 12, 20, 30, 60, 100, *cuts):
        path.write_bytes(whole[:kept])
        row = probe_one(path)
        assert_valid(row)
        assert row["status"] != OK or row["truncated"] == 1, f"{kept} of {len(whole)} bytes"
    for lost in (1, 2, 5, 20):
        if "TIFF" in kind and lost < 20:  # its last bytes may be padding of the last directory
            continue
        path.write_bytes(whole[:-lost])
        assert probe_one(path)["truncated"] == 1, f"lost {lost} bytes"


@pytest.mark.parametrize("kind", [kind for kind in WHOLE if "TIFF" not in kind])
@pytest.mark.parametrize("tail", [b"\0" * 500, b"trailer of a camera" * 50], ids=["padding", "trailer"])
def test_forgives_bytes_behind_the_end(tmp_path: Path, kind: str, tail: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(WHOLE[kind] + tail)
    row = probe_one(path)
    assert (row["status"], row["truncated"]) == (OK, 0)


def test_a_jpeg_with_the_end_marker_of_its_thumbnail_alone_is_truncated(tmp_path: Path) -> None:
    thumbnail = b"Exif\0\0" + b"II*\0\x08\0\0\0\0\0\0\0\0\0" + WHOLE["JPEG"][:200] + b"\xff\xd9"
    segment = b"\xff\xe1" + struct.pack(">H", len(thumbnail) + 2) + thumbnail
    path = tmp_path / "file"
    path.write_bytes(b"\xff\xd8" + segment + WHOLE["JPEG"][2:1500])
    assert probe_one(path)["truncated"] == 1


def test_bad_places_have_a_status_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "page.jpg").write_text("<!DOCTYPE html><html>404</html>")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(tmp_path / "socket") if len(str(tmp_path)) > 90 else str(tmp_path / "socket"))
    expected = {
        "missing.jpg": UNREADABLE,
        "": UNREADABLE,
        "loop": UNREADABLE,
        "pipe": UNREADABLE,
        "socket": UNREADABLE,
        "empty.jpg": EMPTY,
        "page.jpg": FOREIGN,
        "page.jpg/inside": UNREADABLE,
        "x" * 5000: UNREADABLE,
    }
    rows = _C.probe([os.fsencode(tmp_path / name) for name in expected], 2)
    assert dict(zip(expected, rows["status"].tolist(), strict=True)) == expected
    assert rows["width"].tolist() == [0] * len(expected)


def test_a_name_with_a_nul_is_unreadable_even_where_its_beginning_exists(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(WHOLE["PNG"])
    rows = _C.probe([os.fsencode(tmp_path / "a.png") + b"\0.jpg", b""], 1)
    assert rows["status"].tolist() == [UNREADABLE, UNREADABLE]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_unreadable(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(WHOLE["PNG"])
    path.chmod(0)
    assert probe_one(path)["status"] == UNREADABLE


def test_names_of_any_bytes_are_opened(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/\xff\xfe \n\xc3\xa4.jpg"
    with open(path, "wb") as file:
        file.write(WHOLE["JPEG"])
    assert _C.probe([path], 1)["status"].tolist() == [OK]


HOSTILE = {
    "PNG of 2^32 - 1 bytes a chunk": b"\x89PNG\r\n\x1a\n" + b"\xff\xff\xff\xffIHDR" + bytes(40),
    "BMP of size -2^31": b"BM" + bytes(12) + struct.pack("<LLLHHL", 40, 2**31, 2**31, 1, 24, 0) + bytes(20),
    "BMP of size 0": b"BM" + bytes(12) + struct.pack("<LLLHHL", 40, 0, 0, 1, 24, 0) + bytes(20),
    "TIFF whose directory is its header": b"II*\0\0\0\0\0" + bytes(40),
    "TIFF directory behind the end": b"II*\0" + struct.pack("<L", 2**32 - 1) + bytes(40),
    "BigTIFF directory near 2^64": b"II+\0\x08\0\0\0" + struct.pack("<Q", 2**64 - 4) + bytes(40),
    "BigTIFF with 2^64 - 1 entries": b"II+\0\x08\0\0\0" + struct.pack("<QQ", 16, 2**64 - 1) + b"\x01\x01\x10\0" * 99,
    "WebP of a chunk of 2^32 - 1 bytes": b"RIFF\xff\xff\xff\xffWEBPVP8X\xff\xff\xff\xff" + bytes(30),
    "GIF without images": b"GIF89a\1\0\1\0\0\0\0;",
    "JPEG without a frame": b"\xff\xd8\xff\xda\0\2\xff\xd9",
    "JPEG of height 0": b"\xff\xd8\xff\xc0\0\x0b\x08\0\0\0\x10\1\1\x11\0\xff\xda\0\2\xff\xd9",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_header_is_damaged(tmp_path: Path, name: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(HOSTILE[name])
    row = probe_one(path)
    assert_valid(row)
    assert row["status"] == DAMAGED


def test_a_directory_that_points_to_itself_ends(tmp_path: Path) -> None:
    entries = [(256, 3, 1, 5), (257, 3, 1, 4)]
    body = struct.pack("<H", 2) + b"".join(struct.pack("<HHLL", *entry) for entry in entries) + struct.pack("<L", 8)
    path = tmp_path / "a.tif"
    path.write_bytes(b"II*\0" + struct.pack("<L", 8) + body)
    row = probe_one(path)
    assert (row["status"], row["width"], row["height"], row["animated"]) == (OK, 5, 4, 0)


@pytest.fixture(scope="module")
def scratch_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "file"


FUZZ = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
MAGIC = [
    b"\xff\xd8\xff",
    b"\x89PNG\r\n\x1a\n",
    b"RIFF\x99\0\0\0WEBPVP8X",
    b"BM",
    b"II*\0",
    b"MM\0*",
    b"II+\0",
    b"GIF89a",
]


@FUZZ
@given(magic=st.sampled_from(MAGIC), body=st.binary(max_size=400))
def test_random_bytes_behind_a_magic_number_give_a_valid_row(scratch_file: Path, magic: bytes, body: bytes) -> None:
    scratch_file.write_bytes(magic + body)
    assert_valid(probe_one(scratch_file))


@FUZZ
@given(
    kind=st.sampled_from(sorted(WHOLE)),
    changes=st.lists(st.tuples(st.integers(0, 700), st.binary(min_size=1, max_size=8)), min_size=1, max_size=6),
    cut=st.integers(0, 900),
    from_end=st.booleans(),
)
def test_mutated_files_give_a_valid_row(
    scratch_file: Path, kind: str, changes: list[tuple[int, bytes]], cut: int, from_end: bool
) -> None:
    content = bytearray(WHOLE[kind])
    for at, new in changes:
        at = len(content) - 1 - at % len(content) if from_end else at % len(content)
        content[at : at + len(new)] = new
    scratch_file.write_bytes(content[: len(content) - cut])
    assert_valid(probe_one(scratch_file))
