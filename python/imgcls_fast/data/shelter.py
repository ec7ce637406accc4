"""Decodes in a child process what might take this process with it: a crash, a hang or a bomb becomes a reason.

Pillow's own code and libjpeg decode here, whatever the file. A WebP whose container is not well-formed and a TIFF that
libtiff has to expand go to a child, which lives on for the next one. It takes the bytes, not a name, so a file that is
exchanged in the meantime changes nothing. Each thread that decodes at the same time gets a child of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import struct
import subprocess
import threading
import time
import weakref
from subprocess import PIPE
from typing import Any

import numpy as np

from ..core import child
from ..core.image_bounds import is_odd

TIMEOUT_S = 30.0  # for one image
START_S = 60.0  # more for the first one of a child: its imports, on a busy machine
MEMORY_MB = 4096  # address space of a child
# of a child: OpenBLAS reserves 41 MB of address space a thread when numpy is imported, gigabytes on a machine with many cores
ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
HEAD = struct.Struct(">IQ")  # bytes of the words, bytes of the file or of the pixels
_inside = False  # this process is such a child, and decodes itself


class Fate(Exception):
    """Raised with the cause of a child's death, or with the reason that it gave.

    Args:
        reason: a short plain sentence.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def is_needed(kind: str, content: bytes) -> bool:
    """Whether to decode this file in a child; False in a child."""
    return not _inside and is_odd(kind, content)


def enter() -> None:
    """Make this process decode everything itself from now on: it is a child that may die."""
    global _inside
    _inside = True


def decode(content: bytes, color: str, exif: str, max_megapixels: float, bits: int) -> tuple[np.ndarray, int]:
    """Run `decode.decode_bytes` in a child: pixels (H, W, C) uint8, and the orientation as tagged.

    Raises:
        Fate: the reason why there are none.
    """
    return _shelter().decode(content, {"color": color, "exif": exif, "max_megapixels": max_megapixels, "bits": bits})


class _Shelter:
    """The children of one process, as many as ever decoded at the same time."""

    def __init__(self) -> None:
        self._idle: list[_Child] = []
        self._lock = threading.Lock()

    def decode(self, content: bytes, words: dict[str, Any]) -> tuple[np.ndarray, int]:
        with self._lock:
            one = self._idle.pop() if self._idle else None
        one = one or _Child()
        try:
            answer = one.ask(content, words)
        except BaseException:
            one.end()
            raise
        with self._lock:
            self._idle.append(one)
        if "reason" in answer:
            raise Fate(answer["reason"])
        return answer["pixels"], answer["orientation"]


class _Child:
    def __init__(self) -> None:
        self.process = child.start(
            "data.sheltered", str(MEMORY_MB), variables=ONE_THREAD, stdin=PIPE, stdout=PIPE, stderr=subprocess.DEVNULL
        )
        self._end = weakref.finalize(self, _end, self.process, os.getpid())
        self._allowance = TIMEOUT_S + START_S

    def end(self) -> None:
        self._end()

    def ask(self, content: bytes, words: dict[str, Any]) -> dict[str, Any]:
        """Return the answer to one file, as `sheltered.py` makes it.

        Raises:
            Fate: the child died or was ended.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        deadline, self._allowance = time.monotonic() + self._allowance, TIMEOUT_S
        head = json.dumps(words).encode()
        writer = threading.Thread(
            target=_write, args=(self.process.stdin, HEAD.pack(len(head), len(content)), head, content)
        )
        writer.start()
        try:
            words_bytes, pixel_bytes = HEAD.unpack(self._read(HEAD.size, deadline))
            answer: dict[str, Any] = json.loads(self._read(words_bytes, deadline))
            if pixel_bytes:
                flat = np.frombuffer(self._read(pixel_bytes, deadline), np.uint8)
                answer["pixels"] = flat.reshape(answer["shape"])
        except BaseException:
            self.process.kill()  # the writer may wait for a child that does not read
            raise
        finally:
            writer.join()
        return answer

    def _read(self, size: int, deadline: float) -> bytearray:
        out, place = bytearray(size), 0
        view = memoryview(out)
        descriptor = self.process.stdout.fileno()  # type: ignore[union-attr]
        with selectors.DefaultSelector() as selector:
            selector.register(descriptor, selectors.EVENT_READ)
            while place < size:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise Fate(f"decoder hung: no answer in {TIMEOUT_S:g} s")
                count = os.readv(descriptor, [view[place:]])
                if count == 0:
                    raise Fate(f"decoder crashed ({cause_of_death(self.process.wait())})")
                place += count
        return out


def cause_of_death(code: int) -> str:
    """Put the return code of a child that ended into words."""
    try:
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"
    except ValueError:
        return f"signal {-code}"


def _write(file: Any, *parts: bytes) -> None:
    with contextlib.suppress(BrokenPipeError, ValueError):  # the reader finds out how it died
        for part in parts:
            file.write(part)
        file.flush()


def _end(process: subprocess.Popen[bytes], owner: int) -> None:
    if os.getpid() != owner:  # a fork: the child is its parent's
        return
    process.kill()
    process.wait()
    for file in (process.stdin, process.stdout):
        if file is not None:
            with contextlib.suppress(OSError):
                file.close()


_shelters: dict[int, _Shelter] = {}  # by process: a fork must not talk to the children of its parent


def _shelter() -> _Shelter:
    return _shelters.setdefault(os.getpid(), _Shelter())


def limit_this_process(memory_mb: int) -> None:
    """Bound the address space, and write no core file."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (memory_mb << 20, memory_mb << 20))
    except (ImportError, ValueError, OSError):
        pass  # no such limits here: the time limit and the process border remain
