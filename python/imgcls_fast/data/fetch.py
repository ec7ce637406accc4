"""Turns what the user names into a folder on disk: archives are unpacked once, safely, into a cache."""

from __future__ import annotations

import errno
import lzma
import os
import re
import shutil
import stat
import struct
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ..core import bounds
from ..core.errors import DataError, HardwareError, near
from ..core.files import explained_write, lack_of, sha256_file
from ..core.phases import phase
from ..core.text import command
from ..core.zips import HostileZip, ZipBounds, check_zip
from .spelling import split_of
from .tar import HostileTar, TarMember, open_tar, read_members

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2", ".tbz2")
_SIDE_FOLDERS = {"__macosx", "lost+found"}
_SIDE_FILES = {"thumbs.db", "desktop.ini"}

# What the standard library's readers raise on damaged archives.
_DAMAGE = (
    zipfile.BadZipFile,
    tarfile.TarError,
    lzma.LZMAError,
    zlib.error,
    EOFError,
    OSError,
    ValueError,
    NotImplementedError,
    RuntimeError,
    struct.error,
    OverflowError,
)


@dataclass(frozen=True)
class Limits:
    """What an archive may unpack to before it is taken for a bomb."""

    total_bytes: int = bounds.ARCHIVE_UNPACKED_BYTES
    ratio: float = bounds.ARCHIVE_RATIO
    ratio_from_bytes: int = bounds.ARCHIVE_RATIO_FROM_BYTES
    entries: int = bounds.ARCHIVE_ENTRIES


class _Refused(Exception):
    """A member that must not be unpacked: (member's name, reason)."""


def is_ignored(name: str) -> bool:
    """Files and folders that systems leave behind: hidden ones, __MACOSX, lost+found, Thumbs.db, desktop.ini."""
    return name.startswith(".") or name.lower() in _SIDE_FOLDERS or name.lower() in _SIDE_FILES


def is_archive(path: Path) -> bool:
    """Whether the name is that of an archive that `open_source` can unpack."""
    return path.name.lower().endswith(ARCHIVES)


def open_source(path: Path, cache: Path, limits: Limits = Limits()) -> Path:
    """The folder that holds the images of `path`.

    Args:
        path: a folder (returned as it is), or .zip, .tar, .tar.gz, .tgz, .tar.xz, .tar.bz2.
        cache: where archives are unpacked, once per content, into `<first 16 hex digits of the SHA-256>/`.
        limits: sizes beyond which an archive is taken for a bomb.

    Returns:
        The folder; inside an archive, folders that only wrap everything are entered.

    Raises:
        DataError: D001 when there is no such path or it is neither; D007 for an unsafe or damaged archive, with the
            member's name; nothing is left behind.
        HardwareError: H003 when the cache cannot be written.
    """
    path = Path(os.path.abspath(path))
    if os.path.isdir(path):
        return path
    demand_there(path)
    if not is_archive(path):
        raise DataError("D001", f"{path} is neither a folder nor an archive ({', '.join(ARCHIVES)})")
    try:
        name = sha256_file(path)[:16]
    except OSError as error:
        raise DataError("D001", f"{path} cannot be read: {error.strerror}") from error
    target = cache / name
    if not target.is_dir():
        _unpack_whole(path, target, limits)
    return data_root(target)


def demand_there(path: Path) -> None:
    """Refuse what is not there, with the name that may be meant.

    Raises:
        DataError: D001.
    """
    if lack := lack_of(path):
        if lack != "does not exist":
            raise DataError("D001", f"{path} {lack}")
        address = re.search(r"\b(https?|s3|gs|hf):/", str(path))
        why = "nothing is downloaded: fetch it yourself, then name the file or folder" if address else ""
        raise DataError("D001", f"no such file or folder: {path}", why=why, try_=_similar(path))


def data_root(folder: Path) -> Path:
    """Enter folders that only wrap everything: one folder, nothing beside it, more folders inside, not called train."""
    for _ in range(8):
        with os.scandir(folder) as listing:
            entries = [e for e in listing if not is_ignored(e.name)]
        if len(entries) != 1 or not entries[0].is_dir() or split_of(entries[0].name) is not None:
            return folder
        with os.scandir(entries[0].path) as listing:
            if not any(e.is_dir() and not is_ignored(e.name) for e in listing):
                return folder
        folder = Path(entries[0].path)
    return folder


def _similar(path: Path) -> str:
    if not os.path.isdir(path.parent) or not os.access(path.parent, os.R_OK):
        return ""
    found = near(path.name, sorted(os.listdir(path.parent)))
    return command("data", "check", path.parent / found) if found else ""


@phase("unpacking the archive")
def _unpack_whole(path: Path, target: Path, limits: Limits) -> None:
    """Unpack beside the target and rename: the target exists whole or not at all."""
    with explained_write(target, "IMGCLS_CACHE"):
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(dir=target.parent, prefix=".unpack-"))
    try:
        _unpack(path, work, limits)
        work.chmod(0o755)
        with explained_write(target, "IMGCLS_CACHE"):
            try:
                os.rename(work, target)
            except OSError:
                if not target.is_dir():  # otherwise another process was faster, with the same bytes
                    raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _unpack(path: Path, work: Path, limits: Limits) -> None:
    counter = _Counter(limits, path.stat().st_size)
    member = ["the archive's index"]  # what is being read, for the message
    hint = "make the archive again, or unpack it yourself and name the folder"
    try:
        if path.name.lower().endswith(".zip"):
            _unpack_zip(path, work, counter, member)
        else:
            _unpack_tar(path, work, counter, member)
    except (_Refused, HostileTar, HostileZip) as error:
        name, reason = error.args
        raise DataError("D007", f"unsafe archive {path.name}: {name!r} {reason}", where=str(path), try_=hint) from error
    except _DAMAGE as error:
        text = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            "D007", f"damaged archive {path.name}, at {member[0]!r}: {text}", where=str(path), try_=hint
        ) from error
    if not counter.files:
        raise DataError("D002", f"the archive {path.name} holds no files", where=str(path))


class _Counter:
    """Counts what really comes out; an archive's own figures are claims."""

    def __init__(self, limits: Limits, archive_bytes: int) -> None:
        self.limits, self.archive_bytes = limits, max(1, archive_bytes)
        self.bytes = self.entries = self.files = 0

    def entry(self, name: str) -> None:
        self.entries += 1
        if self.entries > self.limits.entries:
            raise _Refused(name, f"is one entry too many: the limit is {self.limits.entries:,}")

    def add(self, name: str, size: int) -> None:
        self.bytes += size
        if self.bytes > self.limits.total_bytes:
            raise _Refused(name, f"brings the unpacked size over the limit of {self.limits.total_bytes:,} bytes")
        ratio = self.bytes / self.archive_bytes
        if self.bytes > self.limits.ratio_from_bytes and ratio > self.limits.ratio:
            raise _Refused(name, f"unpacks to {ratio:,.0f} times the size of the archive: a decompression bomb")


def _place(name: str, work: Path) -> Path | None:
    """Where a member goes; None for the root itself.

    Raises:
        _Refused: absolute names, `..`, NUL, or anything that would land outside.
    """
    if len(name) > bounds.ARCHIVE_NAME_BYTES:
        raise _Refused(name[:60] + "...", "has a name that is too long")
    if "\0" in name:
        raise _Refused(name, "has a NUL byte in its name")
    if name.startswith("/") or re.match(r"[A-Za-z]:", name):
        raise _Refused(name, "is an absolute path")
    parts = [p for p in name.split("/") if p not in ("", ".")]
    if ".." in parts:
        raise _Refused(name, "climbs out of the folder with '..'")
    if not parts:
        return None
    if len(parts) > bounds.ARCHIVE_FOLDERS:
        raise _Refused(name[:60] + "...", f"lies more than {bounds.ARCHIVE_FOLDERS} folders deep")
    place = work.joinpath(*parts)
    if not place.resolve().is_relative_to(work.resolve()):  # cannot happen, as no link is ever made; checked anyway
        raise _Refused(name, "would land outside the folder")
    return place


def _write(source: IO[bytes] | TarMember, place: Path, name: str, counter: _Counter) -> None:
    if place.is_dir():
        raise _Refused(name, "is a file and a folder at once")
    with _writing(place, name):
        place.parent.mkdir(parents=True, exist_ok=True)
        file = open(place, "wb")  # noqa: SIM115 (closed below; reading must stay outside of _writing)
    with file:
        while piece := source.read(1 << 20):
            counter.add(name, len(piece))
            with _writing(place, name):
                file.write(piece)
    counter.files += 1


@contextmanager
def _writing(place: Path, name: str) -> Iterator[None]:
    """Distinguish a name that no file can have (the archive's fault) from a full disk (the machine's)."""
    try:
        with explained_write(place, "IMGCLS_CACHE"):
            yield
    except HardwareError as error:
        cause = error.__cause__
        if isinstance(cause, NotADirectoryError | FileExistsError | IsADirectoryError):
            raise _Refused(name, "is a file and a folder at once") from error
        if isinstance(cause, OSError) and cause.errno == errno.ENAMETOOLONG:
            raise _Refused(name[:60] + "...", "has a name that is too long") from error
        raise


def _unpack_zip(path: Path, work: Path, counter: _Counter, member: list[str]) -> None:
    limits = counter.limits
    with open(path, "rb") as file:
        allowed = ZipBounds(
            min(limits.entries, bounds.ZIP_ENTRIES),
            bounds.ZIP_DIRECTORY_BYTES,
            limits.total_bytes,
            limits.ratio,
            limits.ratio_from_bytes,
            bounds.ARCHIVE_NAME_BYTES,
        )
        check_zip(file, allowed)
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            name = member[0] = _zip_name(info)
            counter.entry(name)
            kind = stat.S_IFMT(info.external_attr >> 16) if info.create_system == 3 else 0
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise _Refused(name, "is a link or a device; only files and folders are unpacked")
            if info.flag_bits & 1:
                raise _Refused(name, "is encrypted")
            place = _place(name, work)
            if place is None:
                continue
            if name.endswith("/"):
                with _writing(place, name):
                    place.mkdir(parents=True, exist_ok=True)
                continue
            with archive.open(info) as source:
                _write(source, place, name, counter)


def _zip_name(info: zipfile.ZipInfo) -> str:
    """The member's name; many tools write UTF-8 without setting the flag for it, and some write backslashes."""
    name = info.orig_filename
    if not info.flag_bits & 0x800:
        with suppress(UnicodeError):  # otherwise it is really an old code page
            name = name.encode("cp437").decode("utf-8")
    return name.replace("\\", "/")


def _unpack_tar(path: Path, work: Path, counter: _Counter, member: list[str]) -> None:
    with open_tar(path) as source:
        member[0] = "the first header"
        for info in read_members(source, counter.add):
            name = member[0] = info.name
            counter.entry(name)
            if info.kind == "other":
                raise _Refused(name, "is a link or a device; only files and folders are unpacked")
            place = _place(name, work)
            if place is None:
                continue
            if info.kind == "folder":
                with _writing(place, name):
                    place.mkdir(parents=True, exist_ok=True)
                continue
            _write(info, place, name, counter)
            member[0] = "the end of the archive"  # or a header behind this member
