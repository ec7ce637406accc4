"""The folder of runs: what is a run, which one is the last, how one is found by its name, and a name for a new one."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

from . import env
from .errors import HardwareError, UsageError, near
from .files import explained_write, read_start, write_text
from .places import BEGUN, LAST, POINTER_MARK, clear_leftovers, delete_run_files, remove_if_empty
from .places import is_run_folder as is_run_folder  # the one answer to "data or a run?"
from .record import record_of
from .run import Run
from .text import command

NAME_PART = 48  # characters of the data's or the model's name in the name of a run


def find_run(name: str | Path | None) -> Run:
    """A run by path, by name inside the folder of runs, or the last finished one (None or "last").

    While no run is finished, the last one is the one that was begun last.

    Raises:
        UsageError: U003, with the nearest name.
    """
    runs = env.runs_dir()
    if name is None or str(name) in ("last", str(runs / "last")):
        return _last(runs)
    for path in (Path(name), runs / name):
        if is_run_folder(path):
            return Run(path)
        if path.name == "bundle" and os.path.isfile(path / "bundle.json"):
            return Run(path.parent)
    known = [run.name for run in list_runs()]
    begun = [other for other in known if len(str(name)) > 2 and other.startswith(str(name))]
    guess = begun[-1] if begun else near(str(name), known)  # the newest
    raise UsageError(
        "U003", f"{name} is not a run", try_=command("runs", "show", guess) if guess else command("runs", "list")
    )


def last_begun() -> Run:
    """The run that was begun last, finished or not.

    Raises:
        UsageError: U003 when there is none.
    """
    runs = env.runs_dir()
    target = _pointed_to(runs, BEGUN) or ""
    return Run(runs / target) if target and is_run_folder(runs / target) else _named(runs)


def left_unfinished(last: Run) -> Run | None:
    """The run that was begun after `last` was finished and is not finished itself, if there is one."""
    runs = env.runs_dir()
    target = _pointed_to(runs, BEGUN)
    begun = Run(runs / target) if target else None
    if begun is None or not is_run_folder(begun.directory) or begun.finished or not last.finished:
        return None
    return begun if begun.config_path.stat().st_mtime > _finished_at(last) else None


def list_runs(folder: Path | None = None) -> list[Run]:
    """All runs of a folder, the oldest first."""
    folder = folder or env.runs_dir()
    if not os.path.isdir(folder):
        return []
    found = [Run(path) for path in folder.iterdir() if not path.is_symlink() and is_run_folder(path)]
    return sorted(found, key=lambda run: (record_of(run.directory)["created"], run.name))


def new_run_path(source: str | None, arch: str) -> Path:
    """runs/<data>-<arch>-<time>: no spaces, never an existing directory."""
    stem = _in_name(Path(source).resolve().stem if source else "digits") or "data"
    base = f"{stem}-{_in_name(arch.split('/')[-1])}-{time.strftime('%Y%m%d-%H%M%S')}"
    path, k = env.runs_dir() / base, 1
    while os.path.lexists(path):
        k += 1
        path = env.runs_dir() / f"{base}-{k}"
    return path


def _in_name(text: str) -> str:
    """What of a text goes into a run's name: a folder may have a name as long as the file system allows, a run's is read."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", text).strip("-.")[:NAME_PART].rstrip("-.")


def mark_begun(run: Run) -> str:
    """Let `train --resume` without a name mean this run; and let `last` mean it too, while no run is finished.

    Returns:
        Why that could not be done, or an empty string.
    """
    runs = env.runs_dir()
    note = _point(runs, BEGUN, run)
    target = _pointed_to(runs, LAST)
    return note if target and Run(runs / target).finished else mark_last(run)


def mark_last(run: Run) -> str:
    """Let `last` in the folder of runs point to this run: last.txt, and a symlink where that is possible.

    The pointer belongs to the folder of runs alone, wherever this run is, and no file of the user's is replaced.

    Returns:
        Why `last` could not be moved, or an empty string.
    """
    runs = env.runs_dir()
    if note := _point(runs, LAST, run):
        return note
    link, temporary = runs / "last", runs / f".last.{os.getpid()}"
    if os.path.exists(link) and not link.is_symlink():
        return ""
    try:
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(_target(runs, run))
        os.replace(temporary, link)
    except OSError:
        temporary.unlink(missing_ok=True)  # a file system without links: last.txt is enough
    return ""


def forget(run: Run) -> None:
    """Take back what points to a run that goes: `last` then means the newest finished one."""
    runs = env.runs_dir()
    for pointer in (LAST, BEGUN):
        if _pointed_to(runs, pointer) == _target(runs, run):
            (runs / pointer).unlink(missing_ok=True)
    link = runs / "last"
    if link.is_symlink() and os.readlink(link) == _target(runs, run):
        link.unlink(missing_ok=True)


def named_run(name: str | Path) -> Run:
    """The run that is meant by exactly this path or name; neither the last one nor one around a bundle is guessed.

    Raises:
        UsageError: U003.
    """
    for path in (Path(name), env.runs_dir() / name):
        if is_run_folder(path):
            return Run(path)
    raise UsageError("U003", f"{name} is not a run", try_=command("runs", "list"))  # another run is no hint for a deletion


def remove_run(run: Run) -> list[str]:
    """Delete a run: the files that a run has, and its folder if nothing else is in it. Links are removed, never followed.

    Returns:
        Names of what is left in the folder because no run has put it there.

    Raises:
        UsageError: U003 when the folder holds no run, U002 when it is reached through a link.
        HardwareError: H005 while another process writes it, H003 when something cannot be removed.
    """
    directory = run.directory
    if directory.is_symlink():
        raise UsageError("U002", f"{directory} is a link", try_=command("runs", "rm", os.path.realpath(directory)))
    if not is_run_folder(directory):
        raise UsageError("U003", f"{directory} is not a run", try_=command("runs", "list"))
    run = Run(directory.resolve())  # "." cannot be removed by that name
    run.lock(to_delete=True)
    try:
        clear_leftovers(run.directory)
        forget(run)
        with explained_write(run.directory, verb="delete"):
            delete_run_files(run.directory)
    finally:
        run.unlock()
    with explained_write(run.directory, verb="delete"):
        return remove_if_empty(run.directory)  # after the lock: on NFS a file that is open stays under another name


def _last(runs: Path) -> Run:
    """The run that last.txt names; where it is not finished, or that run was removed, the newest finished one."""
    if _pointed_to(runs, LAST) and (named := _named(runs)).finished:
        return named
    return max((run for run in list_runs(runs) if run.finished), key=_finished_at, default=None) or _named(runs)


def _named(runs: Path) -> Run:
    target = _pointed_to(runs, LAST)
    if target is None:
        raise UsageError("U003", f"there is no last run in {runs}", try_=command("train", "DATA"))
    if is_run_folder(runs / target):
        return Run(runs / target)
    raise UsageError("U003", f"the last run, {runs / target}, is not there any more", try_=command("runs", "list"))


def _finished_at(run: Run) -> float:
    return (run.bundle_path / "bundle.json").stat().st_mtime


def _target(runs: Path, run: Run) -> str:
    """What a pointer holds: a name inside the folder of runs, or a whole path."""
    inside = run.directory.resolve()
    return inside.name if inside.parent == runs.resolve() else str(inside)


def _point(runs: Path, pointer: str, run: Run) -> str:
    """Write a pointer to a run; why that could not be done, or an empty string."""
    if os.path.exists(runs / pointer) and _pointed_to(runs, pointer) is None:
        return f"{runs / pointer} is not ours and stays as it is, so `last` does not mean this run"
    try:
        runs.mkdir(parents=True, exist_ok=True)
        write_text(runs / pointer, f"{_target(runs, run)}\n{POINTER_MARK}\n")
    except (OSError, HardwareError) as error:
        return f"`last` does not mean this run: {error}"
    return ""


def _pointed_to(runs: Path, pointer: str) -> str | None:
    """What a pointer names: a directory of `runs` or an absolute path. None where there is no such file, or it is not ours."""
    try:
        text = read_start(runs / pointer, 1 << 16).decode("utf-8", "surrogateescape")
    except (OSError, ValueError):  # ValueError: a pipe, which would be waited for
        return None
    if text.endswith(f"\n{POINTER_MARK}\n"):
        return text.removesuffix(f"\n{POINTER_MARK}\n")
    name = text.removesuffix("\n")  # as earlier versions wrote it, without the mark
    link = runs / "last"
    written_by_us = (link.is_symlink() and os.readlink(link) == name) or is_run_folder(runs / name)
    return name if name and "\n" not in name and written_by_us else None
