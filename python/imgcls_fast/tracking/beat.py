"""Shows a sign of life while nothing else is shown: a bar after half a second, a line every ten seconds in a pipe."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from ..core.phases import PhaseEvent
from .events import Event, Stepped, Validating
from .lines import clock, progress_line

LINE_S, BAR_S = 10.0, 0.5  # of silence, before a line in a pipe, before a bar on a terminal


class Beat:
    """Calls `show` from a thread of its own after each `every_s` seconds without `touch`, until `close`."""

    def __init__(self, show: Callable[[], Any], every_s: float) -> None:
        self._show, self._every_s = show, every_s
        self._touched = time.monotonic()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin, unless it has begun."""
        if self._thread is None:
            self.touch()
            self._ended.clear()
            self._thread = threading.Thread(target=self._run, name="imgcls-beat", daemon=True)
            self._thread.start()

    def touch(self) -> None:
        """Something was shown just now."""
        self._touched = time.monotonic()

    def close(self) -> None:
        """End, and wait for a line that is being shown."""
        if self._thread is not None:
            self._ended.set()
            if self._thread is not threading.current_thread():
                self._thread.join()
            self._thread = None

    def _run(self) -> None:
        while not self._ended.wait(max(0.01, self._touched + self._every_s - time.monotonic())):
            if time.monotonic() - self._touched >= self._every_s:
                self.touch()
                try:
                    self._show()
                except (OSError, ValueError):  # whoever read the pipe has gone, or the stream is closed
                    return


class Doing:
    """What goes on at the moment, from events: the innermost phase, or the progress of an epoch."""

    def __init__(self) -> None:
        self._phases: list[tuple[PhaseEvent, float]] = []  # open ones with the time of their begin, the innermost last
        self._step: Stepped | Validating | None = None  # the newest "progress" or "validate" of the epoch that runs

    def __call__(self, event: Event) -> None:
        if event["event"] == "phase":
            self._phase(event)
        elif event["event"] == "progress" or event["event"] == "validate":
            self._step = event
        else:
            self._step = None

    def _phase(self, event: PhaseEvent) -> None:
        self._step = None
        same = [k for k, (open_, _) in enumerate(self._phases) if open_["what"] == event["what"]]
        if event["state"] == "begin":
            self._phases.append((event, time.monotonic()))
        elif same and event["state"] == "end":
            del self._phases[same[-1] :]
        elif same:
            self._phases[same[-1]] = (event, self._phases[same[-1]][1])

    @property
    def quiet(self) -> bool:
        """Whether nothing goes on."""
        return self._step is None and not self._phases

    def bar(self) -> tuple[str, int, int | None, str]:
        """Description, done, total (None: not known) and facts, for a bar."""
        if (step := self._step) is not None:
            if step["event"] == "validate":
                return f"ep {step['epoch']} validation", step["done"], step["total"], ""
            return f"ep {step['epoch']}/{step['epochs']}", step["step"], step["steps"], progress_line(step)
        event, began = self._phases[-1]
        return event["what"], event["done"], event["total"], clock(time.monotonic() - began)

    def line(self) -> str:
        """The same as a line."""
        what, done, total, facts = self.bar()
        if self._step is not None:
            return f"  {what}: {done:,} of {total:,}  {facts}".rstrip()
        unit = self._phases[-1][0]["unit"]
        count = f": {done:,} of {total:,} {unit}".rstrip() if total else f": {done:,} {unit}".rstrip() if done else ""
        return f"  {what}{count}, {facts}"
