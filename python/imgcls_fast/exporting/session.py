"""Runs one export: writes the file, compares it with the original, judges and times it. On any failure nothing is published."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from ..core.bundle import read_bundle
from ..core.exports import Export, way_of
from ..core.files import plain_path
from ..core.run import Run
from ..core.settings import replace_settings
from ..core.targets import TARGETS, Way
from ..data.prepare import more_rows
from ..engines.as_found import as_found
from .materials import Materials

Maker = Callable[[Materials, Way], Export]


def maker_of(target: str) -> Maker:
    """The function that makes a target; its module, and what that imports, is loaded only now."""
    module, _, function = TARGETS[target].maker.partition(":")
    found: Maker = getattr(import_module(f".{module}", __package__), function)
    return found


def export_bundle(materials: Materials, target: str, precision: str | None = None) -> Export:
    """Make one export.

    Args:
        target: one of `TARGETS`.
        precision: fp32, fp16, bf16 or int8; None: the target's usual one.

    Raises:
        ConfigError: C003 for an unknown target or precision, C004 for a precision that the target does not have.
        ExportError: E001 to E004; GateFailed: E901, E902, E903; HardwareError: H001, H003, H004.
    """
    way = way_of(target, precision)
    return maker_of(target)(materials, way)


@as_found()
def export_run(
    run: Run,
    target: str,
    precision: str | None,
    changes: Mapping[str, Any],
    *,
    say: Callable[[str], None],
    progress: Callable[[str, float], None] | None = None,
) -> Export:
    """Export the bundle of a run, with its settings and `changes` to them (dotted names). See `api.export`."""
    run.demand_own_places()
    bundle = read_bundle(run.bundle_path)
    config = replace_settings(run.config, dict(changes))
    source = config.export.gate_data
    extra = more_rows(config.data, Path(source), bundle, say) if source else None
    materials = Materials(
        bundle,
        run.manifest,
        plain_path(run.directory) / run.exports.name,
        config.export,
        seed=config.train.seed,
        extra=extra,
        strict="export.max_drop" in changes,
        run=str(run.directory),
        say=say,
        progress=progress,
    )
    try:
        made = export_bundle(materials, target, precision)
    finally:
        for use, left in materials.undecoded.items():
            say(f"{use} images: {left.sentence()}") if left else None
    return Export(run.exports / made.folder.name, made.meta)
