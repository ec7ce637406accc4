"""Check, divide and describe images before they are trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..core import env
from .common import config_of


def check_data(data: str | Path | None = None, **arguments: Any) -> dict[str, Any]:
    """Scan images as `train` would, and tell everything that is wrong with them; changes nothing.

    Returns:
        ok, line (the summary), problems, quarantine (path and reason of each), notices, classes and counts.
    """
    from ..data.digits import write_digits
    from ..data.prepare import training_options
    from ..data.scan import inspect

    config = config_of(data, arguments)
    source = Path(config.data.source) if config.data.source else write_digits(env.cache_dir())
    found = inspect(source, training_options(config))
    return found.to_dict()


def split_data(
    data: str | Path | None = None, *, out: str | Path | None = None, force: bool = False, **arguments: Any
) -> dict[str, Any]:
    """Divide images into train, val and test, and write split.csv, which `train` takes as data.

    Args:
        out: the table to write, ending in .csv; None: split.csv, where there is none yet.
        force: replace a file that is not this very split; never the table that is read.

    Returns:
        path of the file, images per split (of several labels per image also those of each), notices.

    Raises:
        UsageError: U002 when the file may not be written there; DataError as `train`.
    """
    from ..core.outputs import SPLIT, claim_file, demand_new
    from ..data.prepare import per_split, prepare
    from ..data.split import write_split_csv

    config = config_of(data, arguments)
    inputs = [Path(config.data.source)] if config.data.source else []
    path = claim_file(Path(out), SPLIT, force=force, inputs=inputs) if out else demand_new(Path("split.csv"), SPLIT)
    prepared = prepare(config)
    write_split_csv(path, prepared.manifest, keep=not force)
    names = ("images", "splits", "quarantined", "duplicates_removed", "notices")
    answer = {"path": str(path), **{name: prepared.facts()[name] for name in names}}
    return answer if prepared.manifest.labels.is_single else {**answer, "per_split": per_split(prepared.manifest)}


def data_stats(data: str | Path | None = None, **arguments: Any) -> dict[str, Any]:
    """Counts of classes and splits, image sizes, aspect ratios, channel means."""
    from ..data.prepare import prepare, statistics

    config = config_of(data, arguments)
    asked = config.pixels.bits
    return statistics(prepare(config), None if asked == "auto" else asked, config.data.max_megapixels)
