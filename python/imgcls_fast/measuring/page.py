"""Puts benchmark results into words and tables: the texts at the edges of pictures, and the page that holds all of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ..evaluation.report import data_address, page_environment, template
from .results import Area, Contender, Method, Row

_EMPTY = "–"


def standing(row: Row) -> str:
    """`faster` or `slower` when the whole interval is on one side of 1, else `even`."""
    return "faster" if row.high < 1 else "slower" if row.low > 1 else "even"


def day(created: str) -> str:
    """A moment in UTC, to the minute."""
    return f"{created[:16].replace('T', ' ')} UTC"


def source_of(area: Area) -> str:
    """The file that the figures come from."""
    return f"results/{area.machine.name}/{area.area}.json"


def meaning(area: Area) -> str:
    """Of the interval of a ratio."""
    return f"in {100 * area.method.confidence:.0f} of 100 repetitions of the run the ratio falls into it"


def threads(method: Method) -> str:
    """How many compute, and where."""
    return f"{method.threads} thread{'s' * (method.threads > 1)} on {method.device}"


def digits(x: float) -> str:
    """At least two digits that matter, without an exponent where there are fewer than five zeros."""
    return f"{x:,.0f}" if x >= 100 else f"{x:.1f}" if x >= 10 else f"{x:.2f}" if x >= 0.1 else f"{x:.2g}"


def paired(area: Area) -> set[tuple[str, str]]:
    """(case, name) of everyone that is in a row."""
    return {(row.case, name) for row in area.rows for name in (row.contender, row.rival)}


# --- the tables of an area --------------------------------------------------------------------------------------------


def _known(value: float | str | None, form: Callable[[Any], str] = digits) -> str:
    return _EMPTY if value is None else form(value)


_WORDS = {"faster": "faster", "even": "cannot be told apart", "slower": "SLOWER"}


def _goal(row: Row) -> str:
    said = {True: "holds", False: "MISSED", None: "not judged"}[row.holds]
    return _EMPTY if row.goal is None else f"≤ {row.goal:g} {said}"


def _accuracy(c: Contender) -> str:
    if c.accuracy is None:
        return _EMPTY
    both = c.accuracy_low is not None and c.accuracy_high is not None
    return f"{100 * c.accuracy:.2f}" + (f" [{100 * c.accuracy_low:.2f}, {100 * c.accuracy_high:.2f}]" if both else "")  # type: ignore[operator]


def _limit(c: Contender) -> str:
    return _EMPTY if c.limit_share is None else f"{c.limit_share:.0%}" + (f" of {c.limit}" if c.limit else "")


def told(value: Any) -> str:
    """A fact in words: what is nested is listed, numbers are short."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {told(entry)}" for name, entry in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(told(entry) for entry in value)
    return f"{value:.4g}" if isinstance(value, float) else _EMPTY if value is None else str(value)


def _ratio(x: float) -> str:
    return f"{x:.3f}" if x >= 0.01 else digits(x)


# heading, whether its cells are numbers, cell; a column without any content is left out
Column = tuple[str, bool, Callable[[Any], str]]
_ROWS: tuple[Column, ...] = (
    ("contender", False, lambda row: row.contender),
    ("rival", False, lambda row: row.rival),
    ("ratio", True, lambda row: _ratio(row.ratio)),
    ("interval", True, lambda row: f"{_ratio(row.low)} to {_ratio(row.high)}"),
    ("contender is", False, lambda row: _WORDS[standing(row)]),
    ("goal", False, _goal),
    ("clock", False, lambda row: row.clock),
    ("CPU ratio", True, lambda row: _known(row.cpu_ratio, _ratio)),
    ("agreement", False, lambda row: told(row.agreement) or _EMPTY),
)
_CONTENDERS: tuple[Column, ...] = (
    ("contender", False, lambda c: c.name),
    ("p50 / p90 / p99 (ms)", True, lambda c: " / ".join(digits(x) for x in (c.p50_ms, c.p90_ms, c.p99_ms))),
    ("on the device (ms)", True, lambda c: _known(c.device_p50_ms)),
    ("CPU (ms)", True, lambda c: _known(c.cpu_ms)),
    ("images/s", True, lambda c: _known(c.images_per_s)),
    ("opens in (s)", True, lambda c: _known(c.open_s)),
    ("memory (MB)", True, lambda c: _known(c.memory_mb)),
    ("precision", False, lambda c: c.precision or _EMPTY),
    ("accuracy (%)", True, _accuracy),
    ("share of the limit", False, _limit),
    ("calls", True, lambda c: f"{c.calls:,}"),
)


def _table(columns: Sequence[Column], things: Sequence[Any], kind: Callable[[Any], str]) -> dict[str, Any]:
    """Headings, and for each case its lines: how they look, and their cells."""
    cells = [[cell(thing) for _, _, cell in columns] for thing in things]
    used = [k for k in range(len(columns)) if any(line[k] != _EMPTY for line in cells)]
    groups: dict[str, list[dict[str, Any]]] = {thing.case: [] for thing in things}
    for thing, line in zip(things, cells, strict=True):
        groups[thing.case].append({"kind": kind(thing), "cells": [(line[k], columns[k][1]) for k in used]})
    return {"columns": [columns[k][:2] for k in used], "groups": groups}


def _kind(row: Row) -> str:
    """The look of a line; a missed goal is a loss, whatever the ratio."""
    return "slower" if row.holds is False else standing(row)


# --- the page ---------------------------------------------------------------------------------------------------------


def page(machines: Sequence[Mapping[str, Area]], pictures: Mapping[tuple[int, str], bytes]) -> str:
    """HTML that needs nothing else: pictures inside, no script, nothing from outside.

    Args:
        machines: the areas of each.
        pictures: (place of the machine, area or "pareto") -> PNG.
    """
    environment = page_environment()
    source = template("bench.html.j2", "measuring")
    shown = [
        {
            "name": next(iter(areas.values())).machine.name,
            "facts": _facts(areas.values()),
            "pareto": _picture(pictures, k, "pareto"),
            "areas": [
                {
                    "area": area,
                    "picture": _picture(pictures, k, area.area),
                    "summary": _summary(area),
                    "facts": _area_facts(area),
                    "rows": _table(_ROWS, area.rows, _kind),
                    "contenders": _table(_CONTENDERS, area.contenders, lambda _: "plain"),
                }
                for area in areas.values()
            ],
        }
        for k, areas in enumerate(machines)
    ]
    return environment.from_string(source).render(machines=shown)


def _picture(pictures: Mapping[tuple[int, str], bytes], machine: int, name: str) -> str | None:
    found = pictures.get((machine, name))
    return None if found is None else data_address(found)


def _facts(areas: Iterable[Area]) -> dict[str, str]:
    """What is known of a machine; where its areas differ, all of their facts."""
    said: dict[str, list[str]] = {}
    for area in areas:
        method, versions = area.method, area.machine.versions
        facts = {
            **area.machine.fingerprint,
            "versions": {name: version for name, version in versions.items() if version is not None},
            "not installed": [name for name, version in versions.items() if version is None] or None,
            **area.machine.facts,
            "date": day(area.created),
            "device": threads(method),
            "method": f"{method.processes} processes x {method.pairs} pairs in random order",
            "interval": meaning(area),
        }
        for name, value in facts.items():
            text = told(value)
            if value is not None and text not in said.setdefault(name, []):
                said[name].append(text)
    return {name: "; ".join(texts) for name, texts in said.items() if any(texts)}


def _area_facts(area: Area) -> dict[str, str]:
    method = area.method
    extent = (
        "the small set" if method.small else "everything" if method.full else f"rows of at most {method.cell_s:g} s"
    )
    facts = {"measured": f"{day(area.created)}, in {area.seconds / 60:.1f} minutes", "extent": extent}
    if area.limits:
        facts["limits"] = told(area.limits)
    return facts | {"source": source_of(area)}


def _summary(area: Area) -> str:
    """How many rows are won, lost and open, and how many goals."""
    if not area.rows:
        return f"{len(area.contenders)} contenders, each by itself."
    counts = [sum(standing(row) == name for row in area.rows) for name in ("faster", "even", "slower")]
    text = f"Of {len(area.rows)} rows, the contender is faster in {counts[0]}, slower in {counts[2]}"
    text += f", and cannot be told apart in {counts[1]}."
    goals = [row for row in area.rows if row.holds is not None]
    return text + (f" {len(goals) - len(area.lost)} of {len(goals)} goals hold." if goals else "")
