"""Stops politely: SIGTERM and Ctrl-C are remembered, and the loop looks at the next step boundary."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any


@contextmanager
def signal_as_interrupt() -> Iterator[None]:
    """Make SIGTERM raise KeyboardInterrupt, while entered, as Ctrl-C does; without effect outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    former = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)


class StopRequest:
    """Lets, while entered, the first SIGTERM or SIGINT only set `requested`; a second one acts as it would have without us.

    Outside the main thread, where Python allows no handlers, `requested` stays False.

    Args:
        then: called by the handler, after `requested` is set.
    """

    def __init__(self, then: Callable[[], None] = lambda: None) -> None:
        self.requested, self._then = False, then
        self._former: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._former[number] = signal.signal(number, self._remember)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self._restore()
        self._then()

    def _restore(self) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        self._former = {}
