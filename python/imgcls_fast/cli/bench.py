"""`bench`, `bench report` and `bench compare`: how fast a model is, and what a suite of measurements says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..core.errors import GateFailed
from .answer import Answer, Request, Session
from .show import facts, say, table

_HEADS = ("area", "case", "contender / rival", "before", "after", "change", "bound", "p", "verdict")


def bench(request: Request, session: Session) -> Answer:
    """Time the engines of a run."""
    raise NotImplementedError


def report(request: Request, session: Session) -> Answer:
    """Draw the results of the suite."""
    from .. import api

    found = api.bench_report([Path(thing) for thing in request.things], request.get("out") or "bench")

    def show(console: Any) -> None:
        for text in found["tables"]:
            say(console, text)
            say(console, "")
        facts(console, {"page": found["page"], "pictures": len(found["pictures"])})

    return Answer(found, show, str(found["page"]))


def compare(request: Request, session: Session) -> Answer:
    """Compare two results; what became slower is exit code 5."""
    before, after = request.things
    from .. import api

    found = api.bench_compare(before, after)
    if request.get("out"):
        from ..core.files import write_json

        write_json(Path(request.get("out")), found)
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
