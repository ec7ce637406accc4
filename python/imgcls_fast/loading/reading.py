"""Reads the files of coming batches in threads, and sorts out what DALI may decode. Imports nothing of DALI.

DALI cannot skip a bad image: one undecodable file makes the whole pipeline invalid (NVIDIA/DALI issue 3913), and some
end the process. So what DALI gets are bytes that were proven well-formed (`proof.py`) and of the size that the scan saw.
All else is decoded by Pillow in the same threads, which also finds out what is bad.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import sha256

import numpy as np

from ..core.errors import DataError
from ..data import reach
from ..data.decode import Undecodable
from ..data.proof import JPEG, PNG, PNG_START, prove
from .backend import decode_row, read_row
from .sampler import Request, Sampler


@dataclass
class Work:
    """One batch on its way: first its files are read (and some decoded) by threads, then DALI decodes the rest."""

    request: Request
    jobs: dict[int, Future[bytes | np.ndarray | str]]  # position -> for DALI, pixels by Pillow, or why it is bad
    made: dict[int, np.ndarray] = field(default_factory=dict)  # position -> pixels by Pillow
    failed: dict[int, str] = field(default_factory=dict)  # position -> why it is bad
    error: DataError | None = None  # a file that cannot be reached
    given_up: float = math.inf  # when that was found

    @property
    def place(self) -> tuple[int, int]:
        """(epoch, index) of the batch."""
        return self.request.epoch, self.request.index

    def encoded(self) -> dict[int, bytes]:
        """Wait for the threads and sort what they made, until a file is given up: position -> what DALI decodes."""
        found: dict[int, bytes] = {}
        for position, job in self.jobs.items():
            try:
                answer = job.result()
            except DataError as error:
                self.error, self.given_up = error, time.monotonic()
                self.cancel()
                break
            if isinstance(answer, bytes):
                found[position] = answer
            elif isinstance(answer, str):
                self.failed[position] = answer
            else:
                self.made[position] = answer
        self.jobs = {}
        return found

    def cancel(self) -> None:
        """Drop the files that no thread has begun with."""
        for job in self.jobs.values():
            job.cancel()


class Reader:
    """Keeps threads one batch ahead of the pipeline that takes the batches.

    Args:
        sampler: order of the batches.
        threads: files read at a time.
        bad: rows known to be bad; a view of what the loader has found so far.
        once: nothing is read behind the end of an epoch.
    """

    def __init__(self, sampler: Sampler, threads: int, bad: Collection[int], *, once: bool) -> None:
        self.sampler, self._threads, self._bad, self._once = sampler, threads, bad, once
        self.patience = reach.Patience()
        self.refused: set[int] = set()  # rows that DALI refuses; a new loader finds them again, at the cost of one rebuild
        self._flagged = sampler.needs_pillow(np.arange(len(sampler.manifest)))
        self._pool: ThreadPoolExecutor | None = None  # begun with the first batch, and ended by `close`
        self._waiting: deque[Work] = deque()  # at the threads
        self._next = (0, 0)  # what the threads get next

    def start(self, place: tuple[int, int]) -> None:
        """Forget what is on its way, and begin to read at batch (epoch, index)."""
        self.forget()
        self._next = place
        self._read_on()

    def take(self) -> Work | None:
        """Return the batch whose turn it is, perhaps still being read, and begin the one after it; None at the end."""
        if not self._waiting:
            return None
        work = self._waiting.popleft()
        self._read_on()
        return work

    def forget(self) -> None:
        """Drop what has not been taken."""
        for work in self._waiting:
            work.cancel()
        self._waiting.clear()

    def close(self) -> None:
        """End the threads."""
        self.forget()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    def content(self, row: int) -> bytes:
        """Read the file of a row.

        Raises:
            Undecodable: what is there is no image file.
            DataError: D015 when it cannot be reached.
        """
        return read_row(self.sampler, row, self.patience)

    def is_for_dali(self, row: int, content: bytes) -> bool:
        """Whether DALI decodes these bytes safely, and as Pillow would."""
        if self._flagged[row] or row in self.refused:
            return False
        manifest = self.sampler.manifest
        if content.startswith(PNG_START) and sha256(content).digest()[:16] == manifest.digest[row].tobytes():
            return True  # the scan has proven these bytes; to inflate them again costs as much as to decode them
        found = prove(content)
        # a file exchanged for one of another size would be cropped by the old one's numbers
        same = (found.width, found.height) == (manifest.width[row], manifest.height[row])
        same &= found.orientation == manifest.orientation[row]
        return found.kind in (JPEG, PNG) and found.sound and found.whole and same

    def _read_on(self) -> None:
        """Hand the next batch to the threads."""
        epoch, index = self._next
        if index >= self.sampler.steps:
            if self._once:
                return
            epoch, index = (epoch + 1 if self.sampler.training else 0), 0
        self._next = (epoch, index + 1)
        request = self.sampler.request(epoch, index, self._bad)
        self._pool = self._pool or ThreadPoolExecutor(self._threads, "images")
        positions = np.flatnonzero(request.rows >= 0).tolist()
        self._waiting.append(Work(request, {k: self._pool.submit(self._read, request, k) for k in positions}))

    def _read(self, request: Request, position: int) -> bytes | np.ndarray | str:
        """Read one file: its bytes when DALI may have them, else its pixels by Pillow, or why it is bad."""
        row = int(request.rows[position])
        try:
            content = self.content(row)
            if self.is_for_dali(row, content):
                return content
            return decode_row(self.sampler, request, position, content)
        except Undecodable as error:
            return error.reason
