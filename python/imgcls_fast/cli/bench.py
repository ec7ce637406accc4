"""`bench`, `bench report` and `bench compare`: how fast a model is, and what a suite of measurements found."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ..core.errors import GateFailed, UsageError
from .answer import Answer, Request, Session
from .judge import trusted
from .show import block, facts, say, table

_HEADS = ("area", "case", "contender / rival", "before", "after", "change", "bound", "p", "verdict")


def bench(request: Request, session: Session) -> Answer:
    """Time the engines of a run, or one of its exports beside torch."""
    batches, duration_s = _batches(request), _duration(request)
    from ..api import bench as api

    device = request.get("device", "auto")
    named = " ".join(request.get("runtime") or ()) or (request.thing() or "")
    found = api.benchmark(
        request.thing() or "last",
        runtimes=tuple(request.get("runtime") or ()),
        batches=batches,
        duration_s=duration_s,
        device=None if device == "auto" else device,
        out=request.get("out"),
        say=session.note,
        trust=trusted(request, named),
        force=bool(request.get("force")),
    )
    path = str(Path(found["run"]) / "bench" / "efficiency.json")
    best = max(found["engines"], key=lambda row: row["best"]["images_per_s"])
    line = f"{best['name']} is fastest, {best['best']['images_per_s']:,.0f} images/s at batch {best['best']['batch']} -> {path}"
    return Answer(found, lambda console: _show_efficiency(console, found, path), line)


def _show_efficiency(console: Any, found: dict[str, Any], path: str) -> None:
    model, machine = found["model"], found["machine"]
    side, _, channels = model["input"]
    say(console, f"{model['arch']}, {model['parameters']:,} parameters, {model['macs'] / 1e6:,.4g} million MACs an image "
        f"({side} x {side} x {channels}), {model['classes']} classes", "bold")  # fmt: skip
    say(console, f"{machine['gpu'] or machine['cpu']}, {machine['threads']} of {machine['cpus']} cores")
    speed, worth = found["tables"]
    table(console, speed["heads"], speed["rows"], numbers=range(2, 8), limit=None)
    meaning = (
        "time/torch, batch 1: below 1 is faster; the ratio of a second run falls between the brackets in 19 of 20 cases"
    )
    say(console, meaning, "dim")
    table(console, worth["heads"], worth["rows"], numbers=(2, 3), limit=None)
    if found["data"]:
        say(console, found["data"]["line"])
    for entry in found["absent"]:
        say(console, f"not timed: {entry['name']}: {entry['reason']}")
        if entry["remedy"]:
            say(console, f"  try: {entry['remedy']}", "dim")
    for text in found["notices"]:
        say(console, f"note: {text}", "yellow")
    say(console, path, "bold")


def _batches(request: Request) -> tuple[int, ...]:
    """The sizes that were named.

    Raises:
        UsageError: U002 for anything but whole numbers >= 1.
    """
    found = []
    for word in request.get("batch_size") or ():
        if not (word.isascii() and word.isdigit() and int(word) >= 1):
            raise UsageError("U002", f"--batch-size must be a whole number >= 1, got {word!r}", try_="--batch-size 8")
        found.append(int(word))
    return tuple(found)


def _duration(request: Request) -> float:
    """Seconds.

    Raises:
        UsageError: U002 for anything but a length of time.
    """
    from ..core.schema import parse_seconds

    text = request.get("duration", "3s")
    seconds = parse_seconds(text)
    if not isinstance(seconds, float) or not 0 < seconds < math.inf:
        raise UsageError("U002", f"--duration must be a time like 3s or 1m, got {text!r}", try_="--duration 3s")
    return seconds


def report(request: Request, session: Session) -> Answer:
    """Draw the results of the suite."""
    from ..api import bench as api

    given = [Path(thing) for thing in request.things]
    found = api.bench_report(given, request.get("out") or "bench", force=bool(request.get("force")))

    def show(console: Any) -> None:
        for text in found["tables"]:
            block(console, text)
            say(console, "")
        facts(console, {"page": found["page"], "pictures": len(found["pictures"])})

    return Answer(found, show, str(found["page"]))


def compare(request: Request, session: Session) -> Answer:
    """Compare two results; what became slower is exit code 5."""
    before, after = request.things
    out = Path(request.get("out")) if request.get("out") else None
    if out is not None:
        from ..core.outputs import CHANGES, claim_file

        folders = [Path(given) for given in (before, after)]
        read = [path for folder in folders for path in (folder, *(folder.glob("*.json") if folder.is_dir() else ()))]
        claim_file(out, CHANGES, force=bool(request.get("force")), inputs=read)
    from ..api import bench as api

    found = api.bench_compare(before, after)
    if out is not None:
        from ..core.files import write_json

        write_json(out, found)
    slower = [row for row in found["rows"] if row["flagged"]]
    if slower:
        raise GateFailed(
            "E905",
            f"{len(slower)} of {len(found['rows'])} rows became slower",
            where="; ".join(_change(row) for row in slower[:5]),
            why="by more than 5 %, beyond what the variation between processes explains",
            try_=f"pytest benchmarks --against {before}",
        )
    line = f"{len(found['rows'])} rows compared, none became slower by more than 5 %"

    def show(console: Any) -> None:
        table(console, _HEADS, found["table"], numbers=(3, 4, 5, 6, 7), limit=None)
        say(console, line, "bold")

    return Answer(found, show, line)


def _change(row: dict[str, Any]) -> str:
    return (
        f"{row['area']}, {row['case']}, {row['contender']} / {row['rival']}: {row['before']:.3f}x to {row['after']:.3f}x, "
        f"at least {row['low']:.2f} times as slow (p {row['adjusted']:.2g})"
    )
