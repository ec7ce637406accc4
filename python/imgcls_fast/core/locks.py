"""Locks that end with their process, however it ends; and what replaces them on a file system that has none.

`flock` answers EWOULDBLOCK where another process holds the lock. Any other answer (ENOSYS on Lustre without `-o flock`, ENOLCK on NFS
without its lock daemon, EOPNOTSUPP on some FUSE mounts) means that there are no locks here. The file itself then tells who writes:
its first line names process and host, its second when that process began.
"""

from __future__ import annotations

import fcntl
import os
import platform
import time
import weakref
from pathlib import Path
from typing import IO

_PATIENCE_S = 1.0  # a worker that was just forked by a killed owner lets go as soon as it first runs
_RECENT_S = 60.0  # a process of another host that has written within it is taken to be alive


class Taken(Exception):
    """Another process holds the lock; the text names it."""


class Lock:
    """A held lock.

    Attributes:
        caution: why a second writer may go unnoticed; empty where the file system has locks.
    """

    def __init__(self, file: IO[str], caution: str) -> None:
        self._file, self.caution = file, caution
        held = weakref.ref(file)
        # a forked loader worker outlives a killed parent by seconds, and would hold the lock that it inherited
        os.register_at_fork(after_in_child=lambda: _close(held()))

    def release(self) -> None:
        """Let others in."""
        if self.caution and not self._file.closed:
            self._file.truncate(0)
        self._file.close()


def take(path: Path) -> Lock:
    """Lock a file, made where it is not there yet.

    Raises:
        Taken: by another process, or by another lock of this one.
        OSError: the file cannot be opened or written.
    """
    file = open(path, "a+", encoding="utf-8", errors="replace")  # noqa: SIM115 - held open: it is the lock
    try:
        caution = _lock_soon(file)
        file.seek(0)
        owner = file.read(1000)
        if caution and (reason := _still_writing(owner, path)):
            raise Taken(reason)
        file.truncate(0)
        file.write(f"pid {os.getpid()} on {platform.node()}\nbegan {_began(os.getpid())}\n")
        file.flush()
    except BlockingIOError as error:
        file.seek(0)
        owner = file.read(1000).partition("\n")[0].strip()
        file.close()
        raise Taken(owner or "unknown") from error
    except BaseException:
        file.close()
        raise
    return Lock(file, caution)


def is_taken(path: Path) -> bool:
    """Whether somebody holds the lock; looks, and changes nothing."""
    try:
        with open(path, encoding="utf-8", errors="replace", opener=_without_waiting) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return False
            except BlockingIOError:
                return True
            except OSError:  # no locks here
                return bool(_still_writing(file.read(1000), path))
    except OSError:
        return False


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a pipe in a stranger's run would be waited for


def lock_descriptor(descriptor: int, *, wait: bool) -> bool:
    """Lock an open file or folder until it is closed; whether the file system has locks.

    Raises:
        BlockingIOError: it is taken, and `wait` is false.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True


def _lock_soon(file: IO[str]) -> str:
    """Lock; returns an empty text, or why there are no locks here."""
    give_up = time.monotonic() + _PATIENCE_S
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return ""
        except BlockingIOError:
            if time.monotonic() > give_up:
                raise
            time.sleep(0.02)
        except OSError as error:
            folder = Path(file.name).parent
            return (
                f"the file system of {folder} has no locks ({error.strerror}): "
                "take care that no second process writes this run at the same time"
            )


def _still_writing(owner: str, path: Path) -> str:
    """Who wrote the lock file, where it seems to be alive; else an empty text."""
    first, _, rest = owner.partition("\n")
    word, _, host = first.partition(" on ")
    number = word.removeprefix("pid ")
    if not (word.startswith("pid ") and number.isdecimal()):
        return ""
    if host in ("", platform.node()):
        began = rest.strip().removeprefix("began").strip()
        alive = _is_alive(int(number), began)
        if host or not alive:
            return first if alive else ""
        # an earlier version named no host: this number may be another process here, as 1 always is
    silent = _silent_s(path.parent)
    return f"{first}, which wrote {silent:.0f} s ago" if silent < _RECENT_S else ""


def _is_alive(number: int, began: str) -> bool:
    """Whether this process is there, and not another one that has got its number since."""
    if began and (now := _began(number)):
        return now == began
    try:
        os.kill(number, 0)
    except PermissionError:
        return True
    except (OSError, OverflowError):
        return False
    return True


def _began(number: int) -> str:
    """When a process of this host began, in ticks since the machine did; empty where the system does not tell."""
    try:
        with open(f"/proc/{number}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[19].decode("ascii")
    except (OSError, IndexError, ValueError):
        return ""


def _silent_s(folder: Path) -> float:
    """Seconds since a run's log was written last."""
    newest = 0.0
    for name in (".lock", "events.jsonl", "log.txt"):
        try:
            newest = max(newest, os.stat(folder / name).st_mtime)
        except OSError:
            continue
    return abs(time.time() - newest)


def _close(file: IO[str] | None) -> None:
    if file is not None:
        file.close()
