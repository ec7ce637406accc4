"""`models list`."""

from __future__ import annotations

from typing import Any

from .answer import Answer, Request, Session
from .show import facts, say, table

_IN_FULL = 3  # so few models are shown with path and address


def listing(request: Request, session: Session) -> Answer:
    """The classifiers that match a pattern."""
    from ..api import models as api

    found = api.list_models(request.thing() or "*")

    def show(console: Any) -> None:
        if len(found) <= _IN_FULL and console.is_terminal:
            for model in found:
                say(console, model["name"], "bold")
                facts(console, _in_full(model), indent=2)
            return
        heads = ["name", "parameters", "pixels", "weights", "licence"]
        rows = [[model["name"], _millions(model["parameters"]), model["image_size"], _where(model), model["licence"] or None]
                for model in found]  # fmt: skip
        if not console.is_terminal:
            heads, rows = (
                [*heads, "place", "url"],
                [[*row, model["place"] or None, model["url"] or None] for row, model in zip(rows, found, strict=True)],
            )
        table(console, heads, rows, numbers=(1, 2), limit=None)
        if console.is_terminal:
            say(console, f"{len(found):,} models; `models list NAME` shows place and address of the weights", "dim")

    return Answer({"models": found}, show, "\n".join(model["name"] for model in found))


def _in_full(model: dict[str, Any]) -> dict[str, Any]:
    return {
        "parameters": f"{_millions(model['parameters'])} (with 1,000 classes)",
        "usual image size": f"{model['image_size']} pixels" if model["image_size"] else "any",
        "weights": _where(model) if not model["weights"] else f"{_where(model)}: {model['weights']}",
        **({"damage": model["damaged"]} if model["damaged"] else {}),
        **(
            {"place": model["place"], "address": model["url"], "licence": model["licence"] or "not stated"}
            if model["url"]
            else {}
        ),
    }


def _millions(count: int | None) -> str:
    return "-" if count is None else f"{count / 1e6:.1f} M"


def _where(model: dict[str, Any]) -> str:
    """Whether the published weights can be taken."""
    if not model["url"]:
        return "none published"
    if not model["weights"]:
        return "not here"
    return "damaged" if model["damaged"] else "here"
