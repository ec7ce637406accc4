"""`data check`, `data split` and `data stats`: look at images before anything is trained on them."""

from __future__ import annotations

from typing import Any

from .answer import Answer, Request, Session, plain
from .settings import settings_of
from .show import facts, say


def check(request: Request, session: Session) -> Answer:
    """All problems of the data at once; exit code 3 if it cannot be trained on as it is."""
    _, arguments = settings_of(request, request.thing())
    from ..api import data as api

    found = plain(api.check_data(request.thing(), **arguments))
    return _answer(found, exit_code=0 if found.get("ok", True) else 3)


def split(request: Request, session: Session) -> Answer:
    """Write split.csv."""
    _, arguments = settings_of(request, request.thing())
    from ..api import data as api

    return _answer(plain(api.split_data(request.thing(), out=request.get("out"), force=bool(request.get("force")), **arguments)))


def stats(request: Request, session: Session) -> Answer:
    """Count classes, sizes and formats."""
    _, arguments = settings_of(request, request.thing())
    from ..api import data as api

    return _answer(plain(api.data_stats(request.thing(), **arguments)))


def _answer(found: dict[str, Any], exit_code: int = 0) -> Answer:
    """`line` and `path` of a result, if it has them, come first."""
    head = str(found.get("line") or found.get("path") or "")

    def show(console: Any) -> None:
        if head:
            say(console, head, "bold")
        facts(console, {name: value for name, value in found.items() if name != "line" and str(value) != head})

    # what is wrong with the data, or the figures that were asked for, are no line
    return Answer(found, show, head, exit_code, result=show if exit_code or not head else None)
