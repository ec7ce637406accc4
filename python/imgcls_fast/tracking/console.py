"""What a person at a terminal, or a pipe, sees of training."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import IO, TYPE_CHECKING, Any

from ..core.text import printable
from .events import Event
from .lines import (
    clock,
    counted,
    done_facts,
    done_line,
    epoch_line,
    interesting,
    plain_lines,
    plan_line,
    rate,
    share,
    short,
)

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

MAX_BOX = 100  # columns: a box as wide as a large terminal is hard to read


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
            rate(event.get("images_per_s")),
            f"data {share(event.get('data_share'))}",
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


def make_console(stream: IO[str]) -> Console:
    """A console that takes every text as it is: no markup, no guessing of numbers, no emoji."""
    from rich.console import Console

    return Console(file=stream, markup=False, highlight=False, emoji=False)
