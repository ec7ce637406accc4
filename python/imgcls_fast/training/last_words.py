"""Runs a process beside training that reports how it died: by SIGSEGV, SIGBUS, SIGABRT, SIGKILL or without memory.

A process that dies by a signal runs none of its own code any more. Python's fault handler writes the reason into a pipe,
and a watcher (this file as a program: standard library only, 10 MB) reads it to its end. Unless the last words are that
work ended in order, it appends the reason to log.txt, a `failed` event to events.jsonl, and prints an error with the
command that continues the run. As a process of its own it also reports SIGKILL, which nobody can catch.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import json
import os
import re
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

_ORDERLY = b"\nin order\n"
_PATIENCE_S = 10.0  # for the watcher's end
_MOST_BYTES = 1 << 18  # of a traceback of all threads
_pipes: weakref.WeakSet[IO[bytes]] = weakref.WeakSet()  # to watchers
_SIGNALS = {
    "Segmentation fault": "SIGSEGV",
    "Bus error": "SIGBUS",
    "Aborted": "SIGABRT",
    "Illegal instruction": "SIGILL",
    "Floating-point exception": "SIGFPE",
    "Floating point exception": "SIGFPE",
}


@contextlib.contextmanager
def watched(directory: Path, command: str) -> Iterator[None]:
    """Report, while entered, the death of this process in the run's log and on stderr.

    A fault handler that the caller has enabled is left alone: it then writes to the caller's file, and the watcher
    reports the death without its signal.

    Args:
        directory: where the run is.
        command: continues the run.
    """
    watcher = _start([os.path.abspath(directory), command])
    if watcher is None or watcher.stdin is None:
        yield
        return
    pipe, own = watcher.stdin, not faulthandler.is_enabled()
    _forget_in_forks()
    _pipes.add(pipe)
    if own:
        faulthandler.enable(pipe)
    try:
        yield
    finally:
        if own:
            faulthandler.disable()
        with contextlib.suppress(OSError):  # the watcher may have been killed
            pipe.write(_ORDERLY)
            pipe.flush()
        with contextlib.suppress(OSError):
            pipe.close()
        try:
            watcher.wait(timeout=_PATIENCE_S)
        except subprocess.TimeoutExpired:
            watcher.kill()
            watcher.wait()


def _start(words: list[str]) -> subprocess.Popen[bytes] | None:
    """Start the watcher, out of reach of signals to this process's group; None where no process can be started."""
    try:
        from ..core import child  # not above: as a program this file is no part of the package

        return child.start_alone(
            os.path.abspath(__file__),
            *words,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            bufsize=0,
            start_new_session=True,
            cwd="/",
        )
    except OSError:
        return None


@functools.cache
def _forget_in_forks() -> None:
    """Register once per process, since Python keeps such a callback for ever.

    A forked loader worker lives longer than a killed parent, and would keep the pipe open.
    """
    os.register_at_fork(after_in_child=_forget)


def _forget() -> None:
    for pipe in list(_pipes):
        if not pipe.closed:
            faulthandler.disable()
            pipe.close()


def main(words: Sequence[str], stream: IO[bytes]) -> None:
    """Run the watcher: read until work ended in order, or until every writer is gone, and then report."""
    directory, command = words
    victims, told = _killed_for_memory(), b""
    while piece := os.read(stream.fileno(), 65536):
        told = (told + piece)[-_MOST_BYTES:]
        if told.endswith(_ORDERLY):  # no waiting for the end: a process that a C library forked may hold the pipe open
            return
    reason, trace = explain(told.decode("utf-8", "replace"), for_memory=_killed_for_memory() > victims)
    text = f"the training process died: {reason}"
    stamp = time.strftime("%Y-%m-%d %H:%M:%S")
    lines = [f"failed: error[X001]: {text}", f"continue with: {command}", *trace]
    with contextlib.suppress(OSError):
        with open(os.path.join(directory, "log.txt"), "ab") as log:
            log.write("".join(f"{stamp}  {_shown(line)}\n" for line in lines).encode("utf-8"))
        event = {"time": round(time.time(), 3), "event": "failed", "code": "X001", "message": text, "command": command}
        with open(os.path.join(directory, "events.jsonl"), "ab") as events:
            events.write((json.dumps(event) + "\n").encode("utf-8"))
    where = os.path.join(directory, "log.txt")
    message = f"error[X001]: {text}\n  where: {_shown(where)}\n  try:   {_shown(command)}\n"
    with contextlib.suppress(OSError):
        os.write(2, message.encode("utf-8"))


def _shown(text: str) -> str:
    """Do what `core.text.printable` does, which this file as a program cannot import."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def explain(told: str, *, for_memory: bool) -> tuple[str, list[str]]:
    """Return why a process died, and the traceback, from what its fault handler wrote."""
    found = re.search(r"Fatal Python error: ([^\n]+)", told)
    if found is None:
        if for_memory:
            return "the system killed it because memory ran out (SIGKILL)", []
        return "killed without a word (SIGKILL, or another signal that ends a process at once)", []
    name = _SIGNALS.get(found[1].strip())
    return f"{name} ({found[1].strip().lower()})" if name else found[1].strip(), told[found.start() :].splitlines()


def _killed_for_memory() -> int:
    """Return how many processes the kernel has killed here because memory ran out."""
    for path in ("/sys/fs/cgroup/memory.events", "/proc/vmstat"):
        with contextlib.suppress(OSError, ValueError), open(path, encoding="ascii") as file:
            for line in file:
                if line.startswith("oom_kill "):
                    return int(line.split()[1])
    return 0


if __name__ == "__main__":
    main(sys.argv[1:], sys.stdin.buffer)
