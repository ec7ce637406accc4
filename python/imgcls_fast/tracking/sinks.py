"""Sends the events of training to sinks. A sink shows or stores what happened; it decides nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from ..core.diary import append_event, append_log
from ..core.phases import PhaseEvent
from .events import Event, Warned
from .lines import plain_lines

if TYPE_CHECKING:
    from ..core.run import Run


class Sinks:
    """Several sinks as one. A sink that fails never stops training: it is reported once, and the others go on."""

    def __init__(self, sinks: Iterable[Callable[[Any], Any]]) -> None:
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
                    self._guarded(other, lambda other=other: other(Warned(event="warning", text=text)))  # type: ignore[misc]


class LogSink:
    """events.jsonl (every event but the live ones) and log.txt (one readable line each) of a run directory."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def __call__(self, event: Event) -> None:
        if event["event"] in ("progress", "validate") or (event["event"] == "phase" and not _took_long(event)):
            return
        append_event(self.run.directory, event)
        for line in plain_lines(event):
            append_log(self.run.directory, f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {line}")

    def close(self) -> None:
        """Nothing stays open between events."""


def _took_long(event: PhaseEvent) -> bool:
    """Whether a phase has ended that a person had to wait for."""
    return event["state"] == "end" and event["seconds"] >= 1

