"""Where the events of training go: one table of sinks. A sink shows or stores what happened; it decides nothing.

An event is a plain dict that JSON can hold, with its kind under "event": data, notice, plan, baseline, start, progress, epoch,
validate, warning, quarantine, checkpoint, interrupted, failed, done. A sink ignores kinds that it does not know.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import IO, TYPE_CHECKING, Any, Protocol

from .core.text import printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

    from .core.run import Run

Event = dict[str, Any]
MAX_BOX = 100  # columns: a box as wide as a large terminal is hard to read


class Sink(Protocol):
    """Anything that can be called with an event and closed at the end."""

    def __call__(self, event: Event) -> None: ...

    def close(self) -> None: ...


class Sinks:
    """Several sinks as one. A sink that fails never stops training: that is said once, and the others go on."""

    def __init__(self, sinks: Iterable[Callable[[Event], Any]]) -> None:
        self.sinks = list(sinks)
        self._failed: set[int] = set()

    def __call__(self, event: Event) -> None:
        for sink in self.sinks:
            self._guarded(sink, lambda sink=sink: sink(event))  # type: ignore[misc]

    def close(self) -> None:
        """Close every sink that can be closed."""
        for sink in self.sinks:
            close = getattr(sink, "close", None)
            if close is not None:
                self._guarded(sink, close)

    def _guarded(self, sink: Any, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:  # noqa: BLE001 - a tracker's network, a full disk: hours of work weigh more
            if id(sink) in self._failed:
                return
            self._failed.add(id(sink))
            text = f"{type(sink).__name__} failed and may miss events: {type(error).__name__}: {error}"
            for other in self.sinks:
                if id(other) not in self._failed:
                    self._guarded(other, lambda other=other: other({"event": "warning", "text": text}))  # type: ignore[misc]


class LogSink:
    """events.jsonl (every event but the live ones) and log.txt (one readable line each) of a run directory."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def __call__(self, event: Event) -> None:
        if event["event"] in ("progress", "validate"):
            return
        self.run.append_event(event)
        for line in plain_lines(event):
            self.run.append_log(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {line}")

    def close(self) -> None:
        """Nothing stays open between events."""


class ConsoleSink:
    """What a person sees: the data line, the plan, one line an epoch, a live bar on a terminal, the final box.

    Args:
        stream: where to write; stdout if not given, stderr with `json`.
        quiet: only warnings and the result.
        json: stdout belongs to the JSON answer.
        console: a rich console to use instead (its width and recording).
    """

    def __init__(
        self, stream: IO[str] | None = None, *, quiet: bool = False, json: bool = False, console: Console | None = None
    ) -> None:
        self.console = console or make_console(stream or (sys.stderr if json else sys.stdout))
        self.quiet = quiet
        self.warnings: list[str] = []
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._handlers: dict[str, Callable[[Event], None]] = {
            "data": self._data, "notice": self._lines, "plan": self._plan, "baseline": self._baseline, "start": self._lines,
            "progress": self._progress, "validate": self._validate, "epoch": self._epoch, "warning": self._warning,
            "quarantine": self._quarantine, "interrupted": self._interrupted, "failed": self._failed, "done": self._done,
        }  # fmt: skip

    def __call__(self, event: Event) -> None:
        kind = event["event"]
        if kind in self._handlers and (
            not self.quiet or kind in ("warning", "quarantine", "interrupted", "failed", "done")
        ):
            self._handlers[kind](event)

    def close(self) -> None:
        """Remove the live bar, whatever happened."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = self._task = None

    def _say(self, text: str, style: str = "") -> None:
        """One line that a terminal may wrap but that is never cut: paths and commands stay whole."""
        self.console.print(printable(text), style=style or None, soft_wrap=True)

    def _lines(self, event: Event) -> None:
        for line in plain_lines(event):
            self._say(line)

    def _data(self, event: Event) -> None:
        lines = plain_lines(event)
        self._say(lines[0], "bold")
        for line in lines[1:]:
            self._say(line, "dim")

    def _plan(self, event: Event) -> None:
        from rich.table import Table

        self._say(plan_line(event), "bold")
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
        table.add_column(no_wrap=True, style="dim")
        table.add_column(overflow="fold", style="bold", max_width=32)
        table.add_column(overflow="fold")
        for name, value, reason in interesting(event["rows"]):
            table.add_row(f"  {name}", printable(value), printable(reason))
        self.console.print(table)

    def _baseline(self, event: Event) -> None:
        for line in plain_lines(event):
            self._say(line, "cyan")

    def _progress(self, event: Event) -> None:
        parts = [
            f"loss {short(event.get('loss'))}",
            _rate(event.get("images_per_s")),
            f"data {_share(event.get('data_share'))}",
        ]
        parts.append(f"eta {clock(event.get('eta_s'))}")
        self._live(f"ep {event['epoch']}/{event['epochs']}", event["step"], event["steps"], "  ".join(parts))

    def _validate(self, event: Event) -> None:
        self._live(f"ep {event['epoch']} validation", event["done"], event["total"], "")

    def _live(self, what: str, done: int, total: int, facts: str) -> None:
        if not self.console.is_terminal or self.console.is_dumb_terminal:
            return  # in a pipe or a file a bar would be noise
        if self._bar is None:
            from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                TaskProgressColumn(),
                TextColumn("{task.fields[facts]}"),
            )
            self._bar = Progress(*columns, console=self.console, transient=True, refresh_per_second=4, expand=True)
            self._task = self._bar.add_task(what, total=total, facts=facts)
            self._bar.start()
        assert self._task is not None
        self._bar.update(self._task, description=what, completed=done, total=total, facts=facts)

    def _epoch(self, event: Event) -> None:
        from rich.text import Text

        self.close()
        width = self.console.width if self.console.is_terminal else 0
        text = Text(epoch_line(event, width))
        text.highlight_regex(r"\*best$", "bold green")
        text.highlight_regex(r"\(\+[^)]*\)", "green")
        text.highlight_regex(r"\(-[^)]*\)", "red")
        self.console.print(text, soft_wrap=True)

    def _warning(self, event: Event) -> None:
        self.warnings.append(event["text"])
        self._say(f"warning: {event['text']}", "yellow")

    def _quarantine(self, event: Event) -> None:
        self.warnings.append(plain_lines(event)[0])
        self._say(f"warning: {self.warnings[-1]}", "yellow")

    def _interrupted(self, event: Event) -> None:
        self.close()
        self._lines(event)

    def _failed(self, event: Event) -> None:
        """The error itself is printed by whoever called training."""
        self.close()
        for line in plain_lines(event):
            if line.startswith(("saved in", "continue with")):
                self._say(line)

    def _done(self, event: Event) -> None:
        self.close()
        if self.quiet:
            self._say(done_line(event))
            return
        self.console.print(self._box(event), soft_wrap=False)
        for note in event.get("notes") or ():
            self._say(f"note: {note}", "yellow")
        self._say(f"report   {event.get('report') or '-'}", "bold")
        for what, command in event.get("commands") or ():
            self._say(f"{what:<8} {command}")

    def _box(self, event: Event) -> Any:
        from rich.panel import Panel
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
        table.add_column(no_wrap=True, style="dim")
        table.add_column(overflow="fold")
        for name, value in done_facts(event):
            table.add_row(name, Text(printable(value, keep="\n"), style="bold" if name == "accuracy" else ""))
        title = Text(f" {event['split']}: {counted(event['n'], 'image')} ", style="bold")
        return Panel(
            table,
            title=title,
            title_align="left",
            expand=False,
            width=None if self.console.width <= MAX_BOX else MAX_BOX,
            padding=(0, 1),
        )


SINKS: dict[str, Callable[..., Sink]] = {"console": ConsoleSink, "log": LogSink}


def make_console(stream: IO[str]) -> Console:
    """A console that takes every text as it is: no markup, no guessing of numbers, no emoji."""
    from rich.console import Console

    return Console(file=stream, markup=False, highlight=False, emoji=False)


def plain_lines(event: Event) -> list[str]:
    """What an event says, as lines without colour; none for events that are only live."""
    return _PLAIN.get(event["event"], lambda event: [])(event)


def epoch_line(event: Event, width: int = 0) -> str:
    """One epoch in one line; in a terminal of `width` columns the least important parts are left out (0: keep all)."""
    delta = event.get("delta")
    accuracy = f"val acc {short(event.get('val_accuracy'))}" + (f" ({_signed(delta)})" if delta is not None else "")
    parts = [  # (importance, text)
        (9, f"ep {event['epoch']:>{len(str(event['epochs']))}}/{event['epochs']}"),
        (8, f"loss {short(event.get('train_loss'))}"),
        (9, f"{accuracy} f1 {short(event.get('val_macro_f1'))}"),
        (5, _rate(event.get("images_per_s"))),
        (4, f"data {_share(event.get('data_share'))}" if event.get("data_share") is not None else ""),
        (3, f"mem {size(event['memory_mb'])}" if event.get("memory_mb") else ""),
        (6, f"eta {clock(event.get('eta_s'))}" if event.get("eta_s") is not None else ""),
        (9, "*best" if event.get("best") else ""),
    ]
    parts = [part for part in parts if part[1]]
    while width and len("  ".join(text for _, text in parts)) > width and min(parts)[0] < 9:
        parts.remove(min(parts))
    return "  ".join(text for _, text in parts)


def plan_line(event: Event) -> str:
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


def done_facts(event: Event) -> list[tuple[str, str]]:
    """The lines of the final box."""
    facts = [("accuracy", f"{_fixed(event['accuracy'])}{_interval(event.get('ci'))}")]
    baseline = event.get("baseline")
    if baseline is not None:
        facts.append(("baseline", f"{_fixed(baseline)}, {_against(event, baseline)}"))
    facts.append(("macro F1", _fixed(event.get("macro_f1"))))
    facts.append(("calibration", f"ECE {_fixed(event.get('ece'))} (0: confidence and accuracy agree)"))
    worst = [f"{name} F1 {_fixed(f1)} ({counted(support, 'image')})" for name, f1, support in event.get("worst") or ()]
    if worst:
        facts.append(("worst", "\n".join(worst)))
    facts.append(("time", clock(event.get("seconds"))))
    return facts


def _against(event: Event, baseline: float) -> str:
    """Better or worse than the baseline on the same images, or neither."""
    against = event.get("against")
    if not against:
        return f"a difference of {event['accuracy'] - baseline:+.3f}"
    gain, low, high = against["gain"], against.get("low"), against.get("high")
    found = f"on the same {counted(against['rows'], 'image')}"
    if low is not None and high is not None:
        found = f"[{low:+.3f}, {high:+.3f}] {found}"
    if against["verdict"] == "even":
        return f"cannot be told apart: {gain:+.3f} {found}"
    return f"so {abs(gain):.3f} {against['verdict']}: {found}"


def done_line(event: Event) -> str:
    """The result in one line."""
    found = f"{_fixed(event['accuracy'])}{_interval(event.get('ci'))}"
    return f"{event['split']} accuracy {found} on {counted(event['n'], 'image')} -> {event['run']}"


def _data_lines(event: Event) -> list[str]:
    classes = len(event["classes"])
    parts = [
        counted(event["images"], "image"),
        f"{classes:,} class{'es' * (classes != 1)}",
        f"smallest {event['smallest']:,}",
    ]
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


def _plan_lines(event: Event) -> list[str]:
    return [
        plan_line(event),
        *(f"  {name} = {value}   ({reason})" for name, value, reason in interesting(event["rows"])),
    ]


def _baseline_lines(event: Event) -> list[str]:
    seconds = event.get("seconds")
    took = (
        f" in {seconds:.0f} s"
        if seconds is not None and seconds >= 1
        else f" in {seconds:.1f} s"
        if seconds is not None
        else ""
    )
    found = f"{_fixed(event['accuracy'])}{_interval(event.get('ci'))}{took}"
    lines = [f"linear probe on {event['features']}: {found} - your model must beat this"]
    if event.get("limit"):
        rows = f"{event['train_rows']:,} of {event['train_of']:,} training images"
        lines.append(f"  fitted to {rows} (no more in {event['limit']})")
    elif event.get("train_rows"):
        lines.append(f"  fitted to {counted(event['train_rows'], 'training image')}")
    return lines


def _start_lines(event: Event) -> list[str]:
    if event.get("resumed"):
        return [
            f"resumed in epoch {event['epoch']}/{event['epochs']} after step {event.get('step', 0)} of {event['steps_per_epoch']}"
        ]
    return [f"training for {counted(event['epochs'], 'epoch')} of {counted(event['steps_per_epoch'], 'step')}"]


def _failed_lines(event: Event) -> list[str]:
    facts = [f"  {name}: {event[name]}" for name in ("where", "why") if event.get(name)]
    saved = [f"saved in {event['path']}"] if event.get("path") else []
    return [f"failed: error[{event['code']}]: {event['message']}", *facts, *saved, *_continued(event)]


def _interrupted_lines(event: Event) -> list[str]:
    saved = f"saved in {event['path']}" if event.get("path") else "there is no checkpoint yet"
    return [f"interrupted; {saved}", *_continued(event)]


def _continued(event: Event) -> list[str]:
    return [f"continue with: {event['command']}"] if event.get("command") else []


def _done_lines(event: Event) -> list[str]:
    lines = [done_line(event)]
    lines += [f"  {name}: {value.replace(chr(10), '; ')}" for name, value in done_facts(event)[1:]]
    lines += [f"  note: {note}" for note in event.get("notes") or ()]
    return [*lines, f"  report: {event.get('report') or '-'}"]


_PLAIN: dict[str, Callable[[Event], list[str]]] = {
    "data": _data_lines,
    "notice": lambda event: [event["text"]],
    "plan": _plan_lines,
    "baseline": _baseline_lines,
    "start": _start_lines,
    "epoch": lambda event: [epoch_line(event)],
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
    return f" [{ci[0]:.2f}, {ci[1]:.2f}]" if ci and not any(map(_missing, ci)) else ""


def _rate(images_per_s: float | None) -> str:
    return "- img/s" if _missing(images_per_s) else f"{images_per_s:,.0f} img/s"


def _share(share: float | None) -> str:
    return "-" if _missing(share) else f"{100 * (share or 0):.0f}%"


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return ", ".join(_value(item) for item in value)
    return str(value)
