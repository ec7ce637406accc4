"""Draws accuracy against latency, for the pictures of an export and of the benchmarks."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .plots import ACCENT, DPI, INK, MUTED, house_style, load_matplotlib
from .text import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_CLEAR = 14  # pixels between a name and the point of another
WIDE_RANGE = 8.0  # of latencies, from which on the axis is logarithmic
Point = tuple[float, float]  # milliseconds and per cent
_NEAR = ((9, 5, "left"), (9, -13, "left"), (-9, 5, "right"), (-9, -13, "right"), (9, 17, "left"), (9, -25, "left"),
         (-9, 17, "right"), (-9, -25, "right"))  # fmt: skip
_BESIDE = 4  # of these stand so near that nobody asks whose name it is
_FAR = tuple(
    (sign * dx, dy, "left" if sign > 0 else "right")
    for dy in (30, -38, 43, -51, 56, -64, 69, -77)
    for dx in (14, 40)
    for sign in (1, -1)
)


def unbeaten(points: Sequence[Point]) -> list[int]:
    """The places of the points that no other one beats in both, the fastest first."""
    found: list[int] = []
    for k in sorted(range(len(points)), key=lambda k: (points[k][0], -points[k][1])):
        if not found or points[k][1] > points[found[-1]][1]:
            found.append(k)
    return found


def draw_frontier(axes: Axes, points: Sequence[Point]) -> None:
    """The line through the unbeaten points, if there are at least two."""
    if len(points) > 1:
        axes.plot(*zip(*points, strict=True), color=ACCENT, lw=1.5, alpha=0.55, drawstyle="steps-post", label="frontier",
                  gid="frontier")  # fmt: skip


def style_axes(axes: Axes, title: str, latencies: Sequence[float]) -> None:
    """The look of the house, room for names at the edges, and a logarithmic axis when latencies differ widely."""
    house_style(axes, title, "", "")
    if latencies and max(latencies) > WIDE_RANGE * min(latencies):
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.margins(x=0.16, y=0.14)
    low, high = axes.get_ylim()
    axes.set_ylim(max(0.0, low), min(100.0, high))  # of per cent there are no more
    for artist in (*axes.lines, *axes.collections):
        artist.set_clip_on(False)  # a point at 100 is a whole one


def name_points(axes: Axes, points: Sequence[tuple[str, Point]], renderer: Any) -> None:
    """Write each name beside its point, where it covers no other name and no point, if there is such a place.

    The layout must be done: it decides where a point lies.
    """
    from matplotlib.patheffects import withStroke

    halo = [withStroke(linewidth=3, foreground="white")]
    places = [at for _, at in points]
    pixels = axes.transData.transform(np.array(places).reshape(-1, 2))
    taken: list[Any] = []
    for name, at in sorted(points, key=lambda point: (-point[1][1], point[0])):
        tries: list[tuple[int, int, Any, Any]] = []
        for dx, dy, side in (*_NEAR, *_FAR):
            label = axes.annotate(shown(name), at, (dx, dy), textcoords="offset points", fontsize=9, color=INK, ha=side,
                                  path_effects=halo)  # fmt: skip
            box = label.get_window_extent(renderer).padded(4, 1)
            crowd = sum(box.overlaps(other) for other in taken)
            crowd += sum(
                box.padded(0 if of == at else _CLEAR).contains(*pixel) for of, pixel in zip(places, pixels, strict=True)
            )
            crowd += 0 if axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1 else 1
            crowd += 0 if len(tries) < len(_NEAR) or (axes.bbox.y0 <= box.y0 and box.y1 <= axes.bbox.y1) else 1
            tries.append((crowd, len(tries), label, box))
            if not crowd:
                break
        _, kept, _, box = min(tries, key=lambda entry: entry[:2])
        for number, (_, _, label, _) in enumerate(tries):
            if number != kept:
                label.remove()
        if kept >= _BESIDE:
            _lead(axes, at, box)
        taken.append(box)


def _lead(axes: Axes, at: Point, box: Any) -> None:
    """A thin line from a point to the nearest corner of its name."""
    x, y = axes.transData.transform(at)
    corner = (box.x0 if x < box.x0 else min(x, box.x1), box.y0 if y < box.y0 else min(y, box.y1))
    end = axes.transData.inverted().transform(corner)
    axes.plot((at[0], end[0]), (at[1], end[1]), color=MUTED, lw=0.7, zorder=1, scalex=False, scaley=False)


def engines_picture(rows: Sequence[Mapping[str, Any]]) -> bytes | None:
    """PNG of the engines of a run: accuracy, with its interval, against the median latency of one image.

    Args:
        rows: `engines` of `measuring.efficiency`; those without an accuracy are left out.

    Returns:
        None when fewer than two have both figures.
    """
    known = [row for row in rows if row["accuracy"] and row["latency"]["end_to_end"]["p50_ms"]]
    if len(known) < 2:
        return None
    load_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    points = [(row["latency"]["end_to_end"]["p50_ms"], 100 * row["accuracy"]["accuracy"]) for row in known]
    figure = Figure(figsize=(7.0, 4.2), dpi=DPI, layout="constrained", facecolor="white")
    canvas = FigureCanvasAgg(figure)
    axes, best = figure.subplots(), unbeaten(points)
    draw_frontier(axes, [points[k] for k in best])
    for k, (row, (x, y)) in enumerate(zip(known, points, strict=True)):
        color = ACCENT if k in best else MUTED
        low, high = row["accuracy"].get("low"), row["accuracy"].get("high")
        if low is not None and high is not None:
            axes.vlines(x, 100 * low, 100 * high, color=color, lw=1.1, alpha=0.45)
        axes.plot(x, y, "o", ms=7.5, color=color, mfc=color if k in best else "white", mew=1.4)
    figure_name = known[0]["accuracy"].get("figure", "accuracy")
    style_axes(axes, f"{figure_name.capitalize()} against latency", [x for x, _ in points])
    axes.set_xlabel("median latency of one image (ms)", fontsize=10.5, color=MUTED)
    axes.set_ylabel(f"{figure_name} on {known[0]['accuracy']['split']} (%)", fontsize=10.5, color=MUTED)
    figure.draw_without_rendering()  # the layout decides where a point lies
    names = [row["name"] if row["precision"] in row["name"] else f"{row['name']} ({row['precision']})" for row in known]
    name_points(axes, list(zip(names, points, strict=True)), canvas.get_renderer())
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def shown(name: str) -> str:
    """A name that matplotlib writes as it is: without mathematics between dollars."""
    return printable(name).replace("$", r"\$")
