"""Train a classifier, or show what training would do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..core.run import Run
from ..core.runs import last_begun
from .common import RunLike, config_from, overrides_from, run_of


def train(
    data: str | Path | None = None,
    *,
    resume: RunLike = None,
    config: Path | None = None,
    preset: str | None = None,
    sets: Sequence[str] = (),
    overrides: dict[str, Any] | None = None,
    sinks: Sequence[Callable[[dict[str, Any]], Any]] = (),
    command: Sequence[str] | None = None,
    **settings: Any,
) -> Run:
    """Train a classifier from images to a judged bundle and a report; or continue a run.

    Args:
        data: the images; None: the embedded handwritten digits.
        resume: a run to continue instead ("last" for the one that was begun last).
        config: YAML file with the sections of RunConfig.
        preset: name of a shipped preset.
        sets: "section.field=value" strings.
        overrides: dotted setting names to values.
        sinks: callables that receive the events of training.
        command: the command line, stored in env.json.
        settings: flags by their Python names: `model="resnet50", epochs=10, img_size=224, label_col="color,size"`.

    Returns:
        The finished run.

    Raises:
        ImgclsError: with a code, the cause and what to do; Interrupted after a signal, with the work saved.
    """
    from ..core.settings import from_sets

    changes = overrides_from(overrides, settings)
    found = None if resume is None else last_begun() if resume == "last" else run_of(resume)  # before torch is imported
    from ..training import session

    if found is not None:
        return session.resume(found, changes | from_sets(sets), sinks)
    return session.start(config_from(data, config, preset, sets, changes), sinks, command)


def plan(
    data: str | Path | None = None,
    *,
    config: Path | None = None,
    preset: str | None = None,
    sets: Sequence[str] = (),
    overrides: dict[str, Any] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """What `train` would do, with measured estimates of memory (MB) and time (s); trains nothing.

    Returns:
        rows of (setting, value, reason), parameters, memory_mb, seconds_per_epoch and seconds of all epochs (training and
        validation), left_out (of these times), epochs, device, data, config.

    Raises:
        ImgclsError: as `train`.
    """
    from ..training.estimate import dry_run

    return dry_run(config_from(data, config, preset, sets, overrides_from(overrides, settings)))


def demo(*, out: str | Path | None = None, sinks: Sequence[Callable[[dict[str, Any]], Any]] = ()) -> Run:
    """Train on the embedded handwritten digits: no network, no GPU, under 90 s on two cores."""
    return train(None, sinks=sinks, overrides={"out": str(out)} if out else None, command=["imgcls-fast", "demo"])
