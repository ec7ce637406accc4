"""Members of a tar file, read header by header within bounds.

`tarfile` of Python up to 3.11.9 takes quadratic time over a pax header that is one long number (CVE-2024-6232), follows
headers of any size, and knows sparse files that unpack to anything. This reader knows what archives of images need: files
and folders, in the formats ustar, pax and GNU. Time and memory are linear in the bytes that are read.

Format: POSIX.1-2017, `pax`, "ustar Interchange Format" and "pax Header Block"; GNU tar manual, "Basic Tar Format".
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tarfile import HeaderError, ReadError
from typing import IO, Any

from ..core.bounds import TAR_HEADER_BYTES, XZ_MEMORY_BYTES

BLOCK = 512
_MANY = 1 << 20
_LARGEST = 1 << 62


class HostileTar(ValueError):
    """A member that asks for more than its bounds: (its name, reason)."""


@dataclass
class TarMember:
    """One member; `read` gives its content, once, and only before the next member is asked for."""

    name: str
    kind: str  # "file", "folder" or "other"
    size: int
    _source: IO[bytes]
    _left: int = 0

    def read(self, n: int = -1) -> bytes:
        """Up to `n` bytes of the content; empty at its end.

        Raises:
            ReadError: the archive ends before the member does.
        """
        want = self._left if n < 0 else min(n, self._left)
        piece = self._source.read(want) if want else b""
        if want and not piece:
            raise ReadError("unexpected end of data")
        self._left -= len(piece)
        return piece


def open_tar(path: Path) -> IO[bytes]:
    """The bytes of a tar file, decompressed by what its first bytes are, whatever its name.

    Raises:
        OSError: it cannot be read.
    """
    file = open(path, "rb")  # noqa: SIM115 - handed to the caller
    head = file.peek(6)
    if head[:2] == b"\x1f\x8b":
        return gzip.GzipFile(fileobj=file)  # type: ignore[return-value]
    if head[:3] == b"BZh":
        return bz2.BZ2File(file)
    if head[:6] == b"\xfd7zXZ\0" or head[:3] == b"\x5d\0\0":
        return io.BufferedReader(_Xz(file), _MANY)
    return file


class _Xz(io.RawIOBase):
    """What `lzma.LZMAFile` does, with a limit on memory: a header may claim a dictionary of 4 GiB."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.decoder = file, lzma.LZMADecompressor(memlimit=XZ_MEMORY_BYTES)
        self.whole = False  # whether at least one stream has ended

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            if self.decoder.eof:
                rest = (self.decoder.unused_data or self.file.read(1 << 16)).lstrip(b"\0")
                while not rest and (more := self.file.read(1 << 16)):  # padding between streams
                    rest = more.lstrip(b"\0")
                if not rest:
                    return 0
                self.decoder = lzma.LZMADecompressor(memlimit=XZ_MEMORY_BYTES)
                piece = self.decoder.decompress(rest, len(buffer))
            else:
                rest = self.file.read(1 << 16) if self.decoder.needs_input else b""
                if not rest and self.decoder.needs_input:
                    raise EOFError("Compressed file ended before the end-of-stream marker was reached")
                piece = self.decoder.decompress(rest, len(buffer))
            if piece:
                buffer[: len(piece)] = piece
                return len(piece)

    def close(self) -> None:
        self.file.close()
        super().close()


def read_members(source: IO[bytes], count: Callable[[str, int], None]) -> Iterator[TarMember]:
    """Every member up to the end, which is a block of zeros; what lies behind is read as well, for its checksum.

    Args:
        count: called with a name and the bytes that are not content (headers, padding), so that they count as well.

    Raises:
        ReadError, HeaderError: cut or garbled.
        HostileTar: a header beyond its bound, a sparse file, sizes that are none.
    """
    everywhere: dict[str, str] = {}  # of global pax headers
    own: dict[str, str] = {}  # of the next member
    while True:
        header = _exactly(source, BLOCK, "the archive is cut off or garbled here")
        if header == bytes(BLOCK):
            break
        _check_sum(header)
        count("a header", BLOCK)
        kind, size = header[156:157], _number(header[124:136])
        if kind in b"xXgLK":
            content = _extension(source, kind, size)
            count("a header", len(content))
            if kind == b"L":
                own["path"] = _text(content.split(b"\0", 1)[0])
            elif kind == b"g":
                everywhere |= _pax(content)
            elif kind != b"K":  # the target of a link, which is refused anyway
                own |= _pax(content)
            continue
        member = _member(source, header, kind, size, everywhere | own)
        own = {}
        yield member
        while member.read(_MANY):
            pass
        count(member.name, len(_exactly(source, -member.size % BLOCK, "unexpected end of data")))
    while piece := source.read(_MANY):  # to the checksum of gzip, xz or bzip2
        count("the end of the archive", len(piece))


def _member(source: IO[bytes], header: bytes, kind: bytes, size: int, pax: dict[str, str]) -> TarMember:
    name = _text(header[:100].split(b"\0", 1)[0])
    if header[257:263] == b"ustar\0" and (prefix := header[345:500].split(b"\0", 1)[0]):
        name = f"{_text(prefix)}/{name}"
    name = pax.get("path", name)
    if kind == b"S" or any(key.startswith("GNU.sparse.") for key in pax):
        raise HostileTar(name, "is a sparse file; only whole files are unpacked")
    if "size" in pax:
        size = _decimal(pax["size"])
    if kind == b"5" or (kind in (b"0", b"\0") and name.endswith("/")):
        return TarMember(name, "folder", 0, source)  # a size there is of what a folder's file system may hold
    if kind in (b"0", b"\0", b"7"):
        return TarMember(name, "file", size, source, size)
    return TarMember(name, "other", 0, source)


def _extension(source: IO[bytes], kind: bytes, size: int) -> bytes:
    """Content of a pax or GNU header, its padding included in what is read."""
    if size > TAR_HEADER_BYTES:
        what = "a long name" if kind in b"LK" else "a pax header"
        raise HostileTar(what, f"has {size:,} bytes; at most {TAR_HEADER_BYTES:,} are read")
    return _exactly(source, size + -size % BLOCK, "unexpected end of data")[:size]


def _pax(content: bytes) -> dict[str, str]:
    """Records "<length> <key>=<value>\\n"; the length counts itself and the newline."""
    found: dict[str, str] = {}
    at = 0
    while at < len(content) and content[at]:
        space = content.find(b" ", at, at + 8)  # a header of 64 KiB has no length of more digits
        length = _decimal(content[at:space].decode("latin-1")) if space > at else 0
        record = content[at : at + length]
        if length <= space - at + 1 or not record.endswith(b"\n") or b"=" not in record:
            raise HeaderError("invalid pax header")
        key, _, value = record[space - at + 1 : -1].partition(b"=")
        found[_text(key)] = _text(value)
        at += length
    return found


def _check_sum(header: bytes) -> None:
    """The sum of all bytes with the field itself as blanks; old programs summed signed bytes."""
    wanted = _number(header[148:156])
    plain = header[:148] + b" " * 8 + header[156:]
    total = sum(plain)
    if wanted not in (total, total - 256 * sum(byte > 127 for byte in plain)):
        raise ReadError("the archive is cut off or garbled here")


def _number(field: bytes) -> int:
    """Octal digits, or from GNU a number in base 256 marked by the highest bit.

    Raises:
        HeaderError: neither, or negative.
    """
    if field[0] == 0x80:
        value = int.from_bytes(field[1:], "big")
    else:
        text = field.split(b"\0", 1)[0].strip()
        if text.strip(b"01234567"):
            raise HeaderError("invalid header: a number is none")
        value = int(text or b"0", 8)
    if value > _LARGEST:
        raise HeaderError("invalid header: a size is negative or absurd")
    return value


def _decimal(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        raise HeaderError("invalid pax header: a number is none")
    return int(text)


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def _exactly(source: IO[bytes], n: int, otherwise: str) -> bytes:
    parts = []
    while n:
        piece = source.read(n)
        if not piece:
            raise ReadError(otherwise)
        parts.append(piece)
        n -= len(piece)
    return b"".join(parts)
