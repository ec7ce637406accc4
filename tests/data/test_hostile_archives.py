"""Archives that ask for more than they are worth: refused in bounded time and memory, with one clear error."""

from __future__ import annotations

import io
import lzma
import os
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from imgcls_fast.data.fetch import open_source


def header(name: str, kind: bytes, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    return info.tobuf(tarfile.USTAR_FORMAT)


def padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % 512)


def whole(*parts: bytes) -> bytes:
    return b"".join(parts) + bytes(1024)


MEMBER = header("cats/a.jpg", tarfile.REGTYPE, 3) + padded(b"abc")


def pax(*records: bytes) -> bytes:
    content = b"".join(records)
    return header("PaxHeaders/x", tarfile.XHDTYPE, len(content)) + padded(content)


def record(key: bytes, value: bytes) -> bytes:
    length = len(key) + len(value) + 3
    while len(str(length)) + len(key) + len(value) + 3 != length:
        length += 1
    return b"%d %s=%s\n" % (length, key, value)


TARS = {
    "a pax header of 300,000 digits": whole(pax(b"1" * 300_000), MEMBER),
    "600 pax headers of 40,000 digits": whole(*[pax(b"1" * 40_000)] * 600, MEMBER),
    "a pax header of 1 GiB that is not there": whole(header("x", tarfile.XHDTYPE, 1 << 30), MEMBER),
    "a long name of 8 GiB that is not there": whole(header("x", tarfile.GNUTYPE_LONGNAME, (1 << 33) - 1), MEMBER),
    "a long name of 1 MiB": whole(header("x", tarfile.GNUTYPE_LONGNAME, 1 << 20), b"n" * (1 << 20), MEMBER),
    "a record that is its own length short": whole(pax(b"3 a=b\n"), MEMBER),
    "a record of no length": whole(pax(b"0 a=b\n"), MEMBER),
    "a size that is no number": whole(pax(record(b"size", b"9" * 5000)), MEMBER),
    "a negative size": whole(pax(record(b"size", b"-5")), MEMBER),
    "a sparse file of 8 TiB": whole(
        pax(record(b"GNU.sparse.major", b"1"), record(b"GNU.sparse.minor", b"0"), record(b"GNU.sparse.name", b"a"),
            record(b"GNU.sparse.realsize", str(8 << 40).encode())), MEMBER),
    "an old sparse file": whole(header("cats/a.jpg", tarfile.GNUTYPE_SPARSE, 512), bytes(512)),
    "a name of 5,000 letters": whole(pax(record(b"path", b"n" * 5000)), MEMBER),
    "a thousand folders inside each other": whole(pax(record(b"path", b"n/" * 1000 + b"a.jpg")), MEMBER),
}  # fmt: skip


@pytest.mark.parametrize("name", TARS)
def test_a_hostile_tar_is_refused_within_bounds(name: str, tmp_path: Path, in_bounds: Callable[..., Any]) -> None:
    (tmp_path / "d.tar").write_bytes(TARS[name])
    found = in_bounds(open_source, tmp_path / "d.tar", tmp_path / "cache", memory_mib=64)
    assert found.code == "D007", found
    assert "d.tar" in found.text and "try:" in found.text
    assert len(found.text) < 1500
    assert os.listdir(tmp_path / "cache") == []


def test_names_of_every_format_arrive(tmp_path: Path) -> None:
    long = "cats/" + "é" * 90 + "/" + "b" * 120 + ".jpg"
    for kind in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        with tarfile.open(tmp_path / "d.tar", "w", format=kind) as archive:
            info = tarfile.TarInfo(long)
            info.size, info.mtime = 3, 1.5  # type: ignore[assignment]
            archive.addfile(info, io.BytesIO(b"abc"))
            archive.addfile(tarfile.TarInfo("dogs/" + "x" * 95 + ".jpg"))
        root = open_source(tmp_path / "d.tar", tmp_path / "cache")
        assert (root / long).read_bytes() == b"abc"
        assert len(list((root / "dogs").iterdir())) == 1


def test_sizes_from_a_pax_header_and_in_base_256_are_read(tmp_path: Path) -> None:
    odd = bytearray(header("cats/b.jpg", tarfile.REGTYPE, 3))
    odd[124:136] = b"\x80" + (3).to_bytes(11, "big")
    odd[148:156] = b"%06o\0 " % (sum(odd[:148]) + 8 * 32 + sum(odd[156:]))
    sized = pax(record(b"size", b"3"), record(b"path", b"cats/c.jpg")) + header("short", tarfile.REGTYPE, 0)
    (tmp_path / "d.tar").write_bytes(whole(bytes(odd) + padded(b"abc"), sized + padded(b"def"), MEMBER))
    root = open_source(tmp_path / "d.tar", tmp_path / "cache")
    assert {p.name: p.read_bytes() for p in (root / "cats").iterdir()} == {
        "a.jpg": b"abc", "b.jpg": b"abc", "c.jpg": b"def"}  # fmt: skip


def test_an_xz_file_that_asks_for_gigabytes_of_memory_is_refused(tmp_path: Path, in_bounds: Callable[..., Any]) -> None:
    filters = [{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 20, "preset": 0}]
    content = bytearray(lzma.compress(whole(MEMBER), format=lzma.FORMAT_XZ, check=lzma.CHECK_NONE, filters=filters))
    at = content.index(
        b"\x21\x01", 12
    )  # the filter's number and the length of its properties; the next byte is the size
    content[at + 2] = 39  # 3 GiB
    import zlib

    length = (content[12] + 1) * 4 - 4
    content[12 + length : 16 + length] = struct.pack("<I", zlib.crc32(bytes(content[12 : 12 + length])))
    (tmp_path / "d.tar.xz").write_bytes(content)
    found = in_bounds(open_source, tmp_path / "d.tar.xz", tmp_path / "cache", memory_mib=8192)
    assert found.code == "D007" and "emory" in found.text, found


def test_xz_files_of_several_streams_with_padding_are_read(tmp_path: Path) -> None:
    content = whole(MEMBER)
    (tmp_path / "d.tar.xz").write_bytes(
        lzma.compress(content[:700]) + bytes(8) + lzma.compress(content[700:]) + bytes(4)
    )
    assert (open_source(tmp_path / "d.tar.xz", tmp_path / "cache") / "cats" / "a.jpg").read_bytes() == b"abc"


# ---------------------------------------------------------------- zip


def zipped(members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytearray:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return bytearray(out.getvalue())


def overlapping(copies: int) -> bytes:
    """One deflated stream that is `copies` files: all records of the index name it."""
    content = zipped({"a/00000.jpg": bytes(1 << 20)})
    start = content.index(b"PK\1\2")
    end = content.index(b"PK\5\6")
    one = bytes(content[start:end])
    records = b"".join(one.replace(b"a/00000.jpg", b"a/%05d.jpg" % i) for i in range(copies))
    tail = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, copies & 0xFFFF, copies & 0xFFFF, len(records), start, 0)
    return bytes(content[:start]) + records + tail


def patched(content: bytearray, signature: bytes, at: int, value: bytes) -> bytes:
    place = content.index(signature) + at
    content[place : place + len(value)] = value
    return bytes(content)


def lying64(length: int) -> bytes:
    """A 64-bit end record that claims an index of `length` bytes."""
    content = zipped({"a/b.jpg": b"abc"})
    end = content.index(b"PK\5\6")
    record = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, 1, 1, length, 0)
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, end, 1)
    return bytes(content[:end]) + record + locator + bytes(content[end:])


BOMB = {"a/b.jpg": bytes(1 << 20)}
ZIPS: dict[str, Callable[[], bytes]] = {
    "9,000 files in one stream": lambda: overlapping(9_000),
    "a claim of 4 GiB out of 1 kB": lambda: patched(zipped(BOMB), b"PK\1\2", 24, struct.pack("<L", 0xFFFFFFF0)),
    "an index of 2^60 bytes": lambda: lying64(1 << 60),
    "an index of -1 bytes": lambda: lying64((1 << 64) - 1),
    "an entry behind the end": lambda: patched(zipped(BOMB), b"PK\1\2", 42, struct.pack("<L", 1 << 30)),
    "a name of 60,000 letters": lambda: bytes(zipped({"n" * 60_000: b"abc"})),
    "a thousand folders inside each other": lambda: bytes(zipped({"n/" * 1000 + "a.jpg": b"abc"})),
    "LZMA, whose memory the file chooses": lambda: bytes(zipped(BOMB, zipfile.ZIP_LZMA)),
}


@pytest.mark.parametrize("name", ZIPS)
def test_a_hostile_zip_is_refused_within_bounds(name: str, tmp_path: Path, in_bounds: Callable[..., Any]) -> None:
    (tmp_path / "d.zip").write_bytes(ZIPS[name]())
    found = in_bounds(open_source, tmp_path / "d.zip", tmp_path / "cache", memory_mib=256)
    assert found.code == "D007", found
    assert "d.zip" in found.text and "try:" in found.text
    assert len(found.text) < 1500
    assert os.listdir(tmp_path / "cache") == []


def test_a_zip_behind_other_bytes_and_with_a_comment_is_read(tmp_path: Path) -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("cats/a.jpg", b"abc")
        archive.comment = b"a comment with PK\5\6 in it, and more than twenty-two bytes behind that"
    (tmp_path / "d.zip").write_bytes(b"#!/bin/sh\n" + out.getvalue().replace(b"PK\5\6 in", b"PK-- in"))
    assert (open_source(tmp_path / "d.zip", tmp_path / "cache") / "cats" / "a.jpg").read_bytes() == b"abc"
