"""What a run leaves behind when it fails: an event, a line in the log, and the command that continues it."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch

from ..core.errors import HardwareError, ImgclsError, Interrupted
from ..core.run import Run

_NO_MEMORY = re.compile(r"out of memory|can't allocate memory|cannot allocate memory", re.IGNORECASE)


class Recorded:
    """While entered, an error is recorded in the run before it goes on: as a `failed` event and in log.txt.

    An error that nobody raised on purpose, memory that ran out, goes on as one with a code; an interruption has been
    recorded already, but for one that came before or after the work that is done under `signal_as_interrupt`.

    Args:
        run: None as long as there is none; `run` is set when it is made.
    """

    def __init__(self, run: Run | None, emit: Callable[[dict[str, Any]], None]) -> None:
        self.run, self._emit = run, emit

    def __enter__(self) -> Recorded:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or isinstance(error, Interrupted | GeneratorExit):
            return
        run = self.run
        last = run.checkpoints / "last" if run else None
        path = str(last) if last and last.exists() else None
        command = run.resume_command if run and run.manifest_path.exists() else ""  # it is the last file of a beginning
        if isinstance(error, KeyboardInterrupt):
            self._emit({"event": "interrupted", "path": path, "command": command})
            return
        known = explained(error, run)
        self._emit({
            "event": "failed",
            "code": known.code if known else "X001",
            "message": known.message if known else f"{type(error).__name__}: {error}",
            "where": known.where if known else "",
            "why": known.why if known else "",
            "path": path,
            "command": command,
        })  # fmt: skip
        if known is not None and known is not error:
            raise known from error


def explained(error: BaseException, run: Run | None) -> ImgclsError | None:
    """The error with a code that tells a user what happened; None where nobody foresaw it."""
    if isinstance(error, ImgclsError):
        if error.code == "D015" and run:
            error.try_ = f"bring the files back, then {run.resume_command}"
        return error
    text = str(error)
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and _NO_MEMORY.search(text)
    ):
        return HardwareError(
            "H002",
            f"memory ran out: {text.splitlines()[0] if text else type(error).__name__}",
            try_=f"free some memory, then {run.resume_command if run else 'begin again'}"
            "   (or a new run with a smaller --batch-size or --model)",
        )
    return None
