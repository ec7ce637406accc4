"""Shows the figures of a judged split, for `eval`, whatever kind of labels its images have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..core.figures import more_figures
from .show import facts, say, share, table

MANY_CLASSES = 30  # beyond this only the worst are listed
_ONE_OF = {"precision": "precision", "recall": "recall", "f1": "F1"}  # columns of the table of classes
_ANY_OF = {**_ONE_OF, "average_precision": "AP", "threshold": "threshold"}
_MEANS = ("accuracy", "exact_match", "macro_f1", "macro_ap", "log_loss")
_OF_A_TASK = ("accuracy", "exact_match", "macro_f1", "macro_ap", "balanced_accuracy", "roc_auc", "log_loss", "ece")


def headline(metrics: Mapping[str, Any]) -> str:
    """The first line: accuracy, and what else must not be overlooked.

    Args:
        metrics: result of `Metrics.to_dict` or `TaskMetrics.to_dict`.
    """
    accuracy = f"{share(metrics['accuracy'])}{_interval(metrics.get('accuracy_ci'))}"
    if "tasks" not in metrics:
        return f"accuracy {accuracy}" + (f", balanced {share(metrics['balanced_accuracy'])}," if metrics["imbalanced"] else "")
    exact = f"all labels right {share(metrics['exact_match'])}{_interval(metrics.get('exact_match_ci'))}"
    if all(task["kind"] == "one_of" for task in metrics["tasks"].values()):
        return f"mean accuracy {accuracy}, {exact}"
    return f"mAP {share(metrics['macro_ap'])}{_interval(metrics.get('macro_ap_ci'))}, labels right {accuracy}, {exact}"


def show_judged(console: Any, line: str, metrics: Mapping[str, Any], told: Sequence[str]) -> None:
    """Print everything; warnings that are in `told` are not repeated as notes."""
    from ..tracking.lines import counted

    say(console, line, "bold")
    tasks = metrics.get("tasks")
    if tasks is None:
        _show_single(console, metrics)
    else:
        if len(tasks) > 1:
            say(console, f"means over {counted(len(tasks), 'task')}; exact match: images with every answer right")
            facts(console, {name: share(metrics.get(name)) for name in (*_MEANS, *_more())}, 2)
        for name, task in tasks.items():
            if len(tasks) > 1:
                say(console, f"{name}: {counted(task['n'], 'image')}", "bold")
            facts(console, {figure: share(task.get(figure)) for figure in (*_OF_A_TASK, *_more()) if figure in task}, 2)
            _show_classes(console, task.get("per_class") or [], _ANY_OF if task["kind"] == "any_of" else _ONE_OF)
    for text in (text for text in metrics.get("warnings") or () if text not in told):
        say(console, f"note: {text}", "yellow")


def _more() -> list[str]:
    return [figure.field for figure in more_figures(single=False)]


def _show_single(console: Any, metrics: Mapping[str, Any]) -> None:
    from ..tracking.lines import majority_line

    if metrics["imbalanced"]:
        say(console, f"  largest class: {majority_line(metrics['majority'])}")
    names = ("macro_f1", "balanced_accuracy", "roc_auc", "log_loss", "ece", *(f.field for f in more_figures(single=True)))
    top = {f"top-{k} accuracy": share(value) for k, value in (metrics.get("top_k") or {}).items() if str(k) != "1"}
    facts(console, {**top, **{name: share(metrics.get(name)) for name in names if name in metrics}}, 2)
    _show_classes(console, metrics.get("per_class") or [], _ONE_OF)


def _show_classes(console: Any, classes: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> None:
    """A line per class; of many classes the worst."""
    if len(classes) > MANY_CLASSES:
        worst = sorted(classes, key=lambda found: -1.0 if found["f1"] is None else found["f1"])[:MANY_CLASSES]
        say(console, f"the {MANY_CLASSES} worst of {len(classes)} classes:")
        classes = worst
    rows = ([c["name"], c["support"], *(share(c[name]) for name in columns)] for c in classes)
    table(console, ["class", "images", *columns.values()], rows, numbers=range(1, len(columns) + 2))


def _interval(ci: Sequence[float | None] | None) -> str:
    return f" [{ci[0]:.3f}, {ci[1]:.3f}]" if ci and None not in ci else ""
