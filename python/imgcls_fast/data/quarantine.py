"""Detects unreadable images safely, and lists them in quarantine.csv with a reason; none is substituted.

This is the one module of the data room that may catch every exception, around the decoding of one image: decoders
raise what they like on damaged files, and some crash or hang, for which there is a child process.
"""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import selectors
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from subprocess import PIPE
from typing import BinaryIO

from ..core import child
from ..core.bounds import QUARANTINE_BYTES
from ..core.errors import DataError
from ..core.files import explained_write, read_bounded, write_whole
from ..core.text import to_csv
from . import reach, shelter
from .decode import Undecodable, full_decode
from .store import FILES, Store, open_store


@dataclass(frozen=True)
class Verdict:
    """What became of one file; the size (pixels, as stored) and orientation are filled in when it is good."""

    ok: bool
    reason: str = ""
    width: int = 0
    height: int = 0
    orientation: int = 1
    unreachable: bool = False  # the disk is at fault, not the file: no verdict on it


@dataclass(frozen=True)
class BadFile:
    """One line of quarantine.csv."""

    path: str  # as in the manifest: relative to its root, or absolute
    reason: str
    split: str = ""
    label: str = ""
    size_bytes: int = 0
    found: str = "scan"  # "scan", or when it slipped through: "epoch 3"


def examine(path: Path | str, max_megapixels: float = 50.0, store: Store = FILES) -> Verdict:
    """Decode one file (or name in `store`) completely, in this process. Never raises on account of the file or its disk."""
    try:
        width, height, orientation = full_decode(path, max_megapixels=max_megapixels, store=store)
    except Undecodable as error:
        return Verdict(False, error.reason)
    except DataError as error:
        return Verdict(False, error.message, unreachable=True)
    except Exception as error:  # noqa: BLE001 (the place for it, see above)
        return Verdict(False, f"decoder failed: {type(error).__name__}: {error}")
    return Verdict(True, "", width, height, orientation)


def examine_isolated(
    paths: Sequence[Path | str],
    *,
    root: Path = Path(),
    max_megapixels: float = 50.0,
    timeout_s: float = 30.0,
    memory_mb: int = 4096,
    workers: int = 1,
) -> list[Verdict]:
    """Decode files in child processes, where a crash, a hang or a memory bomb is only a reason.

    Args:
        paths: the files, in any number, or names in the store of `root`; one child serves many until it dies.
        root: the manifest's root.
        timeout_s: seconds for one file.
        memory_mb: address space of a child, in MiB.
        workers: children at a time.

    Returns:
        One verdict per path, in order.
    """
    names = [os.fsencode(p) for p in paths]
    share = max(1, -(-len(names) // max(1, workers)))
    parts = [names[i : i + share] for i in range(0, len(names), share)]
    examiner = _Child(os.fsencode(root), max_megapixels, timeout_s, memory_mb)
    with ThreadPoolExecutor(max(1, len(parts))) as pool:
        return [verdict for part in pool.map(examiner.examine_all, parts) for verdict in part]


@dataclass(frozen=True)
class _Child:
    root: bytes
    max_megapixels: float
    timeout_s: float
    memory_mb: int

    def examine_all(self, names: list[bytes]) -> list[Verdict]:
        verdicts: list[Verdict] = []
        while len(verdicts) < len(names):
            got, fate = self._examine_until_death(names[len(verdicts) :])
            verdicts += got
            if fate:  # the file that the child was at when it died
                verdicts.append(Verdict(False, fate))
        return verdicts

    def _examine_until_death(self, names: list[bytes]) -> tuple[list[Verdict], str]:
        """Verdicts until all are done (fate "") or the child died of the next file (fate: the reason)."""
        limits = str(self.max_megapixels), str(self.memory_mb)
        process = child.start(
            "data.quarantine", *limits, variables=shelter.ONE_THREAD, stdin=PIPE, stdout=PIPE, stderr=subprocess.DEVNULL
        )
        assert process.stdin is not None and process.stdout is not None
        try:
            _feed(process, b"\0".join([self.root, *names]))
            verdicts, hung = self._collect(process, len(names))
        finally:
            process.kill()
            process.stdout.close()
            process.wait()
        if len(verdicts) == len(names):
            return verdicts, ""
        if hung:
            return verdicts, f"decoder hung: no answer in {self.timeout_s:g} s"
        return verdicts, f"decoder crashed ({shelter.cause_of_death(process.returncode)})"

    def _collect(self, process: subprocess.Popen[bytes], expected: int) -> tuple[list[Verdict], bool]:
        assert process.stdout is not None
        verdicts: list[Verdict] = []
        pending = b""
        allowance = self.timeout_s + 30  # the first answer waits for the child's imports on a busy machine
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while len(verdicts) < expected:
                if not selector.select(allowance):
                    return verdicts, True
                piece = os.read(process.stdout.fileno(), 65536)
                if not piece:
                    process.wait()
                    return verdicts, False
                *lines, pending = (pending + piece).split(b"\n")
                for line in lines:
                    if line == b"ready":
                        allowance = self.timeout_s
                    else:
                        verdicts.append(Verdict(**json.loads(line)))
        return verdicts, False


def _feed(process: subprocess.Popen[bytes], names: bytes) -> None:
    assert process.stdin is not None
    try:
        process.stdin.write(names)
        process.stdin.close()
    except BrokenPipeError:
        pass  # it died at once; the collector finds out how


def serve_child(arguments: Sequence[str]) -> None:
    """The child's side: a root and names on stdin, with NUL between them; one JSON verdict per line on stdout."""
    max_megapixels, memory_mb = float(arguments[0]), int(arguments[1])
    shelter.limit_this_process(memory_mb)
    shelter.enter()
    out = os.dup(1)
    os.dup2(2, 1)  # a decoder that writes to stdout must not be taken for a verdict
    reach.WAITS_S = ()  # the parent has the time limit, so it does the waiting
    root, *names = sys.stdin.buffer.read().split(b"\0")
    store = open_store(Path(os.fsdecode(root)))
    os.write(out, b"ready\n")
    for name in names:
        os.write(out, json.dumps(asdict(examine(os.fsdecode(name), max_megapixels, store))).encode("ascii") + b"\n")


def write_quarantine(path_csv: Path, rows: Iterable[BadFile]) -> None:
    """Write quarantine.csv, whole: path, reason, split, label, size_bytes, found.

    Names that are not UTF-8 keep their bytes, so the file can be read back exactly.
    """
    blob = _lines([_COLUMNS, *(_cells(row) for row in rows)])

    def write(file: BinaryIO) -> None:
        file.write(blob)

    write_whole(path_csv, write)


def append_quarantine(path_csv: Path, row: BadFile) -> None:
    """Add one line to what `write_quarantine` wrote, and sync it; the cost does not depend on the lines before it.

    Raises:
        HardwareError: H003 when it cannot be written; a part of the line may then be at the end of the file.
    """
    blob = _lines([_cells(row)])
    with explained_write(path_csv), open(path_csv, "ab", buffering=0) as file:
        if file.write(blob) != len(blob):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path_csv))
        os.fsync(file.fileno())


_COLUMNS = [f.name for f in fields(BadFile)]


def _cells(row: BadFile) -> list[object]:
    return [getattr(row, name) for name in _COLUMNS]


def _lines(rows: Iterable[Sequence[object]]) -> bytes:
    return to_csv(rows).encode("utf-8", "surrogateescape")


def read_quarantine(path_csv: Path) -> list[BadFile]:
    """Read what `write_quarantine` and `append_quarantine` wrote; no file means no bad images.

    A last line that has no end was being appended when the machine stopped, and is left out.

    Raises:
        DataError: D016 when it is damaged, or larger than `bounds.QUARANTINE_BYTES`.
    """
    if not path_csv.exists():
        return []
    try:
        text = read_bounded(path_csv, QUARANTINE_BYTES).decode("utf-8", "surrogateescape")
        whole = text.rpartition("\n")[0]
        return [
            BadFile(row["path"], row["reason"], row["split"], row["label"], int(row["size_bytes"]), row["found"])
            for row in csv.DictReader(io.StringIO(whole, newline=""), strict=True)
        ]
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise DataError(
            "D016",
            f"{path_csv} is no readable list of bad images: {error}",
            where=str(path_csv),
            try_="bring it back from a copy, or begin a new run",
        ) from error


if __name__ == "__main__":
    serve_child(sys.argv[1:])
