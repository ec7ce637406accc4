"""Report that something long goes on: what, how far it is, for how long.

Whoever does something that may take longer than a few seconds wraps it in `phase`, wherever it is; whoever shows it listens
by `heard_by`. Without a listener a phase costs nothing. The listener is that of the calling context and not an argument,
which would have to pass through every function between a command and the loop over its files.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal, TypedDict, TypeVar


class PhaseEvent(TypedDict):
    """Something long begins, goes on or ends."""

    event: Literal["phase"]
    state: Literal["begin", "going", "end"]
    what: str
    done: int
    total: int | None
    unit: str
    seconds: float


Listener = Callable[[PhaseEvent], Any]
T = TypeVar("T")

_EVERY_S = 0.2  # between two events of one phase
_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


class Phase:
    """Something long, while it goes on."""

    def __init__(self, what: str, total: int | None, unit: str, tell: Listener | None) -> None:
        self.what, self.total, self.unit, self.done = what, total, unit, 0
        self._tell, self._began, self._told = tell, time.monotonic(), 0.0

    def to(self, done: int) -> None:
        """Report how many are done so far; cheap enough for each image."""
        self.done = done
        now = time.monotonic()
        if self._tell is not None and now - self._told >= _EVERY_S:
            self._told = now
            self.emit("going")

    def emit(self, state: Literal["begin", "going", "end"]) -> None:
        """Send the event, where somebody listens."""
        if self._tell is not None:
            self._tell(
                PhaseEvent(
                    event="phase",
                    state=state,
                    what=self.what,
                    done=self.done,
                    total=self.total,
                    unit=self.unit,
                    seconds=round(time.monotonic() - self._began, 3),
                )
            )


@contextmanager
def heard_by(listener: Listener) -> Iterator[None]:
    """While entered, `listener` receives the events of phases that begin in this thread."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


@contextmanager
def phase(what: str, total: int | None = None, unit: str = "") -> Iterator[Phase]:
    """While entered, `what` goes on.

    Args:
        what: in the words of a person who waits: "looking at the images".
        total: number of `unit` to be done, where that is known; report how many are with `to`.
    """
    current = Phase(what, total, unit, _listener.get())
    current.emit("begin")
    try:
        yield current
    finally:
        current.emit("end")


def counted_off(things: Iterable[T], current: Phase) -> Iterator[T]:
    """Yield the same things, counting them in a phase."""
    for thing in things:
        yield thing
        current.to(current.done + 1)
