"""Opens the images of a data set: one object is asked for their bytes, by name, wherever they are.

A name is a path of the manifest: relative to its root, or absolute. All code that wants the bytes of a row asks the store
of the manifest's root, so that a new place for images (one packed file, a bucket) is a class here and no branch elsewhere.
A store holds no open file: loaders fork, and read in threads.
"""

from __future__ import annotations

import bz2
import errno
import hashlib
import os
import struct
import zlib
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, Protocol
from zipfile import BadZipFile

from ..core import bounds
from ..core.errors import DataError
from ..core.zips import HostileZip, ZipBounds, ZipEntry, check_zip, read_index
from . import reach

_LOCAL = struct.Struct("<4s5H3L2H")  # the header in front of a member
_INDEX = ZipBounds(
    entries=bounds.ZIP_ENTRIES,
    directory_bytes=bounds.ZIP_DIRECTORY_BYTES,
    unpacked_bytes=bounds.ARCHIVE_UNPACKED_BYTES,
    ratio=bounds.ARCHIVE_RATIO,
    ratio_from_bytes=bounds.ARCHIVE_RATIO_FROM_BYTES,
)


class Store(Protocol):
    """A place of images."""

    def read(
        self, name: str, *, seen: bool = True, most: int | None = None, patience: reach.Patience | None = None
    ) -> bytes:
        """Return all bytes of an image; arguments and errors as in `reach.read`."""
        ...

    def digest(self, name: str, *, patience: reach.Patience | None = None) -> bytes:
        """Return the SHA-256 of these bytes, however many they are; errors as in `reach.read`."""
        ...

    def holds(self, name: str) -> bool:
        """Whether there is anything of this name."""
        ...

    def size(self, name: str) -> int:
        """Return how many bytes an image has.

        Raises:
            OSError: there is none.
        """
        ...

    def where(self, name: str) -> str:
        """Return the place of an image, for messages."""
        ...


class Folder:
    """Images that are files.

    Args:
        root: folder that relative names start from; as it is by default, names are paths.
    """

    def __init__(self, root: Path = Path()) -> None:
        self.root = root

    def read(
        self, name: str, *, seen: bool = True, most: int | None = None, patience: reach.Patience | None = None
    ) -> bytes:
        return reach.read(self.root / name, seen=seen, most=most, patience=patience)

    def digest(self, name: str, *, patience: reach.Patience | None = None) -> bytes:
        return reach.with_file(self.root / name, _sha256, patience=patience)

    def holds(self, name: str) -> bool:
        return (self.root / name).exists()

    def size(self, name: str) -> int:
        return (self.root / name).stat().st_size

    def where(self, name: str) -> str:
        return str(self.root / name)


FILES = Folder()


class Zip:
    """Images that are members of one zip archive, read in place: one open and two reads per image, nothing unpacked.

    Args:
        archive: the zip file.
        inside: folder of the archive that relative names start from.

    Raises:
        DataError: D007 for a damaged or hostile archive, D015 for one that cannot be reached.
    """

    def __init__(self, archive: Path, inside: str = "") -> None:
        self.archive, self._inside = archive, inside.strip("/") + "/" if inside.strip("/") else ""
        self._members, self._version = reach.with_file(archive, lambda file: _members(archive, file))

    def read(
        self, name: str, *, seen: bool = True, most: int | None = None, patience: reach.Patience | None = None
    ) -> bytes:
        member = self._members.get(self._inside + name)
        if member is None:
            missing = FileNotFoundError(errno.ENOENT, "No such member of the archive", self.where(name))
            raise reach.unreachable(self.where(name), missing) if seen else missing
        if most is not None and member.unpacked > most:
            raise reach.NotAFile(f"too large: {member.unpacked:,} bytes, the limit is {most:,}")
        return reach.with_file(self.archive, lambda file: self._unpacked(file, member), patience=patience)

    def digest(self, name: str, *, patience: reach.Patience | None = None) -> bytes:
        return hashlib.sha256(self.read(name, patience=patience)).digest()

    def holds(self, name: str) -> bool:
        return self._inside + name in self._members and self.archive.exists()

    def size(self, name: str) -> int:
        try:
            return self._members[self._inside + name].unpacked
        except KeyError as error:
            raise FileNotFoundError(errno.ENOENT, "No such member of the archive", self.where(name)) from error

    def where(self, name: str) -> str:
        return str(self.archive / (self._inside + name))

    def _unpacked(self, file: BinaryIO, member: ZipEntry) -> bytes:
        if _version(file) != self._version:
            text = f"{self.archive} was replaced while its images were being read"
            raise DataError("D010", text, where=str(self.archive), try_="repeat the command")
        file.seek(member.offset)
        head = file.read(_LOCAL.size)
        if len(head) < _LOCAL.size or head[:4] != b"PK\3\4":
            raise reach.NotAFile("damaged in its archive: no header where the index has it")
        if member.encrypted:
            raise reach.NotAFile("encrypted in its archive")
        name_bytes, extra_bytes = _LOCAL.unpack(head)[-2:]
        file.seek(name_bytes + extra_bytes, 1)
        try:
            content = _inflate(file.read(member.packed), member)
        except (zlib.error, OSError, EOFError, ValueError) as error:  # bz2 raises OSError without a number
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise reach.NotAFile(f"damaged in its archive: {error}") from error
        if len(content) != member.unpacked or zlib.crc32(content) != member.crc:
            raise reach.NotAFile("damaged in its archive: its bytes are not those of its checksum")
        return content


def open_store(root: Path) -> Store:
    """Return the store of a manifest's root: a folder, or a zip archive (or a folder in one).

    Raises:
        DataError: as `Zip`.
    """
    if not root.is_dir():
        for place in (root, *root.parents):
            if place.suffix.lower() == ".zip" and place.is_file():
                facts = place.stat()
                inside = root.relative_to(place).as_posix()
                return _zip(place, "" if inside == "." else inside, (facts.st_size, facts.st_mtime_ns))
    return Folder(root)


def reader(root: Path, most: int) -> Callable[[str], bytes]:
    """Return a function that looks at an image by its name, without waiting; no bytes where it cannot, or has more than `most`."""
    hurried = reach.Patience()
    hurried.call_off()

    def read(name: str) -> bytes:
        try:
            return open_store(root).read(name, seen=False, most=most, patience=hurried)
        except (OSError, reach.NotAFile, DataError):
            return b""

    return read


@lru_cache(maxsize=4)
def _zip(archive: Path, inside: str, version: tuple[int, int]) -> Zip:
    """Keep one index in memory per version of an archive."""
    return Zip(archive, inside)


def _members(archive: Path, file: BinaryIO) -> tuple[dict[str, ZipEntry], tuple[int, int]]:
    try:
        check_zip(file, _INDEX)
        entries = {entry.name: entry for entry in read_index(file, bounds.ZIP_DIRECTORY_BYTES)}
    except (BadZipFile, HostileZip, struct.error) as error:
        text = f"{archive} cannot be read in place: {error}"
        raise DataError("D007", text, where=str(archive), try_="unpack it yourself, and name the folder") from error
    return {name: entry for name, entry in entries.items() if not name.endswith("/")}, _version(file)


def _version(file: BinaryIO) -> tuple[int, int]:
    facts = os.fstat(file.fileno())
    return facts.st_size, facts.st_mtime_ns


def _inflate(packed: bytes, member: ZipEntry) -> bytes:
    """Unpack a member: at most one byte more than it claims."""
    if member.method == 0:
        return packed
    most = member.unpacked + 1
    if member.method == 8:
        return zlib.decompressobj(-15).decompress(packed, most)
    return bz2.BZ2Decompressor().decompress(packed, most)


def _sha256(file: BinaryIO) -> bytes:
    return hashlib.file_digest(file, "sha256").digest()  # type: ignore[arg-type]
