"""`runs list`, `runs show`, `runs diff`, `runs rm` and `doctor`."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

from ..core.errors import HardwareError, Interrupted, UsageError
from ..core.text import command, printable
from .answer import Answer, Request, Session, plain
from .show import block, facts, say, share, table, text

_COLUMNS = ("name", "created", "data", "model", "epochs", "accuracy", "split", "state")
_GOES_FIRST = ("split", "epochs", "data", "model", "created", "state", "accuracy")  # from the list on a narrow terminal
_NARROWEST = {"data": 10, "model": 10, "created": 10}  # columns that may be cut, and to how many characters


def listing(request: Request, session: Session) -> Answer:
    """Every run, the newest last."""
    from ..api import runs as api

    runs = plain(api.list_runs())

    def show(console: Any) -> None:
        if not runs:
            say(console, "no runs yet: imgcls-fast train DATA")
            return
        cells = [{head: _cell(head, run.get(head)) for head in _COLUMNS} for run in runs]
        heads: tuple[str, ...] = _COLUMNS
        if console.is_terminal:
            heads, cells = _fitted(cells, console.width)
        numbers = [k for k, head in enumerate(heads) if head in ("epochs", "accuracy")]
        table(console, heads, ([row[head] for head in heads] for row in cells), numbers=numbers, limit=None)

    return Answer({"runs": runs}, show, "\n".join(run["name"] for run in runs))


def _cell(head: str, value: Any) -> str:
    if head == "created":
        return _date(value) if value else "-"
    return printable(share(value) if head == "accuracy" else text(value))


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def _fitted(rows: list[dict[str, str]], width: int) -> tuple[tuple[str, ...], list[dict[str, str]]]:
    """The columns that fit, and the rows with long names of data and models cut; a run's name is never cut: it is typed again."""
    heads = list(_COLUMNS)
    gone = iter(_GOES_FIRST)
    while True:
        widest = {head: max(len(head), *(len(row[head]) for row in rows)) for head in heads}
        over = sum(widest.values()) + 2 * len(heads) - width
        spare = {head: max(0, widest[head] - _NARROWEST[head]) for head in heads if head in _NARROWEST}
        if over <= sum(spare.values()):
            break
        name = next(gone, None)
        if name is None:
            break
        heads.remove(name)
    for head, cut in (("data", _without_beginning), ("model", _without_middle), ("created", _day)):
        if over > 0 and spare.get(head):
            room = widest[head] - min(over, spare[head])
            over -= widest[head] - room
            rows = [{**row, head: cut(row[head], room)} for row in rows]
    return tuple(heads), rows


def _day(created: str, room: int) -> str:
    return created if len(created) <= room else created[: len("2026-11-23")]


def _without_beginning(name: str, room: int) -> str:
    return name if len(name) <= room else "…" + name[len(name) - room + 1 :]


def _without_middle(name: str, room: int) -> str:
    kept = room - 1
    return name if len(name) <= room else name[: kept - kept // 2] + "…" + name[len(name) - kept // 2 :]


def diff(request: Request, session: Session) -> Answer:
    """What differs between two runs; exit code 0 whether or not anything does."""
    from ..api import runs as api
    from ..tracking.lines import counted

    found = plain(api.diff_runs(*request.things))
    groups = ("settings", "data", "figures", "environment")
    line = ", ".join(f"{name}: {counted(len(found[name]), 'difference')}" for name in groups if found[name])
    line = f"{found['a']} and {found['b']}: {line or 'no difference'}"

    def show(console: Any) -> None:
        for side in ("a", "b"):
            say(console, f"{side}  {found[side]}", "bold")
        for name in groups:
            if found[name]:
                table(console, [name, "a", "b"], ([row["name"], row["a"], row["b"]] for row in found[name]), limit=None)
        if not any(found[name] for name in groups):
            say(console, "no difference")
        if found["test"]:
            say(console, _told(found["test"]))

    return Answer(found, show, line, result=show)


def _told(test: dict[str, Any]) -> str:
    """Whether the rows that both runs have answered tell them apart, in a sentence."""
    gain = f"{100 * test['gain']:+.1f} points of accuracy on {test['rows']:,} test images that both have answered"
    if test["low"] is not None:
        gain += f" [{100 * test['low']:+.1f}, {100 * test['high']:+.1f}]"
    if test["verdict"] == "even":
        return f"b against a: {gain}; so few images cannot tell the two apart"
    return f"b is {test['verdict']}: {gain}"


def remove(request: Request, session: Session) -> Answer:
    """Delete runs: what would go is shown, and asked about where --yes is not given."""
    from ..api import runs as api
    from ..core.runs import named_run

    runs = list({run.directory.resolve(): run for run in map(named_run, request.things)}.values())
    for run in runs:  # before anything is deleted
        if run.state == "running":
            raise HardwareError("H005", f"{run.directory} is being written by another process", try_="stop it first")
    if not request.get("yes"):
        _ask(runs, session, request)
    removed: list[dict[str, Any]] = []
    try:
        for run in runs:
            removed.append(api.remove_run(run))
    finally:
        lines = [f"removed {gone['directory']}" + _left(gone["left"]) for gone in removed]
        if len(removed) < len(runs):  # an error follows
            print("".join(f"{printable(line)}\n" for line in lines), end="", file=sys.stderr)
    return Answer({"removed": removed}, lambda console: block(console, "\n".join(map(printable, lines))), "\n".join(lines))


def _left(names: list[str]) -> str:
    return f"; the folder stays, it also holds {', '.join(names[:5])}{' ...' * (len(names) > 5)}" if names else ""


def _ask(runs: Sequence[Any], session: Session, request: Request) -> None:
    """Go on only after a yes.

    Raises:
        UsageError: U002 where nobody can be asked.
        Interrupted: the answer was no.
    """
    if session.json or not sys.stdin.isatty():
        raise UsageError("U002", "runs are deleted after asking, and nobody can be asked here", try_=command(*request.words, "--yes"))
    from ..core.overview import brief

    for run in runs:
        line = brief(run)
        about = f"{_date(line['created'])}, {line['state']}, accuracy {share(line['accuracy'])}"
        print(printable(f"{run.directory}   {about}"), file=sys.stderr)
    what = "this run" if len(runs) == 1 else f"these {len(runs)} runs"
    print(f"delete {what} for good? [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise Interrupted("X130", "nothing was deleted")


def show(request: Request, session: Session) -> Answer:
    """One run."""
    from ..api import runs as api

    found = plain(api.show_run(request.thing() or "last"))
    shown = found | ({"created": _date(found["created"])} if found.get("created") else {})
    if bench := found.get("efficiency"):  # all of it with --json; `report` shows the rest
        speed = bench["tables"][0]
        engines = [dict(zip(speed["heads"], cells, strict=True)) for cells in speed["rows"]]
        shown["efficiency"] = {"measured": bench["machine"]["date"], "engines": engines}
    def show_facts(console: Any) -> None:
        facts(console, shown)

    return Answer(found, show_facts, str(found.get("name", "")), result=show_facts)


def doctor(request: Request, session: Session) -> Answer:
    """What works here, and what to do about the rest."""
    from ..api import runs as api

    found = api.doctor()
    sections = [{"name": name, "items": [_item(*item) for item in items]} for name, items in found["sections"]]

    def show(console: Any) -> None:
        for section in sections:
            say(console, section["name"], "bold")
            width = max((len(item["item"]) for item in section["items"]), default=0)
            for item in section["items"]:
                mark, style = {True: ("ok", "green"), False: ("no", "red")}.get(item["ok"], ("--", "dim"))
                console.print(f"  {mark}  ", style=style, end="")
                say(console, f"{item['item']:<{width}}  {text(item['value'])}")
                if item["hint"]:
                    say(console, f"      {item['hint']}", "dim")

    wrong = [item["item"] for section in sections for item in section["items"] if item["ok"] is False]
    return Answer({"sections": sections}, show, f"missing: {', '.join(wrong)}" if wrong else "all is well")


def _item(item: str, value: Any, ok: bool | None, hint: str) -> dict[str, Any]:
    return {"item": str(item), "value": plain(value), "ok": ok, "hint": str(hint or "")}
