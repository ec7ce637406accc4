"""Draws benchmark results, and writes one page with all of them.

Every row of a result is in its picture, losses in a colour and a marker of their own, and what did not run is listed beneath
with its reason. Each picture says in its foot which file its figures come from. matplotlib is imported inside the functions.
"""

from __future__ import annotations

import io
import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.files import write_text
from ..core.outputs import BENCH_PAGE, claim_folder
from ..evaluation.plots import ACCENT, DPI, INK, MUTED, SECOND, load_matplotlib
from ..evaluation.report import write_plots
from ..evaluation.scatter import draw_frontier, name_points, style_axes, unbeaten
from .lanes import WIDTH, Lane, Sheet, lay_beneath, lay_out
from .page import day, digits, meaning, page, paired, source_of, standing, threads
from .results import Area, Contender, Missing, Row, read_results, table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOSS = "#b42318"
# standing of a row -> marker, colour, meaning; colours and shapes that stay apart with colour blindness and in grey
LOOKS = {
    "faster": ("o", ACCENT, "faster than its rival"),
    "even": ("D", MUTED, "cannot be told apart"),
    "slower": ("X", LOSS, "slower than its rival"),
}
_GOAL: dict[str, Any] = {"marker": "|", "ms": 13, "mew": 2.2, "color": SECOND, "ls": "", "label": "goal: at most",
                         "gid": "goal", "zorder": 2}  # fmt: skip
CLOCKS = {"wall": "wall clock", "cpu": "CPU time of all threads and child processes", "gpu": "GPU clock"}
_BATCH_1 = re.compile(r"(?P<model>.+),[^,]*\bbatch 1")
_AXIS = 9.5  # points
_PANEL = 3.7  # inches
_ACCURACY_LEGEND = (
    "line through a point: 95 % interval of its accuracy",
    "filled: no other is as fast and as accurate",
)
_MOST_TICKS = 8
_STEPS = (
    (1, 1.05, 1.1, 1.15, 1.2, 1.3, 1.4, 1.5, 1.7, 2, 2.5, 3, 4, 5, 6, 7, 8, 8.5, 9, 9.5),
    (1, 1.2, 1.5, 2, 3, 4, 5, 6, 7, 8),
    (1, 1.2, 1.5, 2, 3, 5, 7),
    (1, 2, 5),
    (1,),
)  # of the ticks in a decade; the first that are few enough


# --- all of them -------------------------------------------------------------------------------------------------------


def write_bench_report(folders: Sequence[Path], out: Path, *, force: bool = False) -> dict[str, Any]:
    """Draw the results of some machines, and write `bench.html` with all of them.

    Args:
        folders: `results/<machine>` of each.
        out: gets bench.html, `<machine>-<area>.png` of each area and `<machine>-pareto.png` where accuracies were measured.
        force: replace files of these names that no report of benchmarks has written.

    Returns:
        page, pictures (paths), tables (text of each area).

    Raises:
        UsageError: U004 when there are no results, or they cannot be read; U002 when files of somebody else's would be replaced.
        HardwareError: H003 when something cannot be written.
    """
    machines = [read_results(folder) for folder in folders]
    pictures: dict[tuple[int, str], bytes] = {}
    for k, areas in enumerate(machines):
        for area in areas.values():
            pictures[k, area.area] = ratio_bars(area)
            if (accuracies := accuracy_latency(area)) is not None:
                pictures[k, "pareto"] = accuracies
    files = _file_names(machines, pictures)
    claim_folder(out, ["bench.html", *(f"{name}.png" for name in files.values())], BENCH_PAGE, force=force)
    write_plots(out, {files[key]: png for key, png in pictures.items()})
    write_text(out / "bench.html", page(machines, pictures))
    return {
        "page": str(out / "bench.html"),
        "pictures": [str(out / f"{files[key]}.png") for key in pictures],
        "tables": [table(area) for areas in machines for area in areas.values()],
    }


def _file_names(machines: Sequence[Mapping[str, Area]], keys: Iterable[tuple[int, str]]) -> dict[tuple[int, str], str]:
    """A name for each picture, inside the folder whatever the machine is called; a second result of a machine has a number."""
    names: dict[tuple[int, str], str] = {}
    for k, what in keys:
        area = machines[k].get(what) or next(iter(machines[k].values()))
        plain = "-".join(re.sub(r"[^\w.]+", "-", part).strip("-.") or "unnamed" for part in (area.machine.name, what))
        numbered = itertools.chain([plain], (f"{plain}-{i}" for i in itertools.count(2)))
        names[k, what] = next(name for name in numbered if name not in names.values())
    return names


# --- one area ---------------------------------------------------------------------------------------------------------


def ratio_bars(area: Area) -> bytes:
    """PNG of every row of an area: its ratio with its interval, on a logarithmic axis, grouped under its case.

    An area without rows, where every contender stands alone, gets a bar for the time of each.
    """
    return _png(draw_ratios(area) if area.rows else draw_times(area))


def draw_ratios(area: Area) -> Figure:
    """The figure of `ratio_bars` for rows."""
    clocks = list(dict.fromkeys(row.clock for row in area.rows))
    groups = {case: [row for row in area.rows if row.case == case] for case in dict.fromkeys(r.case for r in area.rows)}
    lanes = {case: [_ratio_lane(row, len(clocks) > 1) for row in rows] for case, rows in groups.items()}
    whisker = f"whisker: {meaning(area)}"
    sheet = lay_out(area.area, area.about, lanes, _notes(area), _foot(area, whisker), hints=True)
    axes = sheet.axes
    placed = [(row, y) for case, rows in groups.items() for row, y in zip(rows, sheet.centres[case], strict=True)]
    axes.set_xscale("log")
    axes.set_xlim(*_range(area.rows))
    axes.axvline(1, color=INK, lw=1.1, zorder=1)
    for name, (marker, color, said) in LOOKS.items():
        shown = [(row, y) for row, y in placed if standing(row) == name]
        if shown:
            x, y = [row.ratio for row, _ in shown], [y for _, y in shown]
            axes.hlines(y, [row.low for row, _ in shown], [row.high for row, _ in shown], color=color, lw=2, alpha=0.55)
            axes.plot(x, y, marker, ms=6.5, color=color, mfc="white" if name == "even" else color, mew=1.4, ls="", label=said,
                      gid=name, zorder=3)  # fmt: skip
    goals = [(row.goal, y) for row, y in placed if row.goal is not None]
    if goals:
        axes.plot(*zip(*goals, strict=True), **_GOAL)
    _ticks(axes)
    clock = CLOCKS[clocks[0]] if len(clocks) == 1 else "the clock named at the right"
    axes.set_xlabel(f"time of the contender / time of its rival, {clock} (logarithmic)", fontsize=_AXIS, color=MUTED)
    _hints(axes)
    _legend(sheet)
    return sheet.figure


def _ratio_lane(row: Row, several: bool) -> Lane:
    said = f"{digits(row.ratio)}  [{digits(row.low)}, {digits(row.high)}]"
    said += f"  {row.clock}" if several else ""
    said += f"  goal ≤ {row.goal:g} missed" if row.holds is False else ""
    lost = row.holds is False or standing(row) == "slower"
    return Lane(f"{row.contender} / {row.rival}", said, LOSS if lost else None)


def draw_times(area: Area) -> Figure:
    """The figure of `ratio_bars` for contenders that stand alone."""
    cases = dict.fromkeys(c.case for c in area.contenders)
    groups = {case: [c for c in area.contenders if c.case == case] for case in cases}
    lanes = {case: [Lane(c.name, f"{digits(c.p50_ms)} ms") for c in alone] for case, alone in groups.items()}
    sheet = lay_out(area.area, area.about, lanes, _notes(area), _foot(area))
    axes = sheet.axes
    placed = [(c, y) for case, alone in groups.items() for c, y in zip(alone, sheet.centres[case], strict=True)]
    for c, y in placed:
        axes.barh(y, c.p50_ms, height=0.13, color=ACCENT, gid="time")
    if placed:
        half, most = [c.p50_ms for c, _ in placed], [c.p90_ms for c, _ in placed]
        axes.hlines([y for _, y in placed], half, most, color=INK, lw=1.2)
        axes.set_xlim(0, 1.05 * max(*half, *most))
    said = "median time of one call (ms), wall clock; line: to the 90th percentile"
    axes.set_xlabel(said, fontsize=_AXIS, color=MUTED)
    return sheet.figure


def _range(rows: Sequence[Row]) -> tuple[float, float]:
    """Of the axis: every ratio and goal and 1; an interval much wider than all that runs out of the picture."""
    inner = [_log(x) for row in rows for x in (row.ratio, row.goal or 1.0)] + [_log(0.87), _log(1.15)]
    outer = [_log(x) for row in rows for x in (row.low, row.high)]
    span = max(inner) - min(inner)
    low, high = max(min(inner + outer), min(inner) - span), min(max(inner + outer), max(inner) + span)
    room = 0.05 * (high - low)
    return math.exp(low - room), math.exp(high + room)


def _log(ratio: float) -> float:
    return math.log(max(ratio, 1e-9))


def _ticks(axes: Axes) -> None:
    """Some round numbers, whether the axis covers a tenth or four decades."""
    low, high = axes.get_xlim()
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in _STEPS:
        found = [s * 10**d for d in decades for s in steps if low <= s * 10**d <= high]
        if len(found) <= _MOST_TICKS:
            break
    axes.set_xticks(found, [f"{x:g}" for x in found])
    axes.minorticks_off()


def _hints(axes: Axes) -> None:
    """Above the axes, at both sides of 1: where the contender wins."""
    for dx, side, text in ((-6, "right", "◀ contender faster"), (6, "left", "contender slower ▶")):
        axes.annotate(text, (1, 1), (dx, 5), xycoords=axes.get_xaxis_transform(), textcoords="offset points", ha=side,
                      fontsize=9, color=MUTED)  # fmt: skip


def _legend(sheet: Sheet) -> None:
    sheet.figure.legend(
        loc="upper left",
        bbox_to_anchor=sheet.legend_at,
        bbox_transform=sheet.figure.dpi_scale_trans,
        ncol=4,
        fontsize=9,
        frameon=False,
        borderpad=0,
        borderaxespad=0,
        handletextpad=0.3,
        columnspacing=1.6,
        labelcolor=INK,
    )


def _notes(area: Area) -> list[str]:
    """What the picture has no line for: contenders without a rival, and what did not run, with the reason."""
    alone = [c for c in area.contenders if area.rows and (c.case, c.name) not in paired(area)]
    notes = [f"without a rival: {c.name} ({c.case}): {digits(c.p50_ms)} ms" for c in alone]
    return notes + _missing_notes(area.missing)


def _missing_notes(missing: Sequence[Missing]) -> list[str]:
    """One line for each reason; of what takes long, one for each case."""
    reasons: dict[tuple[str, str, str], dict[str, list[str]]] = {}
    for m in missing:
        place = m.case if m.seconds is not None else ""
        reasons.setdefault((m.kind, m.why, place), {}).setdefault(m.label, []).append(m.case)
    return [
        f"{kind}: {place}: {', '.join(names)}: {why}" if place else f"{kind}: {_listed(names)}: {why}"
        for (kind, why, place), names in reasons.items()
    ]


def _listed(names: Mapping[str, Sequence[str]]) -> str:
    return ", ".join(f"{name} ({'; '.join(cases)})" for name, cases in names.items())


def _foot(area: Area, *legend: str) -> list[str]:
    """Machine, date, method, and the file that the figures come from."""
    hardware = ", ".join(f"{name} {value}" for name, value in area.machine.fingerprint.items() if value is not None)
    method = f"{area.method.processes} processes x {area.method.pairs} pairs"
    where = f"{area.machine.name} ({hardware})" if hardware else area.machine.name
    return [
        " · ".join((where, threads(area.method), method, day(area.created))),
        " · ".join((source_of(area), *legend)),
    ]


# --- accuracy against latency -----------------------------------------------------------------------------------------


def accuracy_latency(area: Area) -> bytes | None:
    """PNG of accuracy against the latency of one image, a panel for each model; None where no accuracy was measured."""
    figure = draw_accuracies(area)
    return None if figure is None else _png(figure)


def draw_accuracies(area: Area) -> Figure | None:
    """The figure of `accuracy_latency`."""
    load_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    single = [(found["model"], c) for c in area.contenders if (found := _BATCH_1.fullmatch(c.case))]
    panels: dict[str, list[Contender]] = {}
    for model, c in single:
        if c.accuracy is not None:
            panels.setdefault(model, []).append(c)
    if not panels:
        return None
    notes = [f"accuracy not measured: {c.name} ({c.case})" for _, c in single if c.accuracy is None]
    notes += _missing_notes([m for m in area.missing if _BATCH_1.fullmatch(m.case)])
    beneath, draw_texts = lay_beneath(notes, _foot(area, *_ACCURACY_LEGEND))
    whole = _PANEL * len(panels) + beneath
    layout = ConstrainedLayoutEngine(rect=(0.01, beneath / whole, 0.98, 0.99 - beneath / whole), hspace=0.04)
    figure = Figure(figsize=(WIDTH, whole), dpi=DPI, layout=layout, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    draw_texts(figure)
    stack = figure.subplots(len(panels), squeeze=False)[:, 0]
    for axes, (model, known) in zip(stack, panels.items(), strict=True):
        _panel(axes, model, known)
    figure.draw_without_rendering()  # the layout decides where a point lies
    for axes, known in zip(stack, panels.values(), strict=True):
        name_points(axes, [(named(c), _point(c)) for c in known], canvas.get_renderer())
    return figure


def _panel(axes: Axes, model: str, known: Sequence[Contender]) -> None:
    points = [_point(c) for c in known]
    best = unbeaten(points)
    draw_frontier(axes, [points[k] for k in best])
    for name, color, face, places in (
        ("beaten", MUTED, "white", [k for k in range(len(points)) if k not in best]),
        ("unbeaten", ACCENT, ACCENT, best),
    ):
        for k in places:
            low, high = known[k].accuracy_low, known[k].accuracy_high
            if low is not None and high is not None:
                axes.vlines(points[k][0], 100 * low, 100 * high, color=color, lw=1.1, alpha=0.45, gid="interval")
        if places:
            x, y = zip(*(points[k] for k in places), strict=True)
            axes.plot(x, y, "o", ms=7.5, color=color, mfc=face, mew=1.4, ls="", gid=name, zorder=3)
    style_axes(axes, f"{model}: accuracy against latency", [c.p50_ms for c in known])
    axes.set_xlabel("median latency of one image (ms)", fontsize=_AXIS, color=MUTED)
    axes.set_ylabel("accuracy (%)", fontsize=_AXIS, color=MUTED)


def _point(c: Contender) -> tuple[float, float]:
    return c.p50_ms, 100 * (c.accuracy or 0.0)


def named(c: Contender) -> str:
    """Its name, with the precision that it computes in where the name has another."""
    return c.name if not c.precision or c.precision.lower() in c.name.lower() else f"{c.name} ({c.precision})"


def _png(figure: Figure) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()
