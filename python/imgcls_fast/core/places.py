"""Which names a run directory has, and whose files are there: nothing of the user's is overwritten, whatever leads to it."""

from __future__ import annotations

import errno
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path

from . import env
from .errors import HardwareError, ImgclsError
from .files import read_start
from .text import quoted

LAST = "last.txt"  # names the last finished run; beside it, where the file system has links, the link `last`
BEGUN = "begun.txt"  # names the run that was begun last, finished or not: what `train --resume` continues
POINTER_MARK = "# the last run; written by imgcls-fast"  # in both of them
BENCH_TITLE = "<title>Benchmarks · imgcls-fast</title>".encode()
RUN_NAMES = (
    ".lock",
    "baseline.json",
    "bench",
    "bundle",
    "checkpoints",
    "config.yaml",
    "data.json",
    "env.json",
    "eval",
    "events.jsonl",
    "exports",
    "log.txt",
    "manifest.npz",
    "metrics.csv",
    "model.json",
    "plan.json",
    "plots",
    "quarantine.csv",
    "report.html",
    "run.json",
    "split.csv",
    "tensorboard",
)
_LEFTOVER = re.compile(r"\..+\.\d+\.tmp", re.DOTALL)  # of `files.write_whole`


def is_run_folder(path: Path) -> bool:
    """Whether a directory holds a run: the two files without which there is none. False for one that cannot be entered."""
    try:
        return (path / "config.yaml").is_file() and (path / "manifest.npz").is_file()
    except PermissionError:  # a disk that does not answer still raises: what is there must not be taken for nothing
        return False


def ours(path: Path) -> str:
    """What a directory of this project's is: "a run", "a bundle", "an export", "an evaluation", "the folder of runs", ...

    Returns:
        Empty for every other directory: it may be data.
    """
    if is_run_folder(path):
        return "a run"
    if os.path.isfile(path / "bundle.json"):
        return "a bundle"
    if _holds(path / "meta.json", b'"bundle"', b'"precision"'):  # others call a file so, too
        return "an export"
    if _holds(path / "predictions.json", b'"labels"', b'"fingerprint"', b'"has_targets"') and not _images_in(path):
        return "an evaluation"
    if _holds(path / "bench.html", BENCH_TITLE):
        return "a page of benchmarks"
    if any(_holds(path / name, POINTER_MARK.encode()) for name in (LAST, BEGUN)):
        return "the folder of runs"
    with suppress(OSError, RuntimeError, ImgclsError):  # RuntimeError: there is no home; ImgclsError: and no other place
        if path.samefile(env.runs_dir()) and any(is_run_folder(inner) for inner in path.iterdir()):
            return "the folder of runs"
    with suppress(OSError, RuntimeError, ImgclsError):
        if path.samefile(env.cache_dir()):
            return "the cache"
    return ""


def _images_in(path: Path) -> bool:
    """Whether images lie directly in a folder: an evaluation that was written among them makes them no less data."""
    return any(name.lower().endswith((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")) for name in os.listdir(path))


def _holds(path: Path, *words: bytes) -> bool:
    """Whether the first megabyte of a file holds all of these."""
    try:
        head = read_start(path, 1 << 20)
    except (OSError, ValueError):  # ValueError: a pipe, which would be waited for
        return False
    return all(word in head for word in words)


def demand_no_links(directory: Path) -> None:
    """Raise unless everything that is written is inside this run: a link in a stranger's run leads into your files.

    Raises:
        HardwareError: H003, naming the link.
    """
    inner = [f"eval/{name}" for name in ("val", "test", "baseline")]
    inner += [f"checkpoints/{name}" for name in ("last", "previous", "best")]
    for name in (*RUN_NAMES, *inner):
        if (directory / name).is_symlink():
            raise HardwareError(
                "H003",
                f"cannot write into {directory}: {name} in it is a link, and leads elsewhere",
                try_=f"find {quoted(str(directory))} -type l -ls   (shows where its links lead)",
            )


def others_files(directory: Path) -> list[str]:
    """Names in `directory` that a run would write and that no run has written; none in one that was killed at birth.

    An empty lock that lies alone is that of a run killed before it wrote its number; beside other files, anybody's.
    """
    lock = directory / ".lock"
    try:
        locked = os.path.isfile(lock)
        if locked and lock.read_bytes()[:4] == b"pid ":
            return []
        empty = locked and not lock.stat().st_size
    except NotADirectoryError:
        return []  # making the directory will say what is wrong with it
    found = sorted(name for name in RUN_NAMES if os.path.lexists(directory / name))
    return [] if empty and found == [".lock"] else found


def delete_run_files(directory: Path) -> None:
    """Delete what a run writes into its directory; links go, what they lead to stays.

    What makes it a run goes last, so that a deletion which was stopped can be repeated.

    Raises:
        OSError: something cannot be deleted.
    """
    final = ("manifest.npz", "config.yaml", ".lock")
    for name in (*(name for name in RUN_NAMES if name not in final), *final):
        path = directory / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def remove_if_empty(directory: Path) -> list[str]:
    """Remove a directory that holds nothing of anybody's. To be called after the run's lock was let go.

    Returns:
        Names that are left: somebody else's.

    Raises:
        OSError: it cannot be removed.
    """
    left = sorted(name for name in os.listdir(directory) if not name.startswith(".nfs"))  # a deleted file that is still open
    if not left:
        try:
            directory.rmdir()
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
    return left


def clear_leftovers(directory: Path) -> None:
    """Remove the half-written files of a process that was killed; only for the holder of the lock."""
    for inner in ("", "plots", "eval/val", "eval/test", "eval/baseline"):
        folder = directory / inner
        if folder.resolve() != directory.resolve() / inner:
            continue  # a link leads elsewhere
        for left in folder.glob(".*.tmp"):
            if not _LEFTOVER.fullmatch(left.name):  # somebody else's
                continue
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)
