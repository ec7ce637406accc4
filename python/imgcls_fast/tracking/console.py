"""Shows training to a person at a terminal, or to a pipe."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from functools import cached_property
from typing import IO, TYPE_CHECKING, Any

from ..core.env import terminal_moves
from ..core.figures import MONITORS
from ..core.phases import PhaseEvent
from ..core.text import printable
from .beat import BAR_S, LINE_S, Beat, Doing
from .events import (
    BaselineFitted,
    DataRead,
    Done,
    EpochDone,
    Event,
    Failed,
    ImageLeftOut,
    Notice,
    PlanMade,
    Started,
    Stepped,
    Stopped,
    StoppedEarly,
    Validating,
    Warned,
)
from .lines import (
    counted,
    done_facts,
    done_line,
    epoch_line,
    interesting,
    plain_lines,
    plan_line,
    plan_rows,
)

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

MAX_BOX = 100  # columns: a box as wide as a large terminal is hard to read
_WHOLE = 10_000  # columns of a pipe, where nothing is wrapped


class LiveBar:
    """Shows the pace of what goes on in the last line of a terminal; other text may be printed above it.

    Args:
        console: returns the console to draw on; called when something is shown.
        lock: held while the bar changes.
    """

    def __init__(self, console: Callable[[], Console], lock: Any) -> None:
        self._console, self._lock = console, lock
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._shown: tuple[str, int | None] = ("", None)  # description and total of the task

    @property
    def visible(self) -> bool:
        """Whether it is on the screen."""
        return self._bar is not None

    def show(self, what: str, done: int, total: int | None, facts: str) -> None:
        """Draw or change the bar."""
        with self._lock:
            if self._bar is None:
                from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

                columns = (
                    TextColumn("{task.description}"),
                    BarColumn(bar_width=None),
                    TaskProgressColumn(),
                    TextColumn("{task.fields[facts]}"),
                )
                self._bar = Progress(
                    *columns, console=self._console(), transient=True, refresh_per_second=4, expand=True
                )
                self._bar.start()
            if self._task is None or self._shown != (what, total):  # an update cannot forget a total
                if self._task is not None:
                    self._bar.remove_task(self._task)
                self._task, self._shown = self._bar.add_task(what, total=total, facts=facts), (what, total)
            self._bar.update(self._task, description=what, completed=done, total=total, facts=facts)

    def stop(self) -> None:
        """Remove it, if it is there."""
        with self._lock:
            if self._bar is not None:
                self._bar.stop()
                self._bar = self._task = None


class ConsoleSink:
    """What a person sees: the data line, the plan, one line per epoch, a live bar on a terminal, the final box.

    Args:
        stream: where to write; stdout if not given, stderr with `json`.
        quiet: only warnings and the result.
        json: stdout belongs to the JSON answer.
        console: a rich console to use instead (its width and recording).
    """

    def __init__(
        self, stream: IO[str] | None = None, *, quiet: bool = False, json: bool = False, console: Console | None = None
    ) -> None:
        self._stream = console.file if console else stream or (sys.stderr if json else sys.stdout)
        self._given = console
        self.quiet = quiet
        self.warnings: list[str] = []
        self._doing = Doing()
        self._lock = threading.RLock()  # of the bar and of what goes on: an event changes what the beat shows
        self._bar = LiveBar(lambda: self.console, self._lock)
        self._beat = Beat(self._alive, BAR_S if _live_terminal(self._stream) else LINE_S)
        self._handlers: dict[str, Callable[[Any], None]] = {
            "data": self._data,
            "notice": self._lines,
            "plan": self._plan,
            "baseline": self._baseline,
            "start": self._lines,
            "phase": self._phase,
            "progress": self._step,
            "validate": self._step,
            "epoch": self._epoch,
            "stopped_early": self._ended,
            "warning": self._warning,
            "quarantine": self._quarantine,
            "interrupted": self._ended,
            "failed": self._failed,
            "done": self._done,
        }

    @cached_property
    def console(self) -> Console:
        """Made when something is shown: rich takes a tenth of a second to import."""
        return self._given or make_console(self._stream)

    def __call__(self, event: Event) -> None:
        kind = event["event"]
        if kind in self._handlers and (
            not self.quiet or kind in ("warning", "quarantine", "interrupted", "failed", "done")
        ):
            with self._lock:  # the beat reads it
                self._doing(event)
            self._handlers[kind](event)

    def close(self) -> None:
        """Remove the live bar and end the beat, whatever happened."""
        self._beat.close()
        self._bar.stop()

    def _say(self, text: str, style: str = "") -> None:
        """One line that a terminal may wrap but that is never cut: paths and commands stay whole."""
        self._beat.touch()
        self.console.print(printable(text), style=style or None, soft_wrap=True)

    def _lines(self, event: Notice | Started | Stopped | StoppedEarly) -> None:
        for line in plain_lines(event):
            self._say(line)

    def _data(self, event: DataRead) -> None:
        lines = plain_lines(event)
        self._say(lines[0], "bold")
        for line in lines[1:]:
            self._say(line, "dim")

    def _plan(self, event: PlanMade) -> None:
        from rich.table import Table

        self._say(plan_line(event), "bold")
        if not self.console.is_terminal:  # a pipe has no width: a program, or a person with a pager, reads whole lines
            for line in plan_rows(event["rows"]):
                self._say(line)
            return
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
        table.add_column(no_wrap=True, style="dim")
        table.add_column(overflow="fold", style="bold", max_width=32)
        table.add_column(overflow="fold")
        for name, value, reason in interesting(event["rows"]):
            table.add_row(f"  {name}", printable(value), printable(reason))
        self.console.print(table)

    def _baseline(self, event: BaselineFitted) -> None:
        for line in plain_lines(event):
            self._say(line, "cyan")

    def _phase(self, event: PhaseEvent) -> None:
        if self._doing.quiet:
            self._bar.stop()
        else:
            self._beat.start()

    def _step(self, event: Stepped | Validating) -> None:
        self._beat.start()
        if _live_terminal(self._stream):
            self._bar.show(*self._doing.bar())

    def _alive(self) -> None:
        """Called by the beat when nothing was shown for a while."""
        with self._lock:
            if self._doing.quiet:
                return
            if _live_terminal(self._stream):
                self._bar.show(*self._doing.bar())
            else:
                self._say(self._doing.line(), "dim")

    def _epoch(self, event: EpochDone) -> None:
        from rich.text import Text

        self._bar.stop()
        width = self.console.width if self.console.is_terminal else 0
        text = Text(epoch_line(event, width))
        text.highlight_regex(r"\*best$", "bold green")
        lower = not MONITORS[event.get("monitor") or "val/accuracy"].more_is_better
        text.highlight_regex(r"\(\+[^)]*\)", "red" if lower else "green")
        text.highlight_regex(r"\(-[^)]*\)", "green" if lower else "red")
        self._beat.touch()
        self.console.print(text, soft_wrap=True)

    def _warning(self, event: Warned) -> None:
        self.warnings.append(event["text"])
        self._say(f"warning: {event['text']}", "yellow")

    def _quarantine(self, event: ImageLeftOut) -> None:
        self.warnings.append(plain_lines(event)[0])
        self._say(f"warning: {self.warnings[-1]}", "yellow")

    def _ended(self, event: Stopped | StoppedEarly) -> None:
        self._bar.stop()
        self._lines(event)

    def _failed(self, event: Failed) -> None:
        """The error itself is printed by whoever called training."""
        self._bar.stop()
        for line in plain_lines(event):
            if line.startswith(("saved in", "continue with")):
                self._say(line)

    def _done(self, event: Done) -> None:
        self._bar.stop()
        if self.quiet:
            self._say(done_line(event))
            return
        self.console.print(self._box(event), soft_wrap=False)
        for note in event.get("notes") or ():
            self._say(f"note: {note}", "yellow")
        self._say(f"report   {event.get('report') or '-'}", "bold")
        for what, command in event.get("commands") or ():
            self._say(f"{what:<8} {command}")

    def _box(self, event: Done) -> Any:
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
            width=MAX_BOX if self.console.is_terminal and self.console.width > MAX_BOX else None,
            padding=(0, 1),
        )


def _live_terminal(stream: IO[str]) -> bool:
    """Whether a bar can come and go there."""
    return stream.isatty() and terminal_moves()


def make_console(stream: IO[str]) -> Console:
    """A console that takes every text as it is: no markup, no guessing of numbers, no emoji."""
    from rich.console import Console

    whole = None if stream.isatty() else _WHOLE
    return Console(file=stream, markup=False, highlight=False, emoji=False, width=whole)
