"""Puts events into words: lines without colour, for the console, the log and the final box."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ..core.figures import FIGURES, MONITORS
from ..core.phases import PhaseEvent
from .events import (
    BaselineFitted,
    DataRead,
    Done,
    Ended,
    EpochDone,
    Event,
    Failed,
    PlanMade,
    Started,
    Stepped,
    Stopped,
    StoppedEarly,
)


def plain_lines(event: Event) -> list[str]:
    """Describe an event in lines without colour; none for events that are only live."""
    return _PLAIN.get(event["event"], lambda event: [])(event)


def epoch_line(event: EpochDone, width: int = 0) -> str:
    """One epoch in one line; in a terminal of `width` columns the least important parts are left out (0: keep all).

    The figure that picks the best epoch is always shown, with its change against the best epoch before.
    """
    monitor, delta = event.get("monitor", "val/accuracy"), event.get("delta")
    found: Mapping[str, Any] = event
    shown = (monitor, "val/accuracy", "val/macro_f1", *(["val/macro_ap"] if "val_macro_ap" in found else []))
    figures = [
        f"{figure.short} {short(found.get(figure.column))}"
        + (f" ({_signed(delta)})" if figure.monitor == monitor and delta is not None else "")
        for figure in FIGURES
        if figure.monitor in shown
    ]
    parts = [  # (importance, text)
        (9, f"ep {event['epoch']:>{len(str(event['epochs']))}}/{event['epochs']}"),
        (8, f"loss {short(event.get('train_loss'))}"),
        (9, " ".join(figures)),
        (5, rate(event.get("images_per_s"))),
        (4, f"data {share(event.get('data_share'))}" if event.get("data_share") is not None else ""),
        (3, f"mem {size(event['memory_mb'])}" if event.get("memory_mb") else ""),
        (6, f"eta {clock(event.get('eta_s'))}" if event.get("eta_s") is not None else ""),
        (9, "*best" if event.get("best") else ""),
    ]
    parts = [part for part in parts if part[1]]
    while width and len("  ".join(text for _, text in parts)) > width and min(parts)[0] < 9:
        parts.remove(min(parts))
    return "  ".join(text for _, text in parts)


def progress_line(event: Stepped) -> str:
    """Loss, pace and time left inside an epoch."""
    parts = [
        f"loss {short(event.get('loss'))}",
        rate(event.get("images_per_s")),
        f"data {share(event.get('data_share'))}",
    ]
    return "  ".join([*parts, f"eta {clock(event.get('eta_s'))}"])


def plan_line(event: Mapping[str, Any]) -> str:
    """Size and place of what is about to be trained."""
    parts = [f"{event['parameters'] / 1e6:.1f} M parameters" if event.get("parameters") else ""]
    parts += [
        f"about {size(event['memory_mb'])} of memory" if event.get("memory_mb") else "",
        str(event.get("device") or ""),
    ]
    facts = ", ".join(part for part in parts if part)
    return f"plan: {facts}" + (f" -> {event['run']}" if event.get("run") else "")


def interesting(rows: Iterable[Sequence[Any]]) -> list[tuple[str, str, str]]:
    """The rows of a plan that have a reason, as text."""
    return [(str(name), _value(value), str(reason)) for name, value, reason in rows if reason]


def done_facts(event: Done) -> list[tuple[str, str]]:
    """The lines of the final box."""
    facts = [("accuracy", f"{_fixed(event['accuracy'])}{_interval(event.get('ci'))}")]
    baseline = event.get("baseline")
    if baseline is not None:
        facts.append(("baseline", f"{_fixed(baseline)}, {_against(event, baseline)}"))
    if event.get("imbalanced"):
        facts.append(("largest class", majority_line(event["majority"])))
        facts.append(("balanced", _balanced(event)))
    if "tasks" in event:
        facts += _task_facts(event)
    facts.append(("macro F1", _fixed(event.get("macro_f1"))))
    if "tasks" not in event:
        facts.append(("calibration", f"ECE {_fixed(event.get('ece'))} (0: confidence and accuracy agree)"))
    worst = [f"{name} F1 {_fixed(f1)} ({counted(support, 'image')})" for name, f1, support in event.get("worst") or ()]
    if worst:
        facts.append(("worst", "\n".join(worst)))
    if ended := event.get("ended"):
        facts.append(("stopped" if ended["early"] else "best", ended_line(ended)))
    since = " since the resume" if event.get("resumed") else ""
    around = f"; {clock(event['around_s'])} before and after it{since}" if event.get("around_s") else ""
    facts.append(("time", f"{clock(event.get('seconds'))} training and validation{around}"))
    return facts


def _task_facts(event: Done) -> list[tuple[str, str]]:
    """List what one-label data do not have: exact match, average precision, and each task where there are several."""
    facts = [
        ("exact match", f"{_fixed(event.get('exact_match'))}{_interval(event.get('exact_match_ci'))}"),
        ("average precision", f"{_fixed(event.get('macro_ap'))}{_interval(event.get('macro_ap_ci'))}"),
    ]
    tasks = event["tasks"]
    for task in tasks if len(tasks) > 1 else ():
        figures = f"accuracy {_fixed(task['accuracy'])}, average precision {_fixed(task['macro_ap'])}, F1 {_fixed(task['macro_f1'])}"
        facts.append((task["name"], f"{figures} ({kind_of(task)}, {counted(task['n'], 'image')})"))
    return facts


def kind_of(task: Mapping[str, Any]) -> str:
    """{"kind": "any_of", "classes": 3} -> "any of 3"; instead of their number there may be the "counts" of the classes."""
    classes = task["classes"] if "classes" in task else len(task["counts"])
    return f"{task['kind'].replace('_', ' ')} {classes:,}"


def _against(event: Done, baseline: float) -> str:
    """Better or worse than the baseline on the same images, or neither."""
    against = event.get("against")
    if not against:
        return f"a difference of {event['accuracy'] - baseline:+.3f}"
    return _compared(against)


def _compared(against: Mapping[str, Any]) -> str:
    """Which of two is better on the same images: a lower accuracy is never called the same, only not surely worse."""
    gain, low, high = against["gain"], against.get("low"), against.get("high")
    found = f"on the same {counted(against['rows'], 'image')}"
    if low is not None and high is not None:
        found = f"[{low:+.3f}, {high:+.3f}] {found}"
    if against["verdict"] != "even":
        return f"so {abs(gain):.3f} {against['verdict']}: {found}"
    return f"{'no better' if gain < 0 else 'cannot be told apart'}: {gain:+.3f} {found}"


def majority_line(majority: Mapping[str, Any]) -> str:
    """Compare the model with always answering the most frequent class."""
    against = majority["against"]
    constant = f"{_fixed(majority['accuracy'])} by always answering {majority['class']}"
    if not against["lost"] and not against["gained"]:
        return f"{constant}, no better: right about the same images"
    return f"{constant}, {_compared(against)}"


def _balanced(event: Done) -> str:
    """Balanced accuracy, and how it compares with the baseline's."""
    found, other, against = _fixed(event["balanced_accuracy"]), event.get("baseline_balanced"), event.get("against") or {}
    if other is None or "balanced_verdict" not in against:
        return f"accuracy {found}, where each class counts the same"
    gain = against["balanced_gain"]
    verdict = f"so {abs(gain):.3f} {against['balanced_verdict']}" if against["balanced_verdict"] != "even" else (
        f"{'no better' if gain < 0 else 'cannot be told apart'}: {gain:+.3f}"
    )  # fmt: skip
    return f"accuracy {found}, where each class counts the same; baseline {_fixed(other)}, {verdict}"


def done_line(event: Done) -> str:
    """The result in one line."""
    found = f"{_fixed(event['accuracy'])}{_interval(event.get('ci'))}"
    if event.get("imbalanced"):
        found += f", balanced {_fixed(event['balanced_accuracy'])},"
    if "tasks" in event:
        found += f", average precision {_fixed(event.get('macro_ap'))}, exact match {_fixed(event.get('exact_match'))}"
    return f"{event['split']} accuracy {found} on {counted(event['n'], 'image')} -> {event['run']}"


def _data_lines(event: DataRead) -> list[str]:
    parts = [counted(event["images"], "image"), _asked(event), f"smallest {event['smallest']:,}"]
    if event.get("quarantined"):
        parts.append(f"{event['quarantined']:,} quarantined")
    if event.get("duplicates_removed"):
        parts.append(f"{counted(event['duplicates_removed'], 'duplicate')} across splits removed")
    splits = "  ".join(f"{name} {count:,}" for name, count in (event.get("splits") or {}).items())
    return [
        ", ".join(parts),
        *([f"  {splits}"] if splits else []),
        *(f"  {notice}" for notice in event.get("notices") or ()),
    ]


def _asked(event: Mapping[str, Any]) -> str:
    """Count the classes, or name the tasks where images have other labels than one class."""
    tasks, classes = event.get("tasks") or [], len(event["classes"])
    if len(tasks) > 1:
        listed = [f"{task['name']}: {kind_of(task)}{_unknown(task)}" for task in tasks]
        return f"{counted(len(tasks), 'task')} ({'; '.join(listed)})"
    several = f", any number per image{_unknown(tasks[0])}" if tasks else ""
    return f"{classes:,} class{'es' * (classes != 1)}{several}"


def _unknown(task: Mapping[str, Any]) -> str:
    """Count the images in which the answer is missing; of an `any_of` task those of the class for which most are."""
    most = max((task.get("unknown") or {"": 0}).values())
    return f", unknown in {most:,}" if most else ""


def _plan_lines(event: PlanMade) -> list[str]:
    return [plan_line(event), *plan_rows(event["rows"])]


def plan_rows(rows: Iterable[Sequence[Any]]) -> list[str]:
    """The rows of a plan that have a reason, one whole line each: setting, value, reason."""
    shown = interesting(rows)
    width = max((len(name) for name, _, _ in shown), default=0)
    widest = max((len(value) for _, value, _ in shown if len(value) <= 32), default=0)
    return [f"  {name:<{width}}  {value:<{widest}}  {reason}" for name, value, reason in shown]


def _baseline_lines(event: BaselineFitted) -> list[str]:
    seconds = event.get("seconds")
    took = (
        f" in {seconds:.0f} s"
        if seconds is not None and seconds >= 1
        else f" in {seconds:.1f} s"
        if seconds is not None
        else ""
    )
    more: Mapping[str, Any] = event
    ranked = f", average precision {_fixed(more['macro_ap'])}" if "macro_ap" in more else ""
    found = f"{_fixed(event['accuracy'])}{_interval(event.get('ci'))}{ranked}{took}"
    if event.get("limit"):
        rows = f"{event['train_rows']:,} of {event['train_of']:,} training images (no more in {event['limit']})"
    else:
        rows = counted(event["train_rows"], "training image") if event.get("train_rows") else ""
    fitted = f"; fitted to {rows}" if rows else ""
    lines = [f"linear probe on {event['features']}: {found}", f"  your model must beat this{fitted}"]
    if event.get("imbalanced"):
        majority = event["majority"]
        constant = f"always answering {majority['class']} gives {_fixed(majority['accuracy'])}"
        lines.append(f"  {constant}; balanced accuracy of the probe {_fixed(event['balanced_accuracy'])}")
    return lines


def _start_lines(event: Started) -> list[str]:
    if event.get("resumed"):
        where = f"after batch {event.get('batch', 0):,} of {event['steps_per_epoch']:,}, {counted(event.get('step', 0), 'step')} in all"
        return [f"resumed in epoch {event['epoch']}/{event['epochs']} {where}", *_marks(event)]
    return [
        f"training for {counted(event['epochs'], 'epoch')} of {counted(event['steps_per_epoch'], 'step')}",
        *_marks(event),
    ]


def _marks(event: Started) -> list[str]:
    """What *best and the brackets of the epoch lines mean."""
    if event.get("monitor") is None:
        return []
    sign = "+" if MONITORS[event["monitor"]].more_is_better else "-"
    lines = [f"  *best: {_goal(event['monitor'])} so far, ({sign}.01): its change against the best before"]
    if (patience := event.get("patience")) is not None:
        lines.append(f"  stops early after {counted(patience, 'epoch')} without a better one")
    return lines


def _goal(monitor: str) -> str:
    figure = MONITORS[monitor]
    return f"{'highest' if figure.more_is_better else 'lowest'} {figure.short}"


def _phase_lines(event: PhaseEvent) -> list[str]:
    """How long something took; nothing while it goes on."""
    done = f" ({event['done']:,} {event['unit']})" if event.get("unit") and event["done"] else ""
    return [f"{event['what']}{done}: {clock(event['seconds'])}"] if event["state"] == "end" else []


def _stopped_lines(event: StoppedEarly) -> list[str]:
    when, why, best = _ended(event)
    return [f"stopped early {when}", f"  {why}", f"  {best}"]


def ended_line(event: Ended) -> str:
    """Name the best epoch and its figure, and why training ended before its last epoch, if it did.

    Args:
        event: result of `training.progress.how_it_ended`.
    """
    when, why, best = _ended(event)
    if not event["early"]:
        return f"{best.removeprefix('best: ')}, of {counted(event['epoch'], 'epoch')}"
    return f"{when}: {why}; {best}"


def _ended(event: Ended) -> tuple[str, str, str]:
    name, waited = MONITORS[event["monitor"]].short, event["epoch"] - event["best_epoch"]
    patience = f"{name} has not improved for {counted(waited, 'epoch')} (patience {event['patience']})"
    return (
        f"after epoch {event['epoch']} of {event['epochs']}",
        "stopped by its caller" if event.get("by_caller") else patience,
        f"best: epoch {event['best_epoch']} with {_goal(event['monitor'])}, {_fixed(event['best'])}",
    )


def _failed_lines(event: Failed) -> list[str]:
    facts = [f"  {name}: {text}" for name, text in (("where", event.get("where")), ("why", event.get("why"))) if text]
    saved = [f"saved in {event['path']}"] if event.get("path") else []
    return [f"failed: error[{event['code']}]: {event['message']}", *facts, *saved, *_continued(event)]


def _interrupted_lines(event: Stopped) -> list[str]:
    saved = f"saved in {event['path']}" if event.get("path") else "there is no checkpoint yet"
    return [f"interrupted; {saved}", *_continued(event)]


def _continued(event: Stopped | Failed) -> list[str]:
    return [f"continue with: {event['command']}"] if event.get("command") else []


def _done_lines(event: Done) -> list[str]:
    lines = [done_line(event)]
    lines += [f"  {name}: {value.replace(chr(10), '; ')}" for name, value in done_facts(event)[1:]]
    lines += [f"  note: {note}" for note in event.get("notes") or ()]
    return [*lines, f"  report: {event.get('report') or '-'}"]


_PLAIN: dict[str, Callable[[Any], list[str]]] = {
    "data": _data_lines,
    "notice": lambda event: [event["text"]],
    "plan": _plan_lines,
    "baseline": _baseline_lines,
    "start": _start_lines,
    "epoch": lambda event: [epoch_line(event)],
    "stopped_early": _stopped_lines,
    "phase": _phase_lines,
    "warning": lambda event: [f"warning: {event['text']}"],
    "quarantine": lambda event: [f"{event['path']} cannot be decoded and was taken out: {event['reason']}"],
    "checkpoint": lambda event: [f"checkpoint {event['path']}"],
    "interrupted": _interrupted_lines,
    "failed": _failed_lines,
    "done": _done_lines,
}


def short(number: float | None) -> str:
    """0.4123 -> ".412", 1.5 -> "1.500", nothing or NaN -> "-"."""
    return (
        "-"
        if _missing(number)
        else _fixed(number).replace("0.", ".", 1)
        if abs(number or 0) < 0.9995
        else _fixed(number)
    )


def counted(number: int, noun: str) -> str:
    """(1, "image") -> "1 image", (1200, "image") -> "1,200 images"."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def clock(seconds: float | None) -> str:
    """250 -> "4:10", 3725 -> "1:02:05"."""
    if _missing(seconds):
        return "-"
    whole = round(seconds or 0)
    minutes, rest = divmod(whole, 60)
    return f"{minutes}:{rest:02}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def size(megabytes: float) -> str:
    """7270 -> "7.1G", 812 -> "812M"."""
    return f"{megabytes:.0f}M" if megabytes < 1000 else f"{megabytes / 1024:.1f}G"


def _missing(number: float | None) -> bool:
    return number is None or not math.isfinite(number)


def _fixed(number: float | None) -> str:
    return "-" if _missing(number) else f"{number:.3f}"


def _signed(delta: float) -> str:
    return ("-" if delta < 0 else "+") + short(abs(delta))


def _interval(ci: Sequence[float | None] | None) -> str:
    return f" (95% interval [{ci[0]:.2f}, {ci[1]:.2f}])" if ci and not any(map(_missing, ci)) else ""


def rate(images_per_s: float | None) -> str:
    """1204.4 -> "1,204 img/s"."""
    return "- img/s" if _missing(images_per_s) else f"{images_per_s:,.0f} img/s"


def share(part: float | None) -> str:
    """0.031 -> "3%"."""
    return "-" if _missing(part) else f"{100 * (part or 0):.0f}%"


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return ", ".join(_value(item) for item in value)
    return str(value)
