"""Reads, writes and compares results of benchmarks: their schema, their table, and whether something became slower.

One file per area (loader, ops, train, engines, startup) lies in `results/<machine>/<area>.json`. A row is a contender and its
rival in one case, told as a ratio of times that belong together: in one process, in pairs, over several processes. Times of
different runs are never compared, their ratios are: `compare` asks for each row whether contender / rival grew by more
than 5 %, by Student's t test between the processes of both runs, with Holm's correction over all rows (S. Holm, "A simple
sequentially rejective multiple test procedure", 1979).
"""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..core.errors import UsageError
from ..core.files import explained_write, write_text
from ..core.text import to_json

AREAS = ("loader", "ops", "train", "engines", "startup")
TOLERATED = 1.05  # growth of a ratio that is not worth an alarm
SIGNIFICANCE = 0.05  # of all rows together
SCHEMA = 1

Clock = Literal["wall", "cpu", "gpu"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Machine(_Part):
    """Where a run took place. Two runs are comparable when `fingerprint` and `versions` are equal."""

    name: str = Field(description="folder of the results")
    fingerprint: dict[str, str | int | None] = Field(description="processor, cores, GPU, driver")
    versions: dict[str, str | None] = Field(description="of Python and the libraries; null: not installed")
    facts: dict[str, Any] = Field(default_factory=dict, description="what else may matter: system, load, clocks")


class Method(_Part):
    """How long and how often was measured."""

    processes: int = Field(ge=2)
    pairs: int = Field(ge=1, description="rounds in each process, after warming up")
    cell_s: float = Field(
        gt=0, description="most seconds of one contender in one case; what needs more is listed as not run"
    )
    confidence: float = 0.95
    threads: int = Field(ge=1)
    device: str = "cpu"
    full: bool = False
    small: bool = False


class Contender(_Part):
    """One contender in one case."""

    case: str
    name: str
    p50_ms: float = Field(gt=0, description="wall clock of one call, over all processes")
    p90_ms: float
    p99_ms: float
    calls: int = Field(ge=1)
    cpu_ms: float | None = Field(None, description="CPU time of one call, all threads and child processes")
    images_per_s: float | None = None
    open_s: float | None = Field(
        None, description="from nothing to the third call: imports, loading, cached compilation"
    )
    memory_mb: float | None = Field(
        None, description="rise of the largest resident (GPU: allocated) memory until the third call"
    )
    precision: str | None = Field(None, description="what it really computes in")
    device_p50_ms: float | None = Field(None, description="on buffers in place, without copies")
    accuracy: float | None = None
    accuracy_low: float | None = None
    accuracy_high: float | None = None
    limit_share: float | None = Field(
        None, description="time that the limit needs / p50_ms (or cpu_ms, by the row's clock)"
    )
    limit: str | None = Field(None, description="the limit: bytes at copy speed, plain decoding, ...")
    facts: dict[str, Any] = Field(default_factory=dict)


class Row(_Part):
    """A contender beside a rival: contender / rival, so below 1 the contender is faster."""

    case: str
    contender: str
    rival: str
    clock: Clock
    log_ratios: list[float] = Field(min_length=2, description="median ln(contender / rival) of each process")
    ratio: float
    low: float
    high: float
    cpu_ratio: float | None = None
    agreement: dict[str, float | int | str] = Field(
        default_factory=dict, description="how the results were compared first"
    )
    goal: float | None = Field(None, description="largest allowed ratio")
    holds: bool | None = None

    @property
    def key(self) -> tuple[str, str, str]:
        return self.case, self.contender, self.rival


class Missing(_Part):
    """What was not measured, and why."""

    case: str
    contender: str
    kind: Literal["absent", "not run"]
    why: str
    seconds: float | None = Field(None, description="that its cell would have taken")

    @property
    def label(self) -> str:
        """Contender and time on a line."""
        return self.contender if self.seconds is None else f"{self.contender} {self.seconds:.0f} s"


class Area(_Part):
    """One file of results."""

    schema_version: Literal[1] = 1
    area: str
    about: str = Field(description="what one call does, in a sentence")
    created: str = Field(description="UTC, ISO 8601")
    seconds: float = Field(description="that the area took")
    machine: Machine
    method: Method
    contenders: list[Contender]
    rows: list[Row]
    missing: list[Missing] = Field(default_factory=list)
    limits: dict[str, float] = Field(default_factory=dict, description="measured limits, with their unit in the name")

    def contender(self, case: str, name: str) -> Contender:
        """One of `contenders`.

        Raises:
            KeyError: there is none of that name.
        """
        found = next((c for c in self.contenders if (c.case, c.name) == (case, name)), None)
        if found is None:
            raise KeyError(f"{name} in {case}")
        return found

    @property
    def lost(self) -> list[Row]:
        """Rows whose goal does not hold."""
        return [row for row in self.rows if row.holds is False]


@dataclass(frozen=True)
class Change:
    """One row of two runs.

    Args:
        change: ratio in the second run / ratio in the first; above 1 it became slower.
        low: one-sided 95 % bound of it, without correction.
        p: p value of the hypothesis that it grew by at most 5 %.
        adjusted: p after Holm's correction over all rows.
    """

    area: str
    case: str
    contender: str
    rival: str
    before: float
    after: float
    change: float
    low: float
    p: float
    adjusted: float

    @property
    def flagged(self) -> bool:
        return self.adjusted < SIGNIFICANCE

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.area, self.case, self.contender, self.rival


@dataclass(frozen=True)
class Comparison:
    """Every row that two runs share, the most suspicious first, and those that only one of them has."""

    changes: tuple[Change, ...]
    only_before: tuple[tuple[str, str, str, str], ...]
    only_after: tuple[tuple[str, str, str, str], ...]

    @property
    def flagged(self) -> tuple[Change, ...]:
        return tuple(change for change in self.changes if change.flagged)

    def to_dict(self) -> dict[str, Any]:
        """rows, flagged (their number), only_before, only_after, table."""
        return {
            "rows": [asdict(change) | {"flagged": change.flagged} for change in self.changes],
            "flagged": len(self.flagged),
            "only_before": [list(key) for key in self.only_before],
            "only_after": [list(key) for key in self.only_after],
            "table": comparison_table(self),
        }


# --- files ------------------------------------------------------------------------------------------------------------


def write_area(folder: Path, area: Area) -> Path:
    """Write `<area>.json`, and return its path.

    Raises:
        HardwareError: H003 when it cannot be written.
    """
    path = folder / f"{area.area}.json"
    text = to_json(area.model_dump(mode="json", exclude_none=True), indent=1)
    with explained_write(path):
        folder.mkdir(parents=True, exist_ok=True)
    write_text(path, text + "\n")
    return path


def read_area(path: Path) -> Area:
    """Read one file of results.

    Raises:
        UsageError: U004 when it is missing or is not such a file.
    """
    try:
        return Area.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UsageError("U004", f"{path} cannot be read: {error.strerror}", try_="pytest benchmarks") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise UsageError(
            "U004",
            f"{path} is not a result of `pytest benchmarks`",
            why=f"{place}: {first['msg']}",
            try_="pytest benchmarks",
        ) from error


def read_results(folder: Path) -> dict[str, Area]:
    """The areas of one machine, in the usual order.

    Args:
        folder: `results/<machine>`, or one of its files.

    Raises:
        UsageError: U004 when there is none, or one of them cannot be read.
    """
    paths = [folder] if os.path.isfile(folder) else [folder / f"{name}.json" for name in AREAS]
    found = [read_area(path) for path in paths if os.path.exists(path)]
    if not found:
        raise UsageError(
            "U004",
            f"no benchmark results in {folder}",
            why=f"looked for {', '.join(f'{name}.json' for name in AREAS)}",
            try_="pytest benchmarks",
        )
    return {area.area: area for area in found}


# --- comparison -------------------------------------------------------------------------------------------------------


def compare(before: Mapping[str, Area], after: Mapping[str, Area]) -> Comparison:
    """Which rows became slower, ratio against ratio.

    Raises:
        UsageError: U004 when the runs are of different machines, versions or methods, or share no row.
    """
    shared = [name for name in before if name in after]
    for name in shared:
        _demand_comparable(before[name], after[name])
    rows = [{(a.area, *row.key): row for a in run.values() for row in a.rows} for run in (before, after)]
    keys = [key for key in rows[0] if key in rows[1]]
    if not keys:
        raise UsageError(
            "U004", "the two results share no row, so there is nothing to compare", try_="pytest benchmarks"
        )
    tests = [slower(rows[0][key].log_ratios, rows[1][key].log_ratios) for key in keys]
    adjusted = holm([test[2] for test in tests])
    changes = [
        Change(*key, rows[0][key].ratio, rows[1][key].ratio, change, low, p, corrected)
        for key, (change, low, p), corrected in zip(keys, tests, adjusted, strict=True)
    ]
    return Comparison(
        tuple(sorted(changes, key=lambda c: (c.p, -c.change))),
        tuple(key for key in rows[0] if key not in rows[1]),
        tuple(key for key in rows[1] if key not in rows[0]),
    )


def slower(before: Sequence[float], after: Sequence[float], tolerated: float = TOLERATED) -> tuple[float, float, float]:
    """Change of a ratio between two runs, its one-sided 95 % lower bound, and the p value of "it grew by at most 5 %".

    Student's two-sample t test on the log ratios of the processes, with one variance for both runs: they are of the same
    machine and rows, and for equal counts the test is known to forgive unequal variances.
    """
    from scipy.stats import t  # type: ignore[import-untyped]

    n, m = len(before), len(after)
    freedom = n + m - 2
    difference = statistics.fmean(after) - statistics.fmean(before)
    pooled = ((n - 1) * statistics.variance(before) + (m - 1) * statistics.variance(after)) / freedom
    error = math.sqrt(pooled * (1 / n + 1 / m))
    excess = difference - math.log(tolerated)
    if error == 0:
        return math.exp(difference), math.exp(difference), float(excess <= 0)
    low = difference - float(t.ppf(0.95, freedom)) * error
    return math.exp(difference), math.exp(low), float(t.sf(excess / error, freedom))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p values that keep the chance of any false alarm among all of them."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def _demand_comparable(before: Area, after: Area) -> None:
    for what, a, b in (
        ("machines", before.machine.fingerprint, after.machine.fingerprint),
        ("versions", before.machine.versions, after.machine.versions),
        ("methods", _shaping(before.method), _shaping(after.method)),
    ):
        differing = [name for name in sorted({*a, *b}) if a.get(name) != b.get(name)]
        if differing:
            shown = ", ".join(f"{name} {a.get(name)} and {b.get(name)}" for name in differing[:4])
            raise UsageError(
                "U004",
                f"the two results of {before.area} come from different {what}: {shown}",
                why="ratios are compared within one machine and pinned versions only",
                try_="run `pytest benchmarks` twice, on one machine and in one environment",
            )


def _shaping(method: Method) -> dict[str, Any]:
    return {"threads": method.threads, "device": method.device, "pairs": method.pairs}


# --- tables -----------------------------------------------------------------------------------------------------------


def table(area: Area) -> str:
    """One area for people: of each case the ratios with their intervals, what each took, and what did not run."""
    method = area.method
    lines = [
        f"{area.area}: {area.about}",
        f"  {area.machine.name}, {method.threads} thread{'s' * (method.threads != 1)}, {method.processes} processes x "
        f"{method.pairs} pairs; contender / rival, below 1: faster; [where 95 of 100 repetitions fall]",
    ]
    width = max((len(c.name) for c in area.contenders), default=0)
    for case in dict.fromkeys([*(c.case for c in area.contenders), *(m.case for m in area.missing)]):
        lines.append(f"  {case}")
        lines += [_row_text(row, width) for row in area.rows if row.case == case]
        lines += [f"         {c.name:<{width}} {figures(c)}" for c in area.contenders if c.case == case]
        missing = [m for m in area.missing if m.case == case]
        for kind, why in dict.fromkeys((m.kind, m.why) for m in missing):
            names = ", ".join(m.label for m in missing if (m.kind, m.why) == (kind, why))
            lines.append(f"         {kind}: {names}: {why}")
    return "\n".join(lines)


def _row_text(row: Row, width: int) -> str:
    mark = {True: "ok  ", False: "LOST", None: "    "}[row.holds]
    goal = f", goal {row.goal:.2f}" if row.goal is not None else ""
    return (
        f"    {mark} {row.contender:<{width}} {row.ratio:6.3f}x {row.rival:<{width}} [{row.low:.3f}, {row.high:.3f}] "
        f"{row.clock}{goal}"
    )


def figures(c: Contender) -> str:
    """What one contender took, on one line."""
    parts = [f"{c.p50_ms:.3g}/{c.p90_ms:.3g}/{c.p99_ms:.3g} ms"]
    parts += [f"on the device {c.device_p50_ms:.3g} ms"] if c.device_p50_ms is not None else []
    parts += [f"CPU {c.cpu_ms:.3g} ms"] if c.cpu_ms is not None else []
    parts += [f"{c.images_per_s:,.0f} images/s"] if c.images_per_s is not None else []
    parts += [c.precision] if c.precision else []
    parts += [f"accuracy {c.accuracy:.3f}"] if c.accuracy is not None else []
    parts += [f"{c.memory_mb:+.0f} MB"] if c.memory_mb is not None else []
    parts += [f"opened in {c.open_s:.1f} s"] if c.open_s is not None and c.open_s >= 1 else []
    parts += [f"{c.limit_share:.0%} of {c.limit}"] if c.limit_share is not None else []
    return ", ".join(parts)


def comparison_table(comparison: Comparison) -> list[tuple[str, ...]]:
    """(area, case, contender / rival, before, after, change, bound, adjusted p, verdict) of each row."""
    return [
        (
            c.area,
            c.case,
            f"{c.contender} / {c.rival}",
            f"{c.before:.3f}",
            f"{c.after:.3f}",
            f"{c.change:.3f}x",
            f">= {c.low:.3f}x",
            f"{c.adjusted:.3g}",
            "slower" if c.flagged else "",
        )
        for c in comparison.changes
    ]


def markdown(areas: Iterable[Area]) -> str:
    """The rows of all areas as one Markdown table, for a pull request or a page."""
    lines = ["| area | case | contender | rival | ratio | 95 % |", "| --- | --- | --- | --- | --- | --- |"]
    for area in areas:
        lines += [
            f"| {area.area} | {row.case} | {row.contender} | {row.rival} | {row.ratio:.3f} | {row.low:.3f} to {row.high:.3f} |"
            for row in area.rows
        ]
    return "\n".join(lines)
