"""What a run writes down while it works: events.jsonl, log.txt and metrics.csv; and what they tell about how work ended."""

from __future__ import annotations

import csv
import io
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from .bounds import TEXT_BYTES
from .files import explained_write, parse_json, read_bounded, read_end, write_text
from .text import printable


def append_event(directory: Path, event: Mapping[str, Any]) -> None:
    """Add one line to events.jsonl."""
    path = directory / "events.jsonl"
    with explained_write(path), open(path, "a", encoding="utf-8") as file:
        file.write(_strict(json.dumps({"time": round(time.time(), 3), **event}, default=str)) + "\n")


def _strict(text: str) -> str:
    """The same JSON with null for NaN and infinities, which Python writes and other readers refuse."""
    odd = "NaN" in text or "Infinity" in text
    return json.dumps(json.loads(text, parse_constant=lambda _: None)) if odd else text


def append_log(directory: Path, line: str) -> None:
    """Add one line to log.txt."""
    path = directory / "log.txt"
    with explained_write(path), open(path, "a", encoding="utf-8") as file:
        file.write(printable(line) + "\n")


def events_of(directory: Path) -> list[dict[str, Any]]:
    """events.jsonl, of a very long one the end; a line that a dying process left half is passed over."""
    try:
        content = read_end(directory / "events.jsonl", TEXT_BYTES)
    except (FileNotFoundError, ValueError):  # ValueError: a pipe
        return []
    found = []
    for line in content.splitlines():
        with suppress(ValueError):
            found.append(parse_json(line))
    return [event for event in found if isinstance(event, dict)]


def last_end(directory: Path) -> dict[str, Any] | None:
    """The event with which work on a run ended last: done, interrupted or failed. None: it never did, or goes on."""
    ended = None
    for event in events_of(directory):
        if event.get("event") in ("done", "interrupted", "failed"):
            ended = event
        elif event.get("event") in ("data", "plan", "start"):
            ended = None
    return ended


def how_it_ended(directory: Path) -> str:
    """How work on a run ended last, in a few words; empty while it goes on, or where it ended without a word."""
    end = last_end(directory) or {}
    message = end.get("message")
    return f"failed: {message}" if end.get("event") == "failed" and message else str(end.get("event", ""))


def began_training(directory: Path) -> bool:
    """Whether the loop of training was entered."""
    return (directory / "checkpoints").exists() or any(event.get("event") == "start" for event in events_of(directory))


def unexplained_end(directory: Path) -> str:
    """A sentence when a run ended by the death of its process, else an empty one; only for the holder of the lock."""
    if not any(event.get("event") == "plan" for event in events_of(directory)):
        return ""
    end = last_end(directory)
    if end is None:
        name = directory.name
        return f"{name} ended without a word the last time: its process, or the machine, was stopped from outside"
    died = str(end.get("message", ""))
    return f"last time {died}" if end["event"] == "failed" and died.startswith("the training process died") else ""


def write_epochs(directory: Path, epochs: Sequence[Mapping[str, Any]]) -> None:
    """Rewrite metrics.csv: one row per epoch."""
    out = io.StringIO()
    names = list(dict.fromkeys(key for epoch in epochs for key in epoch))
    writer = csv.DictWriter(out, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(epochs)
    write_text(directory / "metrics.csv", out.getvalue())


def read_epochs(directory: Path) -> list[dict[str, Any]]:
    """One dict per epoch, from metrics.csv; none where it is not there (yet).

    Raises:
        OSError, ValueError, csv.Error: it cannot be read, is larger than `bounds.TEXT_BYTES`, or no table.
    """
    try:
        text = read_bounded(directory / "metrics.csv", TEXT_BYTES).decode("utf-8", "surrogateescape")
    except FileNotFoundError:
        return []
    lines = csv.DictReader(io.StringIO(text, newline=""))
    return [{key: _number(value) for key, value in line.items() if key is not None} for line in lines]


def _number(text: str | None) -> Any:
    if text is None or text == "":
        return None
    try:
        return int(text)
    except ValueError:
        try:
            return float(text)
        except ValueError:
            return text
