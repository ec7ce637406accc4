"""Brings batches from a decoding process to this one: through shared memory, else through a pipe, else without such a process.

Shared memory is quickest and, in a container, small: Docker gives /dev/shm 64 MB. A worker that finds it full in the thread that
feeds the queue prints a traceback and drops the batch, for which this process would then wait for ever. So the room is
checked before, batches are put there where a failure can be reported, and whatever still goes wrong in that thread ends the
worker with a reason.
"""

from __future__ import annotations

import ctypes
import errno
import multiprocessing
import os
import re
from multiprocessing import queues
from multiprocessing.sharedctypes import RawArray, RawValue
from pathlib import Path
from typing import Any, Literal

import torch

from ..core.batch import Batch

Way = Literal["shared", "pipes", "threads"]
SHARED_MEMORY = Path("/dev/shm")
AHEAD = 2  # batches that each worker prepares
_BESIDE = 2  # batches that this process holds: the one in work and the next
_NO_SHARING = re.compile(
    r"shared memory|\bshm|ancdata|ulimit|bus error|no space left|too many open files", re.IGNORECASE
)
_PINNING = re.compile(r"^(Caught \w+ in )?pin memory thread", re.IGNORECASE)  # where there is a GPU, torch receives batches in this thread
_FAREWELL = 70  # exit code of a worker that could not hand over a batch
_LONGEST = 300  # bytes of its reason


def free_bytes() -> int | None:
    """Return the bytes that are free in shared memory; None where it has no size of its own, 0 where there is none."""
    try:
        facts = os.statvfs(SHARED_MEMORY)
    except OSError:
        return 0
    return facts.f_bavail * facts.f_frsize if facts.f_blocks else None


def bytes_needed(batch_size: int, size: int, channels: int, workers: int) -> int:
    """Return the shared memory that loading may take: the pixels of all batches that are ready or in work."""
    return batch_size * size * size * channels * (workers * AHEAD + _BESIDE)


def shortage(needed: int) -> str:
    """Describe what is wrong with shared memory for so many bytes; empty where nothing is."""
    free = free_bytes()
    if free is None or free >= needed:
        return ""
    if not SHARED_MEMORY.is_dir():
        return f"there is no {SHARED_MEMORY}"
    return f"{SHARED_MEMORY} has {free / 1e6:.0f} MB free, too little for decoding processes"


def choose_way(batch_size: int, size: int, channels: int, workers: int) -> tuple[Way, str]:
    """Choose how batches come; with the reason where it is not through shared memory."""
    if not workers:
        return "threads", ""
    lack = shortage(bytes_needed(batch_size, size, channels, workers))
    if not lack:
        return "shared", ""
    try:
        multiprocessing.Lock()  # a semaphore takes a page of the same memory
    except OSError as error:
        return "threads", f"{lack}, not even for a lock ({error.strerror})"
    return "pipes", lack


def consequence(way: Way, reason: str) -> str:
    """Write one line for the user: what happened, what is done instead, and how to mend it."""
    instead = {
        "pipes": "batches go through pipes, which takes longer",
        "threads": "images are decoded in threads of this process",
        "shared": "",
    }[way]
    cure = "allow more open files (ulimit -n 4096)" if re.search("open files|ancdata", reason) else "start the container with --shm-size 1g"
    return f"{reason}: {instead}; {cure}, or use --loader dali-cpu"


def is_failed_sharing(text: str) -> bool:
    """Whether an error of a loader is about shared memory or open files, and not about an image."""
    if not _PINNING.search(text):
        return not text.startswith("Caught ") and bool(_NO_SHARING.search(text))
    return not text.startswith("Caught ") or text.startswith("Caught OSError") or bool(_NO_SHARING.search(_last_line(text)))


def shortened(text: str) -> str:
    """Cut a failure that `is_failed_sharing` to one line: the last one of a traceback."""
    if _PINNING.search(text) and not text.startswith("Caught "):  # the thread printed its reason and is gone
        return "the thread that receives batches ended, as it does where too many open files or too little shared memory are left"
    return " ".join(_last_line(text).split() if text.startswith("Caught ") else text.split())[:200]


def _last_line(text: str) -> str:
    return text.strip().rpartition("\n")[2]


def hand_over(batch: Batch, way: Way) -> Batch | str:
    """Convert a finished batch in the worker as its way wants it; or return why it does not fit into shared memory."""
    values = (batch.pixels, batch.targets, batch.weight, batch.rows)
    if way == "pipes":
        return Batch(*(value.numpy() for value in values))
    if way == "shared":
        try:
            for value in values:
                value.share_memory_()
        except (RuntimeError, OSError) as error:
            return " ".join(str(error).split())[:_LONGEST]
    return batch


def received(batch: Batch, way: Way, *, pin: bool) -> Batch:
    """Convert a batch that came by `way` back to torch tensors, in this process."""
    if way != "pipes":
        return batch
    values = (batch.pixels, batch.targets, batch.weight, batch.rows)
    made = Batch(*map(torch.from_numpy, values))
    return made.pin_memory() if pin else made


def shared_values(way: Way) -> tuple[Any, Any]:
    """Return a flag that workers see, and room for the reason of a worker that has to end.

    Those of multiprocessing are in shared memory; without workers, and where there is no such memory, plain ones do.
    """
    if way == "threads":
        return ctypes.c_byte(0), ctypes.create_string_buffer(_LONGEST + 1)
    return RawValue("b", 0), RawArray("c", _LONGEST + 1)  # without locks, which a worker that dies would keep


def end_when_feeding_fails(room: Any) -> None:
    """Make this worker end with a reason where the thread that feeds the queue would lose a batch and go on."""

    def farewell(error: BaseException, lost: Any) -> None:
        room.value = f"{type(error).__name__}: {error}".encode("utf-8", "replace")[:_LONGEST]
        os._exit(_FAREWELL)

    queues.Queue._on_queue_feeder_error = staticmethod(farewell)  # type: ignore[attr-defined]


def reason_left(room: Any) -> str:
    """Take the reason that a worker left before it ended; an empty text where there is none."""
    text, room.value = bytes(room.value).decode("utf-8", "replace"), b""
    return text


def no_processes(error: OSError) -> str:
    """Describe why no decoding process could be started."""
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return "too many open files for decoding processes"
    return f"no decoding process can be started ({error.strerror or error})"
