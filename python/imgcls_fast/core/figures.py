"""The table of figures by which a model is judged: add an entry to `FIGURES`, and it can be monitored, is reported and documented.

Standard library only, because `--help` lists the names. `evaluation` computes what an entry reads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["one_of", "any_of"]


@dataclass(frozen=True)
class Figure:
    """One number about the predictions of a split.

    Args:
        name: "val/NAME" is the monitor, "val_NAME" the column of metrics.csv.
        words: what reports call it.
        short: what an epoch line calls it.
        of: reads it from what was judged about one task (`evaluation.metrics.Metrics`, `evaluation.multilabel.AnyOfMetrics`).
        key: its name in metrics.json, where that is another.
        more_is_better: False for losses.
        percent: whether reports show it as a percentage.
        kinds: the kinds of task that it is defined for. Of several tasks it is the mean over those.
        usual: the label spaces in which each epoch records it without being asked: "one_label", "others".
        placed: pages and consoles have a place of their own for it, so that it is not listed among the others.
    """

    name: str
    words: str
    short: str
    of: Callable[[Any], float]
    key: str = ""
    more_is_better: bool = True
    percent: bool = False
    kinds: tuple[Kind, ...] = ("one_of", "any_of")
    usual: tuple[str, ...] = ("one_label", "others")
    placed: bool = False

    @property
    def monitor(self) -> str:
        return f"val/{self.name}"

    @property
    def column(self) -> str:
        return f"val_{self.name}"

    @property
    def field(self) -> str:
        """The key of metrics.json."""
        return self.key or self.name

    def value(self, judged: Any) -> float:
        """The figure of `Metrics`, or its mean over the tasks of `TaskMetrics` for which it is defined; NaN where there are none."""
        tasks = getattr(judged, "tasks", None)
        if tasks is None:
            return float(self.of(judged))
        return mean_defined(self.of(one) for one in tasks.values() if one.kind in self.kinds)


FIGURES: tuple[Figure, ...] = (
    Figure("loss", "log-loss, nats", "val loss", lambda m: m.log_loss, key="log_loss", more_is_better=False, placed=True),
    Figure("accuracy", "accuracy", "val acc", lambda m: m.accuracy, percent=True, placed=True),
    Figure("macro_f1", "macro F1", "f1", lambda m: m.macro_f1, placed=True),
    Figure("balanced_accuracy", "balanced accuracy", "balanced acc", lambda m: m.balanced_accuracy, percent=True, placed=True),
    Figure("macro_ap", "mean average precision", "mAP", lambda m: m.macro_ap, usual=("others",), placed=True),
)
MONITORS: dict[str, Figure] = {figure.monitor: figure for figure in sorted(FIGURES, key=lambda one: not one.more_is_better)}


def mean_defined(values: Iterable[float]) -> float:
    """Mean of the values that are not NaN; NaN where none is."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def more_figures(*, single: bool) -> list[Figure]:
    """The usual figures for which nothing has a place of its own: whoever shows figures lists them after the others."""
    return [figure for figure in usual_figures(single=single) if not figure.placed]


def usual_figures(*, single: bool, monitor: str = "") -> list[Figure]:
    """The figures that an epoch records, in the order of the table.

    Args:
        single: whether the data are one-label data.
        monitor: one that is recorded in any case, like "val/macro_ap".
    """
    space = "one_label" if single else "others"
    return [figure for figure in FIGURES if space in figure.usual or figure.monitor == monitor]
