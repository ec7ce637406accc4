"""Reads a file that ought to be there: a disk that is out of reach for a moment is not a bad image.

Network drives answer late, are remounted, or lose their server for seconds. So what the scan has seen is asked for
again, with growing waits. What stays out of reach is an error that stops the work (D015), and never a reason to leave
an image out: a bad image is one that can be read.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import math
import os
import stat
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from ..core.errors import DataError

WAITS_S: tuple[float, ...] = (0.25, 0.75, 2.0, 4.0, 6.0)  # seconds before the second, third, ... try: six tries in 13 s
QUIET_S = 30.0  # seconds between two warnings: a folder that is away concerns every file in it
SLICE_S = 0.2  # a wait ends so soon after it was called off
# no waiting brings a file under such a name
FAULTY_NAME = frozenset({errno.ENAMETOOLONG, errno.EINVAL, errno.ELOOP, errno.EILSEQ})
T = TypeVar("T")

_log = logging.getLogger("imgcls_fast")
_warned_at = -QUIET_S


class NotAFile(Exception):
    """Something that no waiting turns into a file with pixels: a folder, a pipe, an impossible name.

    Args:
        reason: a short plain sentence.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Patience:
    """How long files are waited for that are read together: all of them as long as one alone.

    An outage begins with the first fault, and whoever fails in it waits until its end, `sum(WAITS_S)` later. Then nothing is
    waited for any more, until a file comes back or no fault has been met for as long.

    Args:
        called_off: has a `value` that turns true when nothing shall be waited for; one that processes share, or of its own.
    """

    def __init__(self, called_off: Any = None) -> None:
        self._lock = threading.Lock()
        self._called_off = ctypes.c_byte(0) if called_off is None else called_off
        self._begin = self._last = -math.inf  # of the faults of this outage

    def call_off(self) -> None:
        """Wait for nothing from now on; a signal handler may call this."""
        self._called_off.value = 1

    def left(self, tried: float) -> float:
        """After a fault: the seconds that remain.

        Args:
            tried: when the try began that failed now; a disk may take long to fail.
        """
        now, whole = time.monotonic(), sum(WAITS_S)
        with self._lock:
            if tried - self._last > whole:
                self._begin = now
            self._last = now
            return 0.0 if self._called_off.value else self._begin + whole - now

    def waited(self) -> float:
        """Seconds for which this outage has been waited for."""
        with self._lock:
            return min(sum(WAITS_S), time.monotonic() - self._begin)

    def over(self) -> None:
        """What was out of reach is back."""
        with self._lock:
            self._begin = self._last = -math.inf

    def sleep(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0 and not self._called_off.value:
            time.sleep(min(left, SLICE_S))


def unreachable(path: Path | str, error: OSError, waited_s: float = 0.0, others: int = 0) -> DataError:
    """The error D015 for one file, and for so many others."""
    after = f" ({waited_s:.0f} s of trying)" if waited_s >= 1 else ""
    more = f" and {others:,} other file{'s' * (others != 1)}" if others else ""
    return DataError(
        "D015",
        f"{os.fspath(path)}{more} cannot be reached: {error.strerror or error}{after}",
        where=os.fspath(path),
        why="the disk or the network is at fault, not the image: nothing was left out on account of it",
        try_="bring the files back and repeat the command (training goes on by: imgcls-fast train --resume)",
    )


def with_file(
    path: Path | str,
    work: Callable[[BinaryIO], T],
    *,
    seen: bool = True,
    waits: Sequence[float] | None = None,
    patience: Patience | None = None,
) -> T:
    """`work(file)` of a file opened for reading; from the beginning again after each fault of the disk.

    Args:
        path: the file.
        work: reads; an OSError without an error number is its own, and passes.
        seen: the file was there before. Else a missing one is an error at once.
        waits: seconds before each further try; None: `WAITS_S`.
        patience: shared with other files.

    Raises:
        DataError: D015 when the file stays out of reach.
        FileNotFoundError, NotADirectoryError: it is missing and was never seen.
        NotAFile: what is there cannot be read as a file.
    """
    begin = time.monotonic()
    left = iter(WAITS_S if waits is None else waits)
    patience, wait = patience or Patience(), None
    while True:
        tried = time.monotonic()
        try:
            with _open(path) as file:
                found = work(file)
            if wait is not None:
                patience.over()
            return found
        except OSError as error:
            if error.errno is None:
                raise
            if error.errno in FAULTY_NAME or error.errno == errno.EISDIR:
                raise NotAFile(f"cannot be opened: {error.strerror}") from error
            if error.errno in (errno.ENOENT, errno.ENOTDIR) and not seen:
                raise
            wait, most = next(left, None), patience.left(tried)
            if wait is None or most <= 0:
                raise unreachable(path, error, max(time.monotonic() - begin, patience.waited())) from error
            _warn(path, error)
        patience.sleep(min(wait, most))


def read(path: Path | str, *, seen: bool = True, most: int | None = None, patience: Patience | None = None) -> bytes:
    """All bytes of a file.

    Args:
        path, seen, patience: as in `with_file`.
        most: bytes; a larger file is not read.

    Raises:
        as `with_file`; NotAFile also for a file that is too large.
    """

    def work(file: BinaryIO) -> bytes:
        size = os.fstat(file.fileno()).st_size
        if most is not None and size > most:
            raise NotAFile(f"too large: {size:,} bytes, the limit is {most:,}")
        return file.read()

    return with_file(path, work, seen=seen, patience=patience)


def _open(path: Path | str) -> BinaryIO:
    try:
        # without O_NONBLOCK a pipe among the files would wait for a writer for ever
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0))
    except ValueError as error:  # a NUL in the name
        raise NotAFile(f"cannot be opened: {error}") from error
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise NotAFile("cannot be opened: Is a directory")
        if not stat.S_ISREG(mode):
            raise NotAFile("not a regular file")
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def _warn(path: Path | str, error: OSError) -> None:
    global _warned_at
    now = time.monotonic()
    if now - _warned_at >= QUIET_S:
        _warned_at = now
        _log.warning("%s cannot be reached (%s): trying again for %.0f s", path, error.strerror, sum(WAITS_S))
