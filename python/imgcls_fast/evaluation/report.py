"""Writes the report of a run, one HTML file that needs nothing else, and the evaluation folder of a split."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from ..core.figures import more_figures
from ..core.files import explained_write, write_json, write_text, write_whole
from ..core.predictions import Predictions
from ..core.text import to_csv
from . import plots as draw
from .metrics import Metrics
from .multilabel import AnyOfMetrics
from .paired import Difference
from .scatter import engines_picture
from .task_report import alternatives, figure_card, file_names, task_context, task_plots
from .tasks import TaskMetrics
from .text import printable, shorten
from .thumbnails import ReadImage, thumbnail

if TYPE_CHECKING:
    from jinja2 import Environment

MAX_TILES = 24
MAX_ROWS = 500  # of a table that could be as long as the data
CONFUSED_PAIRS = 10
PLOTS = {
    "confusion": "Confusion matrix: rows are true classes, columns are predictions",
    "roc": "ROC curves of each class against the rest",
    "precision_recall": "Precision against recall for each class",
    "reliability": "Reliability diagram: accuracy in bins of confidence",
    "coverage": "Accuracy against the share of rows that are answered",
    "curves_loss": "Loss over the epochs",
    "curves_validation": "Validation figures over the epochs",
    "curves_lr": "Learning rate over the epochs",
    "engines": "Accuracy of each engine against the latency of one image",
}


@dataclass(frozen=True, eq=False)
class ReportFacts:
    """Plain facts about one run; what is empty leaves its section out.

    Args:
        name: name of the run.
        splits: split name -> (its predictions, its metrics). The headline comes from "test", else "val", else the
            first.
        read: returns the bytes of an image by its name in the manifest, for thumbnails; none where they cannot be read.
        summary: short facts for the head: model, date, duration, ...
        counts: split name -> (K,) images of each class.
        images, bad, duplicates: numbers of files that were found, put aside, and repeated.
        epochs: one mapping per epoch (see `plots.training_curves`).
        config: (setting, value, reason) of every resolved setting.
        quarantine: (file name, reason) of every file put aside.
        baseline: {"name": str, "accuracy": share on the headline split, optionally "seconds", "train_rows", "train_of" and
            "limit"}, or None.
        against: comparison of the headline's predictions with the baseline's on the same rows; None: not known.
        temperature: temperature by which the scores were calibrated, or None.
        calibration: how it was found, in words.
        env: versions, device, commit, ...
        reproduce: the command that makes this run again.
        commands: command lines for what to do next.
        warnings: warnings about the run, beside those of the metrics.
        efficiency: what `bench` found (tables, data, absent, machine, notices), or None.
    """

    name: str
    splits: Mapping[str, tuple[Predictions, Metrics | TaskMetrics]]
    read: ReadImage
    summary: Mapping[str, Any] = field(default_factory=dict)
    counts: Mapping[str, Sequence[int] | np.ndarray] = field(default_factory=dict)
    images: int = 0
    bad: int = 0
    duplicates: int = 0
    epochs: Sequence[Mapping[str, Any]] = ()
    config: Sequence[tuple[str, Any, str]] = ()
    quarantine: Sequence[tuple[str, str]] = ()
    baseline: Mapping[str, Any] | None = None
    against: Difference | None = None
    temperature: float | None = None
    calibration: str = ""
    env: Mapping[str, Any] = field(default_factory=dict)
    reproduce: str = ""
    commands: Sequence[str] = ()
    warnings: Sequence[str] = ()
    efficiency: Mapping[str, Any] | None = None

    @property
    def headline(self) -> str:
        """The split that the headline speaks of; empty when nothing was judged."""
        return next((name for name in ("test", "val") if name in self.splits), next(iter(self.splits), ""))


def write_report(path: Path, facts: ReportFacts) -> Path:
    """Write one self-contained HTML file (pictures inside, no script, nothing from outside) and return its path.

    Raises:
        HardwareError: H003 when it cannot be written.
    """
    html = page_environment().from_string(template("report.html.j2")).render(_context(facts))
    write_text(path, html)
    return path


def write_evaluation(
    directory: Path, predictions: Predictions, metrics: Metrics | TaskMetrics, plots: Path | None = None
) -> None:
    """Fill the evaluation folder of one split, named after the split.

    Writes metrics.json (without the confusion), per_class.csv, confusion.csv (first column: true class), and the files
    of `Predictions.save`. With `plots`, also `<plot>_<split>.png` there. With several tasks, the names of tables and plots begin
    with that of the task; `any_of` tasks have co_occurrence.csv and answered.csv instead of the confusion: images in which the class
    of the first column holds and the other holds, or was answered, too.

    Raises:
        HardwareError: H003 when a file cannot be written.
    """
    _make(directory)
    if isinstance(metrics, TaskMetrics):
        _write_tasks(directory, metrics)
        pictures = {} if plots is None else task_plots(predictions, metrics)
    else:
        _write_single(directory, metrics)
        pictures = {} if plots is None else draw.judgement_plots(predictions, metrics)
    predictions.save(directory)
    if plots is not None:
        write_plots(plots, {f"{name}_{directory.name}": picture for name, picture in pictures.items()})


def _write_single(directory: Path, metrics: Metrics) -> None:
    facts = metrics.to_dict()
    del facts["confusion"]  # K x K numbers have a file of their own
    write_json(directory / "metrics.json", facts)
    columns = list(facts["per_class"][0])
    lines = [[c[name] for name in columns] for c in facts["per_class"]]
    write_text(directory / "per_class.csv", to_csv([columns, *lines]))
    _write_pairs(directory / "confusion.csv", "truth", metrics.classes, metrics.confusion)


def _write_tasks(directory: Path, metrics: TaskMetrics) -> None:
    facts = metrics.to_dict()
    for one in facts["tasks"].values():
        one.pop("confusion", None)
    write_json(directory / "metrics.json", facts)
    for (name, one), begins in zip(metrics.tasks.items(), file_names(list(metrics.tasks)), strict=True):
        start = f"{begins}_" if begins else ""
        classes = facts["tasks"][name]["per_class"]
        table = [list(classes[0]), *([c[key] for key in classes[0]] for c in classes)]
        write_text(directory / f"{start}per_class.csv", to_csv(table))
        if isinstance(one, AnyOfMetrics):
            _write_pairs(directory / f"{start}co_occurrence.csv", "holds", one.classes, one.together)
            _write_pairs(directory / f"{start}answered.csv", "holds", one.classes, one.answered)
        else:
            _write_pairs(directory / f"{start}confusion.csv", "truth", one.classes, one.confusion)


def _write_pairs(path: Path, first: str, classes: Sequence[str], counts: np.ndarray) -> None:
    table = [[first, *classes], *([name, *row] for name, row in zip(classes, counts.tolist(), strict=True))]
    write_text(path, to_csv(table))


def write_plots(directory: Path, pictures: Mapping[str, bytes]) -> None:
    """Write each picture as `<name>.png`."""
    _make(directory)
    for name, picture in pictures.items():
        write_whole(directory / f"{name}.png", partial(_put, picture))


def _make(directory: Path) -> None:
    with explained_write(directory):
        directory.mkdir(parents=True, exist_ok=True)


def _put(picture: bytes, file: BinaryIO) -> None:
    file.write(picture)


def template(name: str, room: str = "evaluation") -> str:
    """Text of one of the page templates of a room."""
    return resources.files(f"imgcls_fast.{room}").joinpath("templates", name).read_text("utf-8")


def page_environment() -> Environment:
    from jinja2 import Environment, FunctionLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FunctionLoader(template),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: (
            value if hasattr(value, "__html__") else printable(str(value))
        ),  # Markup is escaped already
    )
    environment.globals["narrow"] = Markup(template("narrow.css"))
    environment.filters |= {
        "percent": _percent,
        "number": _number,
        "shorten": lambda name: shorten(printable(name), 40),
    }
    return environment


def _percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f}%" if share == share else "–"


def _number(value: float, digits: int = 3) -> str:
    return f"{value:.{digits}f}" if value == value else "–"


def _context(facts: ReportFacts) -> dict[str, Any]:
    context: dict[str, Any] = {"facts": facts, "split": facts.headline, "metrics": None, "pictures": {}, "alt": PLOTS}
    context |= {"rows": [], "pairs": [], "mistakes": [], "wrong": 0, "verdict": None, "constant": None, "sections": []}
    context["notes"] = list(facts.warnings)
    pictures: dict[str, bytes] = {}
    if facts.headline:
        pictures |= _judged(facts, context)
    context["notes"] += [f"{name}: {text}" for name, (_, m) in facts.splits.items() for text in m.warnings]
    if facts.epochs:
        pictures |= draw.training_curves(facts.epochs)
    if facts.efficiency and (engines := engines_picture(facts.efficiency.get("engines", ()))):
        pictures["engines"] = engines
    context["pictures"] = {name: data_address(picture) for name, picture in pictures.items()}
    context |= {"tiles": _quarantine(facts), "classes": _classes(facts), "max_rows": MAX_ROWS}
    return context


def _judged(facts: ReportFacts, context: dict[str, Any]) -> dict[str, bytes]:
    """Add what was found about the headline's split to the context, and return its pictures."""
    predictions, metrics = facts.splits[facts.headline]
    if isinstance(metrics, TaskMetrics):
        pictures = task_plots(predictions, metrics)
        context |= task_context(predictions, metrics, facts.read, facts.baseline)
        context |= {"alt": {**PLOTS, **alternatives(list(pictures), metrics)}, "verdict": _task_verdict(facts)}
        return pictures
    context |= {
        "metrics": metrics,
        "rows": sorted(metrics.per_class, key=lambda c: (c.support == 0, c.f1)),
        "pairs": _confused_pairs(metrics),
        "mistakes": _mistakes(predictions, facts.read),
        "wrong": int((predictions.truth != predictions.predicted).sum()),
        "verdict": _verdict(metrics, facts.baseline, facts.against),
        "constant": _against_majority(metrics),
        "cards": [figure_card(figure, metrics) for figure in more_figures(single=True)],
    }
    return draw.judgement_plots(predictions, metrics)


def data_address(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def _classes(facts: ReportFacts) -> tuple[str, ...]:
    return facts.splits[facts.headline][0].labels.classes if facts.headline else ()


def _task_verdict(facts: ReportFacts) -> dict[str, Any] | None:
    """Which is better, the model or its baseline, by the share of right answers."""
    if facts.against is None:
        return None
    kind, text = _in_words(facts.against, "the baseline")
    return {"kind": kind, "text": text}


def _verdict(metrics: Metrics, baseline: Mapping[str, Any] | None, against: Difference | None) -> dict[str, Any] | None:
    """Which is better, the model or its baseline, on the same rows? In words, with a colour that is not alone."""
    if baseline is None:
        return None
    accuracy = float(baseline["accuracy"])
    if against is None:
        points = 100 * (metrics.accuracy - accuracy)
        text = f"differs from the baseline by {points:+.1f} points, whose answers were not kept to compare row by row"
        return {"kind": "even", "text": text, "accuracy": accuracy}
    kind, text = _in_words(against, "the baseline")
    if metrics.imbalanced and baseline.get("balanced_accuracy") is not None:
        points, side = 100 * against.balanced_gain, against.balanced_verdict
        told = f"{abs(points):.1f} points {side}" if side != "even" else f"{points:+.1f} points, not surely different"
        shares = f"{_percent(metrics.balanced_accuracy)} against {_percent(baseline['balanced_accuracy'])}"
        text += f"; balanced accuracy {shares}, {told}"
        kind = "even" if kind == "good" and side != "better" else "bad" if side == "worse" else kind
    return {"kind": kind, "text": text, "accuracy": accuracy}


def _in_words(against: Difference, other: str) -> tuple[str, str]:
    """A colour and a comparison in words: a lower accuracy is never called the same, only not surely worse."""
    found = f"on the same {against.rows:,} images"
    if against.low is not None and against.high is not None:
        found = f"95% interval {100 * against.low:+.1f} to {100 * against.high:+.1f}, {found}"
    points = 100 * against.gain
    if against.verdict == "better":
        return "good", f"is better than {other} by {points:.1f} points ({found})"
    if against.verdict == "worse":
        return "bad", f"is worse than {other} by {-points:.1f} points ({found}): check settings and data first"
    if points < 0:
        return "even", f"is not better than {other} ({points:+.1f} points, {found}; too few images to call it worse)"
    return "even", f"cannot be told apart from {other} ({points:+.1f} points, {found})"


def _against_majority(metrics: Metrics) -> dict[str, Any] | None:
    """On imbalanced data: what always answering the largest class reaches, and whether the model is better."""
    if not metrics.imbalanced:
        return None
    majority = metrics.majority
    other = f"the {_percent(majority.accuracy)} of always answering {majority.name}"
    if not majority.against.lost and not majority.against.gained:
        return {"kind": "bad", "text": f"is no better than {other}: it is right about the same images"}
    kind, text = _in_words(majority.against, other)
    return {"kind": kind, "text": text}


def _confused_pairs(metrics: Metrics) -> list[dict[str, Any]]:
    errors = metrics.confusion - np.diag(np.diag(metrics.confusion))
    order = np.argsort(-errors, axis=None, kind="stable")[:CONFUSED_PAIRS]
    names = metrics.classes
    return [
        {"truth": names[t], "predicted": names[p], "count": int(errors[t, p]), "share": errors[t, p] / errors[t].sum()}
        for t, p in zip(*np.unravel_index(order, errors.shape), strict=True)
        if errors[t, p]
    ]


def _mistakes(predictions: Predictions, read: ReadImage) -> list[dict[str, Any]]:
    """The most confident wrong predictions, the most confident first."""
    wrong = np.flatnonzero(predictions.truth != predictions.predicted)
    order = wrong[np.argsort(-predictions.confidence[wrong], kind="stable")][:MAX_TILES]
    classes = predictions.labels.classes
    return [
        {
            "path": predictions.paths[i],
            "truth": classes[predictions.truth[i]],
            "predicted": classes[predictions.predicted[i]],
            "confidence": float(predictions.confidence[i]),
            "own": float(predictions.scores[i, predictions.truth[i]]),
            "picture": thumbnail(read(predictions.paths[i])),
        }
        for i in order
    ]


def _quarantine(facts: ReportFacts) -> list[dict[str, Any]]:
    return [
        {"path": name, "reason": reason, "picture": thumbnail(facts.read(name), partial=True)}
        for name, reason in facts.quarantine[:MAX_TILES]
    ]
