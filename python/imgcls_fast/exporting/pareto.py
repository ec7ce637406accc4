"""The picture of an export: accuracy against latency of every candidate, and which of them may be compared at all."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..core.files import write_whole
from ..evaluation.paired import Verdict
from ..evaluation.plots import ACCENT, DPI, INK, MUTED, SECOND, load_matplotlib
from ..evaluation.scatter import draw_frontier, name_points, shown, style_axes, unbeaten

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# marker, colour and meaning of each verdict; colours that stay apart with colour blindness
_LOOKS: dict[str, tuple[str, str, str]] = {
    "reference": ("s", INK, "FP32"),
    "pass": ("o", ACCENT, "passes"),
    "underpowered": ("^", SECOND, "too few rows to tell"),
    "fail": ("X", "#b42318", "fails"),
}
_RUNTIMES = {"trt": "TensorRT", "onnx": "ONNX Runtime", "openvino": "OpenVINO", "torch": "PyTorch", "aoti": "AOTInductor",
             "compile": "torch.compile"}  # fmt: skip


@dataclass(frozen=True)
class Candidate:
    """One engine.

    Args:
        name: shown beside its point.
        accuracy: on the rows that all candidates saw, a fraction.
        latency_ms: time of one batch; None: not measured.
        timed_in: the runtime in which the latency was measured.
        verdict: that of the gate; "reference" for the model itself.
        least_accuracy: accuracy of the reference minus the bound of the drop, a fraction; None: no whisker.
        chosen: the one that is exported.
    """

    name: str
    accuracy: float
    latency_ms: float | None
    timed_in: str
    verdict: Verdict | Literal["reference"]
    least_accuracy: float | None = None
    chosen: bool = False

    @property
    def point(self) -> tuple[float, float]:
        """Milliseconds and percent; of a candidate that was not timed, NaN and percent."""
        return math.nan if self.latency_ms is None else self.latency_ms, 100 * self.accuracy


def search_plot(
    path: Path,
    history: Sequence[Mapping[str, Any]],
    reference_ms: float,
    timings: Mapping[str, float],
    excluded: Sequence[str],
    *,
    exported_for: str,
    batch: int,
) -> None:
    """Draw the candidates that a search for INT8 layers has looked at, beside FP32.

    Args:
        history: what the gate has noted of each, at least one.
        reference_ms: latency of FP32.
        timings: latency in milliseconds of each candidate, by name.
        excluded: layers left out of the candidate that was chosen.
    """
    full = history[0]["reference_accuracy"]
    points = [Candidate("fp32", full, reference_ms, "onnx", "reference")]
    for seen in history:
        points.append(
            Candidate(
                seen["name"],
                seen["accuracy"],
                timings.get(seen["name"]),
                "onnx",
                seen["verdict"],
                least_accuracy=full - seen["bound_pp"] / 100,
                chosen=seen["excluded"] == list(excluded),
            )
        )
    figure = "exact match" if "per_label" in history[0] else "accuracy"
    pareto_plot(points, path, exported_for=exported_for, batch=batch, figure=figure)


def frontier(candidates: Iterable[Candidate], exported_for: str) -> list[Candidate]:
    """The candidates that no other one beats in both accuracy and latency, the fastest first.

    Only latencies of the exported runtime are compared, and only what may be exported: the model itself and what passed.
    """
    able = [c for c in candidates if c.verdict in ("reference", "pass")]
    ranked = [c for c in able if c.latency_ms is not None and c.timed_in == exported_for]
    return [ranked[k] for k in unbeaten([c.point for c in ranked])]


def pareto_plot(
    candidates: Sequence[Candidate],
    path: Path,
    *,
    exported_for: str,
    batch: int = 1,
    rows: str = "the search rows",
    figure: str = "accuracy",
) -> None:
    """Write the picture of all candidates as a PNG.

    Latencies of another runtime than the exported one are drawn hollow, labelled, and not ranked: a latency on a
    CPU is no evidence about TensorRT. Candidates without a latency are listed below the picture.

    Args:
        exported_for: the runtime that the export is for.
        batch: images in the batch that was timed.
        rows: the rows that the accuracies were measured on.
        figure: name of the accuracies.

    Raises:
        HardwareError: H003 when the disk refuses.
    """
    drawn = draw(candidates, exported_for=exported_for, batch=batch, rows=rows, figure=figure)
    write_whole(path, lambda file: drawn.savefig(file, format="png", metadata={"Software": None}))


def draw(
    candidates: Sequence[Candidate], *, exported_for: str, batch: int, rows: str, figure: str = "accuracy"
) -> Figure:
    """The figure of `pareto_plot`."""
    load_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(8.6, 5.2), dpi=DPI, layout="constrained", facecolor="white")
    canvas = FigureCanvasAgg(drawn)
    axes = drawn.subplots()
    timed = [c for c in candidates if c.latency_ms is not None]
    own = [c for c in timed if c.timed_in == exported_for]
    draw_frontier(axes, [c.point for c in frontier(candidates, exported_for)])
    for verdict in _LOOKS:
        for hollow in (False, True):
            _points(axes, [c for c in timed if c.verdict == verdict and (c not in own) == hollow], verdict, hollow)
    for c in timed:
        if c.chosen:
            axes.plot(*c.point, "o", ms=17, mfc="none", mec=INK, mew=1.3, ls="", label="exported")
    latencies = [c.latency_ms for c in candidates if c.latency_ms]
    style_axes(axes, f"Candidates for {_runtime(exported_for)}", latencies)
    axes.set_xlabel(f"latency of a batch of {batch} (ms)\n{_where(timed, exported_for)}", fontsize=10, color=MUTED)
    axes.set_ylabel(f"{figure} on {rows} (%)", fontsize=10, color=MUTED)
    if missing := [c for c in candidates if c.latency_ms is None]:
        listed = ", ".join(f"{shown(c.name)} ({100 * c.accuracy:.2f} %, {_LOOKS[c.verdict][2]})" for c in missing)
        drawn.supxlabel(f"not timed: {listed}", fontsize=9, color=MUTED, x=0.01, ha="left", wrap=True)
    if any(c.least_accuracy is not None for c in timed):
        axes.plot([], [], marker="|", ms=13, mew=1.1, color=MUTED, ls="", label="down to the 95 % bound")
    if timed:
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), fontsize=9, frameon=False, labelspacing=0.9)
    else:
        axes.text(0.5, 0.5, "no candidate was timed", transform=axes.transAxes, ha="center", color=MUTED)
        axes.set(xticks=[], yticks=[])
    drawn.draw_without_rendering()  # the layout decides where a point lies
    name_points(axes, [(c.name, c.point) for c in timed], canvas.get_renderer())
    return drawn


def _where(timed: Sequence[Candidate], exported_for: str) -> str:
    """Which latencies are of the exported runtime, and which are not."""
    own = f"timed in {_runtime(exported_for)}" if any(c.timed_in == exported_for for c in timed) else ""
    foreign = ", ".join(sorted({_runtime(c.timed_in) for c in timed if c.timed_in != exported_for}))
    other = f"hollow: timed in {foreign}, which says nothing about {_runtime(exported_for)}" if foreign else ""
    return "; ".join(part for part in (own, other) if part)


def _points(axes: Axes, points: Sequence[Candidate], verdict: str, hollow: bool) -> None:
    if not points:
        return
    marker, color, said = _LOOKS[verdict]
    x, y = zip(*(c.point for c in points), strict=True)
    least = [y if c.least_accuracy is None else min(y, 100 * c.least_accuracy) for y, c in zip(y, points, strict=True)]
    axes.vlines(x, least, y, color=color, lw=1.1, alpha=0.6)
    axes.plot(x, y, marker, ms=8.5, color=color, mfc="white" if hollow else color, mew=1.5,
              label=f"{said}\n(not comparable)" if hollow else said, zorder=3)  # fmt: skip


def _runtime(name: str) -> str:
    return _RUNTIMES.get(name, name)
