"""Lays out a sheet of lanes: one line per row of a benchmark, its name on the left, its figures on the right, notes beneath.

Everything is placed in inches, so that the sheet grows with its rows and no text is cut off, however long it is. matplotlib
is imported inside the functions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..evaluation.plots import DPI, GRID, INK, MUTED, load_matplotlib
from ..evaluation.text import printable, shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 9.6  # inches
_MARGIN = 0.16
_NAMES = (1.5, 3.4)  # least and greatest width of the names
_LONGEST = 150  # characters of a name, of which the middle is then left out
_LINE = 1.34  # height of a line of text / its size
_BODY, _SMALL, _FINE = 9.5, 8.5, 8.0  # points
_HINTS = 0.52  # inches between texts and axes, for a legend and for hints above the axes
_FOOT = 0.56  # for ticks and the name of the axis


@dataclass(frozen=True)
class Lane:
    """One line.

    Args:
        name: at the left.
        said: its figures, at the right.
        color: color of the figures; None: that of any text.
    """

    name: str
    said: str
    color: str | None = None


@dataclass(frozen=True)
class Sheet:
    """A figure with the place of every lane.

    Args:
        axes: its y axis counts inches downwards.
        centres: group -> y of its lanes.
        legend_at: upper left corner of a legend, in inches of the figure.
    """

    figure: Figure
    axes: Axes
    centres: Mapping[str, Sequence[float]]
    legend_at: tuple[float, float]


@dataclass
class Ruler:
    """Widths of texts, as matplotlib will draw them."""

    _renderer: Any = field(init=False)

    def __post_init__(self) -> None:
        load_matplotlib()
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self._renderer = FigureCanvasAgg(Figure(dpi=DPI)).get_renderer()

    def width(self, text: str, size: float, weight: str = "normal") -> float:
        """Inches of one line."""
        from matplotlib.font_manager import FontProperties

        font = FontProperties(size=size, weight=weight)
        return float(self._renderer.get_text_width_height_descent(text, font, ismath=False)[0]) / DPI

    def wrap(self, text: str, limit: float, size: float, weight: str = "normal") -> list[str]:
        """Lines of at most `limit` inches; a word that is longer is broken."""
        lines: list[str] = []
        for word in printable(text).split():
            if lines and self.width(f"{lines[-1]} {word}", size, weight) <= limit:
                lines[-1] += f" {word}"
            else:
                lines += self._pieces(word, limit, size, weight)
        return lines or [""]

    def _pieces(self, word: str, limit: float, size: float, weight: str) -> list[str]:
        pieces = [""]
        for letter in word:
            if pieces[-1] and self.width(pieces[-1] + letter, size, weight) > limit:
                pieces.append("")
            pieces[-1] += letter
        return pieces


@dataclass
class _Texts:
    """Blocks of text from the top of the sheet downwards."""

    ruler: Ruler
    y: float = _MARGIN
    placed: list[tuple[float, float, str, dict[str, Any]]] = field(default_factory=list)

    def block(self, text: str, size: float, color: str, weight: str = "normal", gap: float = 0.06) -> None:
        lines = self.ruler.wrap(text, WIDTH - 2 * _MARGIN, size, weight)
        self.put(_MARGIN, self.y, lines, size, color, weight=weight, va="top")
        self.y += height(len(lines), size) + gap

    def beneath(self, notes: Sequence[str], foot: Sequence[str]) -> None:
        for note in notes:
            self.block(note, _SMALL, INK)
        self.y += 0.06 if notes else 0.0
        for line in foot:
            self.block(line, _FINE, MUTED, gap=0.0)
        self.y += _MARGIN

    def draw(self, figure: Figure, whole: float) -> None:
        """On a figure that is `whole` inches high."""
        for x, y, text, style in self.placed:
            figure.text(
                x, whole - y, text, transform=figure.dpi_scale_trans, parse_math=False, linespacing=1.2, **style
            )

    def put(self, x: float, y: float, lines: Sequence[str], size: float, color: str, **style: Any) -> None:
        self.placed.append((x, y, "\n".join(lines), {"fontsize": size, "color": color, **style}))


def height(lines: int, size: float) -> float:
    """Inches that lines of text need."""
    return lines * size * _LINE / 72


def lay_out(
    title: str,
    about: str,
    groups: Mapping[str, Sequence[Lane]],
    notes: Sequence[str],
    foot: Sequence[str],
    *,
    hints: bool = False,
) -> Sheet:
    """The sheet with all its texts, and empty axes.

    Args:
        groups: heading -> its lanes.
        notes: told beneath the axes.
        foot: small, at the bottom.
        hints: leave room for a legend, and for a line above the axes.
    """
    ruler = Ruler()
    texts = _Texts(ruler)
    texts.block(title, 12.5, INK, "bold")
    texts.block(about, _BODY, MUTED)
    legend = texts.y
    top = texts.y = texts.y + (_HINTS if hints else 0.0)
    lanes = [lane for group in groups.values() for lane in group]
    names = {lane.name: ruler.wrap(shorten(printable(lane.name), _LONGEST), _NAMES[1], _BODY) for lane in lanes}
    widest = max((ruler.width(line, _BODY) for lines in names.values() for line in lines), default=0.0)
    left = 2 * _MARGIN + min(max(widest, _NAMES[0]), _NAMES[1])
    right = WIDTH - 2 * _MARGIN - max((ruler.width(lane.said, _BODY) for lane in lanes), default=0.0)
    centres: dict[str, list[float]] = {}
    for heading, group in groups.items():
        centres[heading] = _group(texts, heading, group, names, left, right)
    bottom = texts.y = texts.y + 0.04
    texts.y += _FOOT
    texts.beneath(notes, foot)
    return _built(texts, (left, right), (top, bottom), centres, legend)


def lay_beneath(notes: Sequence[str], foot: Sequence[str]) -> tuple[float, Callable[[Figure], None]]:
    """Notes and foot of another figure of this width: the inches that they need, and what writes them at its bottom."""
    texts = _Texts(Ruler())
    texts.beneath(notes, foot)
    return texts.y, lambda figure: texts.draw(figure, texts.y)


def _group(
    texts: _Texts, heading: str, lanes: Sequence[Lane], names: Mapping[str, list[str]], left: float, right: float
) -> list[float]:
    """Place the texts of one group, and return the centres of its lanes."""
    lines = texts.ruler.wrap(heading, WIDTH - 2 * _MARGIN, _BODY, "bold")
    paper = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # a long heading reaches into the axes
    texts.put(_MARGIN, texts.y + 0.09, lines, _BODY, INK, weight="bold", va="top", bbox=paper)
    texts.y += height(len(lines), _BODY) + 0.11
    centres = []
    for lane in lanes:
        tall = max(0.25, height(len(names[lane.name]), _BODY) + 0.07)
        centres.append(texts.y + tall / 2)
        texts.put(left - _MARGIN, centres[-1], names[lane.name], _BODY, INK, ha="right", va="center_baseline")
        texts.put(right + _MARGIN, centres[-1], [lane.said], _BODY, lane.color or INK, va="center_baseline")
        texts.y += tall
    return centres


def _built(
    texts: _Texts,
    across: tuple[float, float],
    down: tuple[float, float],
    centres: Mapping[str, Sequence[float]],
    legend: float,
) -> Sheet:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    whole = texts.y
    figure = Figure(figsize=(WIDTH, whole), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    (left, right), (top, bottom) = across, down
    axes = figure.add_axes((left / WIDTH, 1 - bottom / whole, (right - left) / WIDTH, (bottom - top) / whole))
    axes.set_ylim(bottom, top)
    for y in (y for group in centres.values() for y in group):
        axes.axhline(y, color=GRID, lw=0.8, zorder=0)
    axes.set_yticks([])
    axes.tick_params(labelsize=9, colors=INK, length=0, pad=5)
    axes.grid(True, axis="x", color=GRID, lw=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color("#c4ccd4")
    texts.draw(figure, whole)
    return Sheet(figure, axes, centres, (_MARGIN, whole - legend))
