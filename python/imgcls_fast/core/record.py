"""When a run was made, when work on it began and how it ended, and what was changed between: run.json.

A run is trained in one piece of work, or in several with interruptions between. Each piece has an entry of its own:

    {"created": seconds since 1970, "parent": the run whose weights it began with, or null,
     "part_of": the folder of the study or run that asked for it (only there),
     "stopped_after": the epoch after which its caller ended training (only there),
     "work": [{"began": s, "ended": s or null, "how": "finished" | "interrupted" | "failed" | "died", "message": "...",
               "changes": {"train.threads": [2, 1]}, "differences": ["threads was 2, is 1"]}]}

`differences` are what makes the weights differ, in their last bits, from those of a run without interruption.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .errors import ImgclsError, Interrupted
from .files import read_json, write_json

NAME = "run.json"
Parent = dict[str, Any]


class Work:
    """One piece of work on a run, while it goes on."""

    def __init__(self, directory: Path, record: dict[str, Any]) -> None:
        self._directory, self._record = directory, record
        self._entry: dict[str, Any] = record["work"][-1]

    def differs(self, differences: list[str]) -> None:
        """Record what makes the result differ from that of an uninterrupted run; nothing where the list is empty."""
        if differences:
            self._entry["differences"] += [text for text in differences if text not in self._entry["differences"]]
            write_json(self._directory / NAME, self._record)

    def stopped_by_caller(self, epoch: int) -> None:
        """Record that whoever began the run ended its training after this epoch."""
        self._record["stopped_after"] = epoch
        write_json(self._directory / NAME, self._record)

    def end(self, how: str, message: str = "") -> None:
        """Record the end of this piece of work."""
        self._entry |= {"ended": round(time.time(), 3), "how": how, "message": message}
        write_json(self._directory / NAME, self._record)


@contextmanager
def work_on(
    directory: Path,
    changes: Mapping[str, tuple[Any, Any]] | None = None,
    *,
    parent: Parent | None = None,
    part_of: Path | None = None,
    death: str = "",
    end: Mapping[str, Any] | None = None,
) -> Iterator[Work]:
    """Record that work on a run begins here, and how it ends; only for the holder of the lock.

    Args:
        directory: directory of the run.
        changes: settings that differ from before: name -> (before, now); None where the run begins.
        parent: the run that a new run takes its weights from.
        part_of: folder of the study or run that asked for a new run.
        death: what is known of the end of the work before, if that could not record it.
        end: the last event of the work before, for a run that has no record of it.

    Raises:
        HardwareError: H003 when it cannot be written.
    """
    found = record_of(directory)
    record = found
    if not found["work"]:
        record = {**found, "parent": parent or found["parent"]} | ({"part_of": str(part_of.resolve())} if part_of else {})
    if changes is not None and not record["work"]:  # begun by a version that kept no record, or the record is damaged
        how, message = _told(end, death)
        record["work"] = [{"began": record["created"], "ended": None, "how": how, "message": message, "differences": [], "changes": {}}]
    for entry in record["work"]:
        if entry.get("ended") is None and entry.get("how") is None:  # it could not tell any more
            entry |= {"how": "died", "message": death}
    entry = {"began": round(time.time(), 3), "ended": None, "how": None, "message": "", "differences": [],
             "changes": {name: list(pair) for name, pair in (changes or {}).items()}}  # fmt: skip
    record = {**record, "schema": 1, "work": [*record["work"], entry]}
    write_json(directory / NAME, record)
    work = Work(directory, record)
    try:
        yield work
    except BaseException as error:
        stopped = isinstance(error, Interrupted | KeyboardInterrupt)
        with suppress(ImgclsError):  # a full disk, perhaps: it must not hide the error
            work.end("interrupted" if stopped else "failed", str(getattr(error, "message", error)))
        raise
    work.end("finished")


def _told(end: Mapping[str, Any] | None, death: str) -> tuple[str, str]:
    """How earlier work ended and why, from its last event: a finished run is resumed for its report."""
    if death or end is None:
        return "died", death
    how = {"done": "finished", "interrupted": "interrupted"}.get(str(end.get("event")), "failed")
    return how, str(end.get("message") or "") if how == "failed" else ""


def record_of(directory: Path) -> dict[str, Any]:
    """Return created, parent, work and, where they are known, part_of and stopped_after.

    A run of an earlier version has the time of its list of images, and no work.

    A record that is damaged counts as missing, and so does an entry: it must not keep a run from being read.
    """
    try:
        found = read_json(directory / NAME)
    except (OSError, ValueError):
        found = None
    record = found if isinstance(found, dict) else {}
    created, work = record.get("created"), record.get("work")
    if not isinstance(created, int | float):
        with suppress(OSError):
            created = (directory / "manifest.npz").stat().st_mtime  # written once, when the run begins
    entries = [entry for entry in work if _is_entry(entry)] if isinstance(work, list) else []
    parent, part_of, stopped = record.get("parent"), record.get("part_of"), record.get("stopped_after")
    return {
        "created": created if created is not None else round(time.time(), 3),
        "parent": parent if isinstance(parent, dict) else None,
        **({"part_of": part_of} if isinstance(part_of, str) else {}),
        **({"stopped_after": stopped} if isinstance(stopped, int) else {}),
        "work": entries,
    }


def _is_entry(entry: Any) -> bool:
    """Whether it is a piece of work as `work_on` writes it."""
    if not isinstance(entry, dict):
        return False
    changes, differences = entry.get("changes") or {}, entry.get("differences") or []
    return (
        isinstance(changes, dict)
        and all(isinstance(pair, list) and len(pair) == 2 for pair in changes.values())
        and isinstance(differences, list)
        and all(isinstance(text, str) for text in differences)
    )


def resumed_lines(record: Mapping[str, Any]) -> list[str]:
    """One sentence for each interruption: when and how work ended, when it went on, and what was changed."""
    lines = []
    for before, after in zip(record["work"], record["work"][1:], strict=False):
        how = before.get("how") or "ended without a word"
        message = str(before.get("message") or "").removesuffix("; the work is saved")
        stopped = f"{how} {day(before['ended'])}" if before.get("ended") else str(how)
        changes = ", ".join(f"{name} {old} -> {new}" for name, (old, new) in (after.get("changes") or {}).items())
        lines.append(
            f"{stopped}{f' ({message})' if message else ''}, resumed {day(after.get('began'))}"
            + (f" with {changes}" if changes else "")
        )
    return lines


def unequal_line(record: Mapping[str, Any]) -> str:
    """Why the weights are not bitwise those of an uninterrupted run; empty where nothing speaks against it."""
    found = [
        f"{'; '.join(entry['differences'])} (resumed {day(entry.get('began'))})"
        for entry in record["work"]
        if entry.get("differences")
    ]
    return f"not bitwise equal to an uninterrupted run: {', then '.join(found)}" if found else ""


def day(seconds: Any) -> str:
    """Local date and time of seconds since 1970."""
    try:
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds)) if isinstance(seconds, int | float) else "-"
    except (ValueError, OverflowError, OSError):  # of a damaged record: no time at all
        return "-"
