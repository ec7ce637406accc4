"""Draws the pictures of a run and of its predictions: functions from plain arrays to the bytes of a PNG.

matplotlib is imported inside the functions, and only its object API is used: no pyplot, so no global figure, no display
and no state shared between threads.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core import env
from ..core.figures import FIGURES
from ..core.labels import THRESHOLD
from ..core.predictions import Predictions
from .metrics import Metrics
from .multilabel import AnyOfMetrics
from .text import printable, shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, GRID, ACCENT, SECOND = "#1c2733", "#64717f", "#e6eaee", "#1f6feb", "#e8710a"
TOO_SURE, TOO_SHY = "#f6c9a3", "#9cc3f7"
# Okabe and Ito's colours (distinguishable with colour blindness), reordered, two added
COLORS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#8c6d1f", "#7b5ea7", "#4d4d4d", "#b5bd00")
MAX_CURVES = 10
MAX_NAMED = 50  # classes with readable tick labels
MAX_COUNTED = 30  # classes with readable counts in the cells
DPI = 130


def training_curves(epochs: Sequence[Mapping[str, Any]]) -> dict[str, bytes]:
    """Draw the epochs: a picture each for loss, validation figures and learning rate, without those that have no value.

    Separate pictures, because three panels in one cannot be read on a phone.

    Args:
        epochs: one mapping per epoch with keys like epoch, train_loss, val_loss, val_accuracy, val_macro_f1, lr.
            Missing keys and None are gaps; other keys are ignored.

    Returns:
        Of "curves_loss", "curves_validation" and "curves_lr" those that show something; without any value an empty loss.
    """
    step = _column(epochs, "epoch")
    step = np.where(np.isfinite(step), step, np.arange(1, len(epochs) + 1))
    losses = {"training": "train_loss", "validation": "val_loss"}
    keys = sorted({key for e in epochs for key in e if key.startswith("val_") and key != "val_loss"})
    words = {figure.column: figure.words for figure in FIGURES if "one_label" not in figure.usual}
    shares = {words.get(key, key[4:].replace("_", " ")): key for key in keys if _bounded(_column(epochs, key))}
    panels = {"loss": losses, "validation": shares, "lr": {"learning rate": "lr"}}
    panels = {t: {n: k for n, k in s.items() if np.isfinite(_column(epochs, k)).any()} for t, s in panels.items()}
    panels = {t: s for t, s in panels.items() if s} or {"loss": {}}
    return {f"curves_{name}": _panel(name, step, series, epochs) for name, series in panels.items()}


def _panel(name: str, step: np.ndarray, series: Mapping[str, str], epochs: Sequence[Mapping[str, Any]]) -> bytes:
    figure = _figure(4.2, 3.3)
    axes = figure.subplots()
    for color, (label, key) in zip(COLORS * 9, series.items(), strict=False):
        values = _column(epochs, key)
        known = np.isfinite(values)
        dot = "o" if known.sum() < 25 else ""
        axes.plot(step[known], values[known], color=color, lw=1.8, marker=dot, ms=3.5, label=label, clip_on=False)
    if name == "loss":
        _mark_lowest(axes, step, _column(epochs, "val_loss"))
    if name == "validation":
        _end_at_one(axes)
    house_style(axes, {"lr": "Learning rate"}.get(name, name.capitalize()), "epoch", "")
    axes.locator_params(axis="x", integer=True)
    if len(series) > 1:
        _legend_below(figure, axes)
    return _png(figure)


def confusion(counts: np.ndarray, classes: Sequence[str]) -> bytes:
    """Heat map of a (K, K) confusion, row = truth: colour is the share of the row, the number is the count."""
    load_matplotlib()
    from matplotlib.colors import PowerNorm

    size = len(classes)
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = float(np.clip(0.36 * size, 3.6, 15.0))
    figure = _figure(side + 1.4, side + 1.9)
    axes = figure.subplots()
    # the square root keeps rare confusions visible beside the diagonal
    picture = axes.imshow(share, cmap="Blues", norm=PowerNorm(0.5, vmin=0, vmax=1), interpolation="nearest")
    if size <= MAX_COUNTED:
        font = 11 if size <= 12 else 8 if size <= 20 else 7
        for row, column in zip(*np.nonzero(counts), strict=True):
            color = "white" if share[row, column] > 0.35 else INK
            axes.text(column, row, f"{counts[row, column]:,}", ha="center", va="center", fontsize=font, color=color)
    house_style(axes, "", "predicted class", "true class")
    axes.grid(False)
    if size <= MAX_NAMED:
        font = 10 if size <= 12 else 8
        names = _labels(classes)
        level = size <= 6 and max(map(len, names)) <= 10
        axes.set_xticks(range(size), names, rotation=0 if level else 90, fontsize=font)
        axes.set_yticks(range(size), names, fontsize=font)
    axes.tick_params(length=0)
    # beneath the axes: beside them it would make the cells too small for a phone
    bar = figure.colorbar(
        picture, ax=axes, location="bottom", fraction=0.035, pad=0.02, aspect=40, ticks=[0, 0.1, 0.25, 0.5, 1]
    )
    bar.set_label("share of the true class", color=MUTED, fontsize=10)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=9, colors=MUTED, length=0)
    return _png(figure)


def roc(predictions: Predictions, metrics: Metrics) -> bytes:
    """ROC curve of each class against the rest (the ten worst when there are more) and their macro average."""
    from sklearn.metrics import roc_curve

    figure = _figure(4.4, 4.9)
    axes = figure.subplots()
    grid = np.linspace(0, 1, 201)
    defined = [k for k, c in enumerate(metrics.per_class) if np.isfinite(c.roc_auc)]
    shown = _worst(defined, [c.roc_auc for c in metrics.per_class])
    names, total = _labels(metrics.classes), np.zeros_like(grid)
    axes.plot([0, 1], [0, 1], color=MUTED, lw=1, ls=":")
    for k in defined:
        false, true, _ = roc_curve(predictions.truth == k, predictions.scores[:, k])
        total += np.interp(grid, false, true)
        if k in shown:
            label = f"{names[k]}  {metrics.per_class[k].roc_auc:.3f}"
            axes.plot(false, true, lw=1.5, color=COLORS[shown.index(k)], label=label)
    if len(defined) > 1:
        axes.plot(grid, total / len(defined), color=INK, lw=2, ls="--", label=f"macro  {metrics.roc_auc:.3f}")
    house_style(
        axes, _which("ROC, one class against the rest", shown, defined), "false positive rate", "true positive rate"
    )
    _square(axes)
    _legend_below(figure, axes, title="area")
    return _png(figure)


def precision_recall(predictions: Predictions, metrics: Metrics | AnyOfMetrics) -> bytes:
    """Precision against recall of each class of one task (the ten worst when there are more)."""
    from sklearn.metrics import precision_recall_curve

    figure = _figure(4.4, 4.9)
    axes = figure.subplots()
    each = np.array([c.average_precision for c in metrics.per_class])
    defined = np.flatnonzero(np.isfinite(each)).tolist()
    shown = _worst(defined, each)
    names = _labels(metrics.classes)
    for k in shown:
        precision, recall, _ = precision_recall_curve(*_held(predictions, k))
        label = f"{names[k]}  {each[k]:.3f}"
        axes.step(recall, precision, where="post", lw=1.5, color=COLORS[shown.index(k)], label=label)
    house_style(axes, _which("Precision and recall", shown, defined), "recall", "precision")
    _square(axes)
    _legend_below(figure, axes, title="average precision")
    return _png(figure)


def _held(predictions: Predictions, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Whether class k holds, and its scores, in the rows in which that is known."""
    if predictions.labels.is_single:
        return predictions.truth == k, predictions.scores[:, k]
    targets = np.asarray(predictions.targets)[:, k]
    known = ~np.isnan(targets)
    return targets[known] >= THRESHOLD, predictions.scores[known, k]


def reliability(metrics: Metrics | AnyOfMetrics) -> bytes:
    """Accuracy in bins of confidence, the gap to honest confidence, and how many rows each bin holds.

    Of an `any_of` task: how often a class holds in bins of its score, over all classes.
    """
    return _png(_reliability(metrics))


def _reliability(metrics: Metrics | AnyOfMetrics) -> Figure:
    bins = metrics.reliability
    single = metrics.kind == "one_of"
    what, of, rows = ("accuracy", "confidence", "rows") if single else ("share that holds", "score", "labels")
    figure = _figure(4.4, 5.2)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3.2, 1])
    used = bins.count > 0
    left, width = bins.edges[:-1][used], np.diff(bins.edges)[used]
    accuracy, confidence = bins.accuracy[used], bins.confidence[used]
    bar = {"align": "edge", "edgecolor": "white", "linewidth": 0.8}
    # opaque and side by side: a gap drawn over the bar has a colour that no legend shows
    shared = np.minimum(accuracy, confidence)
    top.bar(left, shared, width, color=ACCENT, label=what, **bar)
    for gap, color, label in (
        (confidence - accuracy, TOO_SURE, f"{of} above it: too sure"),
        (accuracy - confidence, TOO_SHY, f"{what} above {of}: too cautious"),
    ):
        top.bar(left, np.maximum(gap, 0), width, shared, color=color, label=label, **bar)
    top.plot([0, 1], [0, 1], color=MUTED, lw=1, ls=":", label=f"{of} = {what}")
    house_style(top, f"Reliability: expected calibration error {metrics.ece:.3f}", "", what)
    top.set_xlim(0, 1)
    top.set_ylim(0, 1)
    bottom.bar(left, bins.count[used] / bins.count.sum(), width, color=MUTED, **bar)
    house_style(bottom, "", "confidence (highest score)" if single else "score", f"share of {rows}")
    _legend_below(figure, top, columns=1)
    return figure


def coverage(metrics: Metrics) -> bytes:
    """Accuracy of the most confident share of the rows."""
    return _png(_coverage(metrics))


def _coverage(metrics: Metrics) -> Figure:
    curve = metrics.coverage
    figure = _figure(4.4, 3.8)
    axes = figure.subplots()
    dot = "o" if len(curve.fraction) < 8 else ""
    axes.plot(curve.fraction, curve.accuracy, color=ACCENT, lw=2, marker=dot, ms=4, clip_on=False)
    axes.axhline(metrics.accuracy, color=MUTED, lw=1, ls=":", label=f"all answered: {metrics.accuracy:.3f}")
    house_style(axes, "Accuracy of the most confident", "share of rows answered", "accuracy")
    low = float(min(curve.accuracy.min(), metrics.accuracy))
    axes.set_xlim(0, 1)
    axes.set_ylim(max(0.0, low - 0.12 * (1.01 - low) - 0.01), 1)
    _legend_below(figure, axes)
    return figure


def judgement_plots(predictions: Predictions, metrics: Metrics | AnyOfMetrics) -> dict[str, bytes]:
    """Every picture of one task of a judged split, by name."""
    if isinstance(metrics, AnyOfMetrics):
        return {
            "co_occurrence": co_occurrence(metrics),
            "precision_recall": precision_recall(predictions, metrics),
            "reliability": reliability(metrics),
        }
    return {
        "confusion": confusion(metrics.confusion, metrics.classes),
        "roc": roc(predictions, metrics),
        "precision_recall": precision_recall(predictions, metrics),
        "reliability": reliability(metrics),
        "coverage": coverage(metrics),
    }


def co_occurrence(metrics: AnyOfMetrics) -> bytes:
    """Two heat maps of the images in which the class of the row holds: how many the class of the column holds in, and is answered in.

    With more classes than have readable names, the most frequent ones are shown.
    """
    load_matplotlib()
    support = np.diag(metrics.together)
    order = np.sort(np.argsort(-support, kind="stable")[:MAX_COUNTED])
    names, size = _labels([metrics.classes[k] for k in order]), len(order)
    side = float(np.clip(0.36 * size, 3.0, 11.0))
    figure = _figure(side + 1.4, 2 * side + 2.6)
    panels = {"column class also holds": metrics.together, "column class is answered": metrics.answered}
    picture: Any = None
    for axes, (title, counts) in zip(figure.subplots(2, 1), panels.items(), strict=True):
        shown = counts[np.ix_(order, order)]
        share = shown / np.maximum(support[order], 1)[:, None]
        picture = axes.imshow(share, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
        font = 11 if size <= 12 else 8 if size <= 20 else 7
        for row, column in zip(*np.nonzero(shown), strict=True):
            color = "white" if share[row, column] > 0.55 else INK
            axes.text(column, row, f"{shown[row, column]:,}", ha="center", va="center", fontsize=font, color=color)
        some = "" if size == len(metrics.classes) else f"\n(the {size} most frequent of {len(metrics.classes)})"
        house_style(axes, f"Row class holds, {title}{some}", "", "class that holds")
        axes.grid(False)
        level = size <= 6 and max(map(len, names)) <= 10
        axes.set_xticks(range(size), names, rotation=0 if level else 90, fontsize=10 if size <= 12 else 8)
        axes.set_yticks(range(size), names, fontsize=10 if size <= 12 else 8)
        axes.tick_params(length=0)
    bar = figure.colorbar(picture, ax=figure.axes, location="bottom", fraction=0.02, pad=0.02, aspect=40)
    bar.set_label("share of the images of the row's class", color=MUTED, fontsize=10)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=9, colors=MUTED, length=0)
    return _png(figure)


def _figure(width: float, height: float) -> Figure:
    load_matplotlib()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")


def load_matplotlib() -> None:
    """Import matplotlib; in the command line without the `matplotlibrc` of the current folder.

    It would be read before all others, whoever put it there, and can have LaTeX run on a text of its own, or be no text at all.
    """
    if "matplotlib" in sys.modules or not env.folder_is_distrusted():
        return
    env.lend_matplotlib_home()
    exists = os.path.exists
    os.path.exists = lambda path: (
        path != "matplotlibrc" and exists(path)
    )  # the only question that matplotlib asks about it
    try:
        import_module("matplotlib")
    finally:
        os.path.exists = exists


def _png(figure: Figure) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", bbox_inches="tight", pad_inches=0.1, metadata={"Software": None})
    return out.getvalue()


def house_style(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, loc="left", fontsize=12, color=INK, pad=10)
    axes.set_xlabel(x, fontsize=10.5, color=MUTED)
    axes.set_ylabel(y, fontsize=10.5, color=MUTED)
    axes.tick_params(labelsize=10, colors=INK, length=0, pad=5)
    axes.grid(True, color=GRID, lw=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color("#c4ccd4")


def _square(axes: Axes) -> None:
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    for line in axes.lines:
        line.set_clip_on(False)  # a curve along the edge keeps its width
    axes.set_aspect("equal")


def _end_at_one(axes: Axes) -> None:
    """Let an axis of shares end at 1: there is nothing above."""
    axes.set_ylim(max(0.0, axes.get_ylim()[0]), 1)


def _legend_below(figure: Figure, axes: Axes, title: str | None = None, columns: int | None = None) -> None:
    """Write the legend beneath all axes, where it covers no curve."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        most = max(map(len, labels))
        columns = columns or (3 if most < 14 else 2 if most < 24 else 1)
        legend = figure.legend(handles, labels, loc="outside lower center", ncols=min(columns, len(handles)), fontsize=9,
                               title=title, title_fontsize=9, frameon=False)  # fmt: skip
        legend.get_title().set_color(MUTED)


def _labels(classes: Sequence[str]) -> list[str]:
    """Class names that matplotlib can draw: no mathematics between dollars, no characters that the font lacks."""
    from matplotlib.font_manager import findfont, get_font

    font = get_font(findfont("DejaVu Sans"))
    out = []
    for k, name in enumerate(classes):
        text = shorten(printable(name).replace("\n", " "), 24)
        drawable = all(font.get_char_index(ord(c)) for c in text)
        text = text.replace("$", r"\$") if drawable else f"class {k}"
        out.append(f" {text}" if text.startswith("_") else text)  # a leading _ hides an entry from the legend
    return out


def _worst(defined: Sequence[int], figures: Sequence[float] | np.ndarray) -> list[int]:
    return sorted(sorted(defined, key=lambda k: figures[k])[:MAX_CURVES])


def _which(title: str, shown: Sequence[int], defined: Sequence[int]) -> str:
    return title if len(shown) == len(defined) else f"{title}\n(the {len(shown)} lowest of {len(defined)} classes)"


def _column(epochs: Sequence[Mapping[str, Any]], key: str) -> np.ndarray:
    values = [e.get(key) for e in epochs]
    return np.array([float(v) if isinstance(v, Real) else np.nan for v in values])


def _bounded(values: np.ndarray) -> bool:
    known = values[np.isfinite(values)]
    return bool(len(known) and known.min() >= 0 and known.max() <= 1)


def _mark_lowest(axes: Axes, step: np.ndarray, values: np.ndarray) -> None:
    if np.isfinite(values).any():
        best = int(np.nanargmin(values))
        axes.plot(step[best], values[best], marker="o", ms=9, mfc="none", mec=INK, mew=1.2)
        point = step[best], values[best]
        axes.annotate("lowest", point, (0, 9), textcoords="offset points", ha="center", fontsize=9, color=MUTED)
