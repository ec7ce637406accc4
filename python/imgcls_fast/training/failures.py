"""Records a run that fails: an event, a line in the log, and the command that continues it."""

from __future__ import annotations

import re
from contextlib import suppress
from types import TracebackType

import torch

from ..core.diary import began_training
from ..core.errors import ConfigError, HardwareError, ImgclsError, Interrupted, ModelError, UsageError
from ..core.places import delete_run_files, remove_if_empty
from ..core.run import Run
from ..core.runs import forget
from ..tracking.events import Emit, Failed, Stopped

_NO_MEMORY = re.compile(r"out of memory|can't allocate memory|cannot allocate memory", re.IGNORECASE)


class Recorded:
    """Records errors in the run, while entered, before they go on: as a `failed` event and in log.txt.

    An error that nobody raised on purpose, memory that ran out, goes on as one with a code; an interruption has been
    recorded already, but for one that came before or after the work that is done under `signal_as_interrupt`.

    Args:
        run: the run that goes on; None for a new one, and `run` is set when it is made. One that is refused is removed.
    """

    def __init__(self, run: Run | None, emit: Emit) -> None:
        self.run, self._emit, self._new = run, emit, run is None

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
            self._emit(Stopped(event="interrupted", path=path, command=command))
            return
        known = explained(error, run)
        refused = run if run and self._new and _refused(error, run) else None
        if refused:
            command = ""
        self._emit(
            Failed(
                event="failed",
                code=known.code if known else "X001",
                message=known.message if known else f"{type(error).__name__}: {error}",
                where=known.where if known else "",
                why=known.why if known else "",
                path=path,
                command=command,
            )
        )
        if refused:
            with suppress(OSError):  # what cannot be deleted must not hide the error
                forget(refused)
                delete_run_files(refused.directory)
                refused.unlock()
                remove_if_empty(refused.directory)
        if known is not None and known is not error:
            raise known from error


def _refused(error: BaseException, run: Run) -> bool:
    """Return whether a new run was refused before its first step because the request was wrong: there is nothing to continue.

    A run that met bad data, a full disk or memory that ran out stays: its log and quarantine.csv are wanted, or it goes on.
    """
    wrong = isinstance(error, UsageError | ConfigError | ModelError) or getattr(error, "code", "") in ("H001", "H004")
    return wrong and not began_training(run.directory)


def explained(error: BaseException, run: Run | None) -> ImgclsError | None:
    """Return the error with a code that explains what happened; None where nobody foresaw it."""
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
