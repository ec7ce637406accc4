"""Files that appear whole or not at all, and digests of them."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

from .bounds import JSON_BYTES
from .errors import HardwareError
from .text import to_json

SEAL = "seal"  # key of the digest that a sealed JSON file holds of itself
_JSON_DEPTH = 64
# what CIFS, FUSE and some network mounts answer to the fsync of a folder, and one that may be written but not read to its opening
_NOT_SYNCED = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF, errno.EACCES, errno.ENOSYS}


def sync_directory(path: Path) -> None:
    """Make renames inside `path` survive a power cut, where the file system can: one that cannot has not failed to write.

    Raises:
        OSError: any other fault of the disk.
    """
    try:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno not in _NOT_SYNCED:
            raise


def move_folder(source: Path, target: Path, first: str = "") -> None:
    """Rename a folder; where the file system cannot (overlayfs, a folder of a lower layer: EXDEV), copy it and remove the original.

    `target` appears whole in both cases. While the original is removed it is incomplete, and the file `first` of it is gone.

    Raises:
        OSError: `target` exists, or the disk refuses.
    """
    try:
        os.rename(source, target)
        return
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
    temporary = target.with_name(f".copy.{os.getpid()}")
    try:
        shutil.copytree(source, temporary, symlinks=True)
        for inner in temporary.rglob("*"):
            if inner.is_file() and not inner.is_symlink():
                with open(inner, "rb") as file:
                    os.fsync(file.fileno())
        sync_directory(temporary)
        os.rename(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_directory(target.parent)
    if first:
        (source / first).unlink(missing_ok=True)
    shutil.rmtree(source)

_CURES = (
    ((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "free some space"),
    ((errno.EACCES, errno.EPERM, errno.EROFS), "get permission to write there"),
    ((errno.EMFILE, errno.ENFILE), "allow more open files (ulimit -n 4096)"),
)


@contextmanager
def explained_write(path: Path, named_by: str = "--out", verb: str = "write") -> Iterator[None]:
    """Turn a full disk or a missing permission into one clear error.

    Args:
        named_by: the option or variable that names another place.
        verb: what cannot be done; for "delete" there is no other place.

    Raises:
        HardwareError: H003, with the path and the system's reason.
    """
    try:
        yield
    except OSError as error:
        cure = next((text for numbers, text in _CURES if error.errno in numbers), "look at the disk")
        raise HardwareError(
            "H003",
            f"cannot {verb} {path}: {error.strerror or error}",
            where=str(error.filename or path),
            try_=f"{cure}, or choose another place with {named_by}" if verb == "write" else cure,
        ) from error


def demand_writable(folder: Path) -> None:
    """Fail before long work rather than after it; makes the folder.

    Raises:
        HardwareError: H003, with the path and the system's reason.
    """
    with explained_write(folder):
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe.{os.getpid()}.tmp"
        probe.touch()
        probe.unlink()


def lack_of(path: Path) -> str:
    """Why a file or folder that a user names cannot be had: "does not exist" or "cannot be read: ..."; empty where it is there."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return "does not exist"
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    return ""


def plain_path(path: Path) -> Path:
    """The same file or folder under a name that is UTF-8: libraries written in C++ and Rust take no other.

    Where the name is not, a link in a temporary folder, which goes with this process.
    """
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError:
        place = os.path.abspath(path)
        suffix = path.suffix if path.suffix.isascii() else ""
        link = Path(_links().name) / (hashlib.sha256(os.fsencode(place)).hexdigest()[:16] + suffix)
        if not link.is_symlink():
            link.symlink_to(place)
        return link
    return path


@cache
def _links() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="imgcls-")


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Call `write` on a new file beside `path`, sync it, and rename it into place.

    Going through a file object in the target directory keeps the system's error number (a full disk says so) and makes
    the rename atomic, which it is not across file systems.

    Raises:
        HardwareError: H003; the old file, if any, is untouched and no temporary file is left.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with explained_write(path):
        try:
            temporary.unlink(missing_ok=True)  # of a killed process with this number, or a link that somebody put there
            with open(temporary, "xb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_directory(path.parent)


def copy_whole(source: Path, place: Path) -> None:
    """Copy a file, or a folder that is not there yet, so that readers see all of it or nothing.

    Raises:
        HardwareError: H003 when the disk refuses, or the folder exists.
    """
    if source.is_file():
        with open(source, "rb") as file:
            write_whole(place, lambda target: shutil.copyfileobj(file, target))
        return
    temporary = place.with_name(f".{place.name}.{os.getpid()}.tmp")
    with explained_write(place):
        try:
            shutil.copytree(source, temporary)
            os.rename(temporary, place)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text so that readers see the old file or the new one, never half of it.

    File names that are not UTF-8 keep their bytes (surrogateescape).
    """
    write_whole(path, lambda file: file.write(text.encode("utf-8", "surrogateescape")) and None)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, whole."""
    write_text(path, to_json(value, indent=2) + "\n")


def read_bounded(path: Path | str, limit: int, dir_fd: int | None = None) -> bytes:
    """Read a whole file that may be a stranger's: a regular file of at most `limit` bytes, never a pipe that blocks.

    Args:
        dir_fd: descriptor of the folder that a relative `path` is in.

    Raises:
        OSError: it cannot be read.
        ValueError: it is larger, or no regular file.
    """
    with _open_regular(path, dir_fd) as file:
        size = os.fstat(file.fileno()).st_size
        content = file.read(size + 1) if size <= limit else b""
        if size > limit or len(content) > limit:
            raise ValueError(f"{path} has {max(size, len(content)):,} bytes; at most {limit:,} are read")
        return content


def read_end(path: Path | str, limit: int) -> bytes:
    """Read the last `limit` bytes of a file, as `read_bounded`; the first line may be half a line then."""
    with _open_regular(path) as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - limit))
        return file.read(limit)


def read_start(path: Path | str, limit: int) -> bytes:
    """Read the first `limit` bytes of a file, as `read_bounded`."""
    with _open_regular(path) as file:
        return file.read(limit)


def _open_regular(path: Path | str, dir_fd: int | None = None) -> BinaryIO:
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=dir_fd)
    file = open(handle, "rb")  # noqa: SIM115 - the caller closes it
    mode = os.fstat(file.fileno()).st_mode
    if stat.S_ISREG(mode):
        return file
    file.close()
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise ValueError(f"{path} is a pipe or a device, not a file")


def parse_json(content: bytes | str) -> Any:
    """Parse JSON that may be a stranger's. Bytes that are not UTF-8 become surrogate escapes, as `write_text` wrote them.

    Raises:
        ValueError: not JSON (with line and column), a key twice in one object, or nesting deeper than 64.
    """
    text = content.decode("utf-8", "surrogateescape") if isinstance(content, bytes) else content
    if text.count("[") + text.count("{") > _JSON_DEPTH:
        _check_depth(text)
    return json.loads(text, object_pairs_hook=_unique)


def read_json(path: Path, limit: int = JSON_BYTES) -> Any:
    """Read a JSON file within its bounds (`read_bounded`, `parse_json`).

    Raises:
        OSError: it cannot be read.
        ValueError: it is too large, or not JSON.
    """
    return parse_json(read_bounded(path, limit))


def _check_depth(text: str) -> None:
    depth = 0
    for found in re.finditer(r'"(?:[^"\\]|\\.)*+"|[\[\]{}]', text):
        if found[0] in "[{":
            depth += 1
            if depth > _JSON_DEPTH:
                raise ValueError(f"nested more than {_JSON_DEPTH} levels deep: {_place(text, found.start())}")
        elif found[0] in "]}":
            depth -= 1


def _place(text: str, at: int) -> str:
    line = text.count("\n", 0, at) + 1
    return f"line {line} column {at - text.rfind(chr(10), 0, at)}"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:60]!r} stands twice in one object")
    return made


def write_sealed(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON object with a SHA-256 of its own content under the key "seal", whole."""
    write_json(path, {**value, SEAL: sha256_json(json.loads(json.dumps(value)))})


def read_sealed(path: Path, limit: int = JSON_BYTES) -> dict[str, Any]:
    """Read what `write_sealed` wrote, without the seal. Files from before there were seals are read unchecked.

    Raises:
        OSError: it cannot be read.
        ValueError: it is too large, not a JSON object, or not what was written.
    """
    value = read_json(path, limit)
    if not isinstance(value, dict):
        raise ValueError(f"{path} is not an object")
    seal = value.pop(SEAL, None)
    if (seal is None and _seal_elsewhere(value)) or (seal is not None and seal != sha256_json(value)):
        raise ValueError(f"{path} is damaged: its content does not have the SHA-256 that it was sealed with")
    return value


def _seal_elsewhere(value: dict[str, Any]) -> bool:
    """Whether the digest of all else stands under another key: the word "seal" itself was damaged."""
    named = [key for key, inner in value.items() if isinstance(inner, str) and len(inner) == 64]
    return any(value[key] == sha256_json({k: v for k, v in value.items() if k != key}) for key in named)


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, as 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """SHA-256 of a JSON value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode("utf-8")).hexdigest()
