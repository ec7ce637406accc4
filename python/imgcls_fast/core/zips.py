"""The index of a zip file, looked at before `zipfile`, NumPy or torch builds objects of it."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO
from zipfile import BadZipFile

_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR64 = struct.Struct("<4sLQL")
_RECORD = struct.Struct("<4s6H3L5H2L")
_LONGEST_COMMENT = 65535
_MAX32 = 0xFFFFFFFF


class HostileZip(ValueError):
    """An index that asks for more than its bounds: (what it is about, reason)."""

    def __str__(self) -> str:
        return " ".join(map(str, self.args))


@dataclass(frozen=True)
class ZipBounds:
    """What an index may claim.

    Args:
        entries: number of files.
        directory_bytes: size of the index itself.
        unpacked_bytes: sum of the sizes that it claims.
        ratio: ratio of that sum to the size of the file, counted from `ratio_from_bytes` on.
        name_bytes: length of a name.
        methods: compression methods (0 stored, 8 deflate, 12 bzip2; 14, LZMA, may ask for gigabytes of memory).
    """

    entries: int
    directory_bytes: int
    unpacked_bytes: int
    ratio: float
    ratio_from_bytes: int
    name_bytes: int = 4096
    methods: tuple[int, ...] = (0, 8, 12)


@dataclass(frozen=True)
class ZipEntry:
    """One record of the index, as it claims to be."""

    name: str
    method: int
    packed: int
    unpacked: int
    offset: int
    crc: int = 0
    encrypted: bool = False


def check_zip(file: BinaryIO, bounds: ZipBounds) -> int:
    """Number of entries, after each record of the index has been checked in constant memory.

    Entries that overlap (one stream that is many files) are found by their sum: they cannot take more bytes than the
    file has.

    Raises:
        BadZipFile: there is no whole index.
        HostileZip: it goes beyond `bounds`, or its entries overlap or lie outside the file.
    """
    size = file.seek(0, 2)
    count = packed = unpacked = 0
    for entry in read_index(file, bounds.directory_bytes):
        count += 1
        if count > bounds.entries:
            raise HostileZip(entry.name[:60], f"is one entry too many: the limit is {bounds.entries:,}")
        if len(entry.name) > bounds.name_bytes:
            raise HostileZip(entry.name[:60] + "...", "has a name that is too long")
        if entry.method not in bounds.methods:
            raise HostileZip(entry.name, f"is packed with method {entry.method}; stored, deflate and bzip2 are read")
        if entry.offset + entry.packed > size:
            raise BadZipFile(f"{entry.name} lies beyond the end of the file")
        packed += 30 + entry.packed
        unpacked += entry.unpacked
        if packed > size:
            raise HostileZip(entry.name, "overlaps other entries: together they are longer than the archive")
        if unpacked > bounds.unpacked_bytes:
            limit = f"the limit of {bounds.unpacked_bytes:,} bytes"
            raise HostileZip(entry.name, f"brings the unpacked size over {limit}")
        if unpacked > bounds.ratio_from_bytes and unpacked > bounds.ratio * size:
            times = f"{unpacked / size:,.0f} times the size of the archive"
            raise HostileZip(entry.name, f"unpacks to {times}: a decompression bomb")
    return count


def read_index(file: BinaryIO, largest: int) -> Iterator[ZipEntry]:
    """The records of the index, one after the other. Finds it as `zipfile` does, so that both see the same one.

    Raises:
        BadZipFile: there is none, or it is cut or garbled.
        HostileZip: it is larger than `largest` bytes.
    """
    start, length = _find_index(file)
    if length > largest:
        raise HostileZip("the archive's index", f"has {length:,} bytes; at most {largest:,} are read")
    file.seek(start)
    done = 0
    while done < length:
        head = file.read(_RECORD.size)
        if len(head) < _RECORD.size or head[:4] != b"PK\1\2":
            raise BadZipFile(f"the archive's index is cut or garbled at byte {start + done:,}")
        (_, _, _, flags, method, _, _, crc, packed, unpacked, n, x, c, _, _, _, offset) = _RECORD.unpack(head)
        name, extra = file.read(n), file.read(x)
        if len(name) + len(extra) + len(file.read(c)) < n + x + c:
            raise BadZipFile("the archive's index is cut off")
        unpacked, packed, offset = _large(extra, unpacked, packed, offset)
        text = name.decode("utf-8" if flags & 0x800 else "cp437", "replace")
        yield ZipEntry(text, method, packed, unpacked, offset, crc, bool(flags & 1))
        done += _RECORD.size + n + x + c


def _find_index(file: BinaryIO) -> tuple[int, int]:
    """(start, length) of the central directory."""
    size = file.seek(0, 2)
    file.seek(max(0, size - _END.size - _LONGEST_COMMENT))
    tail = file.read()
    at = len(tail) - _END.size
    if at < 0 or tail[at : at + 4] != b"PK\5\6" or tail[-2:] != b"\0\0":
        at = tail.rfind(b"PK\5\6")
    if at < 0 or len(tail) - at < _END.size:
        raise BadZipFile("File is not a zip file")
    length = _END.unpack_from(tail, at)[5]
    end = size - len(tail) + at
    locator = end - _LOCATOR64.size
    if locator >= _END64.size:
        file.seek(locator)
        if file.read(4) == b"PK\6\7":
            file.seek(locator - _END64.size)
            record = _END64.unpack(file.read(_END64.size))
            if record[0] != b"PK\6\6":
                raise BadZipFile("the archive's 64-bit index is cut or garbled")
            length, end = record[8], locator - _END64.size
    if length > end:
        raise BadZipFile("Bad offset for central directory")
    return end - length, length


def _large(extra: bytes, *values: int) -> tuple[int, int, int]:
    """Sizes and offset with those of a 64-bit record in place of those that do not fit into 32 bits."""
    out, at = list(values), 0
    if _MAX32 not in out:
        return out[0], out[1], out[2]
    while at + 4 <= len(extra):
        tag, length = struct.unpack_from("<HH", extra, at)
        if tag == 1:
            field = at + 4
            for i, value in enumerate(values):
                if value == _MAX32 and field + 8 <= min(len(extra), at + 4 + length):
                    (out[i],) = struct.unpack_from("<Q", extra, field)
                    field += 8
        at += 4 + length
    return out[0], out[1], out[2]
