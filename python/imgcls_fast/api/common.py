"""What the functions of this room share: the run, the configuration and the device that are meant."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.run import Run
from ..core.runs import find_run, left_unfinished

if TYPE_CHECKING:
    from ..core.config import RunConfig

RunLike = Run | str | Path | None


def run_of(run: RunLike) -> Run:
    """The run that is meant by a path, a name, a Run, or None for the last finished one.

    Warns where a later one was begun and is not finished.
    """
    found = run if isinstance(run, Run) else find_run(run)
    if run in (None, "last") and (later := left_unfinished(found)):
        say_warning(f"the last finished run is meant, {found.name}; {later.name}, begun later, is not finished")
    return found


def config_from(
    data: str | Path | None, file: Path | None, preset: str | None, sets: Sequence[str], overrides: dict[str, Any]
) -> RunConfig:
    """Merge preset, file, overrides and `sets` (each stronger than the one before) to one checked configuration."""
    from ..core.settings import build_config

    return build_config(
        {**({} if data is None else {"data.source": str(data)}), **overrides},
        preset=preset,
        file=file,
        sets=tuple(sets),
    )


def config_of(data: str | Path | None, arguments: dict[str, Any]) -> RunConfig:
    """The configuration of the data functions: the same arguments as `train`, or flags by their Python names."""
    known = {name: arguments.pop(name) for name in ("config", "preset", "sets", "overrides") if name in arguments}
    changes = overrides_from(known.get("overrides"), arguments)
    return config_from(data, known.get("config"), known.get("preset"), known.get("sets", ()), changes)


def overrides_from(overrides: dict[str, Any] | None, settings: dict[str, Any]) -> dict[str, Any]:
    """Dotted setting names to values, from such names and from flags by their Python names."""
    from ..core.flags import python_overrides

    return {**(overrides or {}), **python_overrides(settings)}


def usual_device() -> str:
    """A GPU if there is one, else the CPU."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def say_warning(note: str) -> None:
    """Warn the caller of the function that calls this; an empty note is none."""
    if note:
        import warnings

        from ..core.hints import worded

        warnings.warn(worded(note), stacklevel=3)
