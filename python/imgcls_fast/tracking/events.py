"""What passes through a sink.

An event is a plain dict that JSON can hold, with its kind under "event": data, notice, plan, baseline, start, progress, epoch,
validate, stopped_early, warning, quarantine, checkpoint, interrupted, failed, done. A sink ignores kinds that it does not know.
"""

from __future__ import annotations

from typing import Any, Protocol

Event = dict[str, Any]


class Sink(Protocol):
    """Anything that can be called with an event and closed at the end."""

    def __call__(self, event: Event) -> None: ...

    def close(self) -> None: ...
