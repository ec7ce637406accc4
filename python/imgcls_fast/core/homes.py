"""Folders of a user who has no home, or whose home cannot be written: as in containers that run under any number."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from .errors import HardwareError

_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.ENOTSUP, errno.ENOSYS}

_USUAL = ("/tmp", "/var/tmp")


def home(variables: Mapping[str, str]) -> Path | None:
    """The user's home folder; None where neither HOME nor the list of users names one."""
    try:
        found = Path(variables["HOME"]) if "HOME" in variables else Path.home()
    except RuntimeError:
        return None
    return found if found.is_absolute() else None


@cache
def is_writable(folder: Path) -> bool:
    """Whether a folder takes files, or can be made; tried with a folder that goes at once. A full disk counts as writable."""
    existing = next(place for place in (folder, *folder.parents) if os.path.lexists(place))
    try:
        probe = existing / f".imgcls-fast-{os.getpid()}"
        probe.mkdir(mode=0o700)
        probe.rmdir()
    except OSError as error:
        return error.errno not in _REFUSED
    return True


def _anybodys(place: Path) -> bool:
    """Whether others may rename what this user makes in a folder: all may write there, and it is not sticky as /tmp is."""
    mode = place.stat().st_mode
    return bool(mode & stat.S_IWOTH) and not mode & stat.S_ISVTX


def below_temporary(variables: Mapping[str, str]) -> Path:
    """A folder of this user alone below $TMPDIR, /tmp or /var/tmp, made where it is not there yet.

    Raises:
        HardwareError: H003 when none can be written, or the name is taken by somebody else's folder, a link, or one that others may open.
    """
    places = [Path(name) for name in (variables.get("TMPDIR", ""), *_USUAL) if os.path.isabs(name)]
    parent = next((place for place in places if os.path.isdir(place) and not _anybodys(place) and is_writable(place)), None)
    cure = "set IMGCLS_CACHE to a folder that you can write"
    if parent is None:
        tried = ", ".join(map(str, dict.fromkeys(places)))
        raise HardwareError("H003", f"no folder for cached files: no home that can be written, nor {tried}", try_=cure)
    folder = parent / f"imgcls-fast-{os.geteuid()}"
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        pass
    except OSError as error:
        raise HardwareError("H003", f"cannot make {folder}: {error.strerror or error}", try_=cure) from error
    facts = folder.lstat()
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.geteuid() or facts.st_mode & 0o077:
        kind = (
            "a link"
            if stat.S_ISLNK(facts.st_mode)
            else f"mode {stat.S_IMODE(facts.st_mode):03o} of user {facts.st_uid}"
        )
        raise HardwareError(
            "H003", f"{folder} is not a folder of this user alone ({kind}), so nothing is kept there", try_=cure
        )
    return folder
