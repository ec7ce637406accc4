"""`runs list`, `runs show` and `doctor`."""

from __future__ import annotations

import time
from typing import Any

from .answer import Answer, Request, Session, plain
from .show import facts, say, share, table, text


def listing(request: Request, session: Session) -> Answer:
    """Every run, the newest last."""
    from ..api import runs as api

    runs = plain(api.list_runs())
    heads = ("name", "data", "model", "epochs", "accuracy", "split", "finished")

    def show(console: Any) -> None:
        if not runs:
            say(console, "no runs yet: imgcls-fast train DATA")
            return
        cells = (
            [share(run["accuracy"]) if head == "accuracy" else text(run.get(head)) for head in heads] for run in runs
        )
        table(console, heads, cells, numbers=(3, 4), limit=None)

    return Answer({"runs": runs}, show, "\n".join(run["name"] for run in runs))


def show(request: Request, session: Session) -> Answer:
    """One run."""
    from ..api import runs as api

    found = plain(api.show_run(request.thing() or "last"))
    made = found.get("created")
    shown = found | ({"created": time.strftime("%Y-%m-%d %H:%M", time.localtime(made))} if made else {})
    if bench := found.get("efficiency"):  # all of it with --json; `report` shows the rest
        speed = bench["tables"][0]
        engines = [dict(zip(speed["heads"], cells, strict=True)) for cells in speed["rows"]]
        shown["efficiency"] = {"measured": bench["machine"]["date"], "engines": engines}
    return Answer(found, lambda console: facts(console, shown), str(found.get("name", "")))


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
