"""What passes through a sink.

An event is a plain dict that JSON can hold, with its kind under "event": data, notice, plan, baseline, start, progress, epoch,
validate, stopped_early, warning, quarantine, checkpoint, interrupted, failed, done. A sink ignores kinds that it does not know.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

Event = dict[str, Any]
_PACKAGE = str(Path(__file__).resolve().parents[1])


@contextmanager
def warnings_as_events(emit: Callable[[Event], Any]) -> Iterator[None]:
    """While entered, what this package warns of becomes `warning` events, each text once; warnings of libraries go on as before."""
    before, seen = warnings.showwarning, set()

    def show(message: Any, category: Any, filename: str, *rest: Any, **more: Any) -> None:
        if not filename.startswith(_PACKAGE):
            before(message, category, filename, *rest, **more)
        elif str(message) not in seen:
            seen.add(str(message))
            emit({"event": "warning", "text": str(message)})

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


class Sink(Protocol):
    """Anything that can be called with an event and closed at the end."""

    def __call__(self, event: Event) -> None: ...

    def close(self) -> None: ...
