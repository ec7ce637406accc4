"""Real images of a run as the model sees them: for comparing, calibrating and judging exports."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from ..core import env
from ..core.batch import Batch
from ..core.bundle import Bundle
from ..core.config import DataConfig
from ..core.manifest import Manifest
from ..core.phases import phase
from ..core.undecoded import Undecoded
from ..data.prepare import scan_to_judge
from .loader import open_loader, usual_loader
from .sampler import Sampler


def batches_of(
    bundle: Bundle, manifest: Manifest, rows: np.ndarray, left: Undecoded, *, batch_size: int = 32
) -> Iterator[Batch]:
    """Batches of some rows, in order, each row once (padding has weight 0); undecodable ones are left out, into `left`."""
    sampler = Sampler(manifest, rows, bundle.pixels, batch_size)
    backend = usual_loader(bundle.pixels, "cpu")
    loader = open_loader(sampler, backend, workers=min(2, env.usable_cpus()), once=True, on_bad=left.of(manifest))
    try:
        yield from loader.epoch(0)
    finally:
        loader.close()


@phase("reading images")
def pixels_of(
    bundle: Bundle, manifest: Manifest, rows: np.ndarray, left: Undecoded, *, batch_size: int = 32
) -> list[np.ndarray]:
    """(n, S, S, C) uint8 arrays of some rows, without padding; undecodable ones are left out, into `left`."""
    found = []
    for batch in batches_of(bundle, manifest, rows, left, batch_size=batch_size):
        keep = np.asarray(batch.weight) > 0
        if keep.any():
            found.append(np.ascontiguousarray(np.asarray(batch.pixels)[keep]))
    return found


def more_rows(data: DataConfig, source: Path, bundle: Bundle, say: Callable[[str], None]) -> Manifest:
    """Labelled images of elsewhere, with the classes of a model; what the scan leaves out is said."""
    found = scan_to_judge(data, source, bundle.pixels, bundle.labels)
    bad = Undecoded({file.path: file.reason for file in found.quarantine})
    for sentence in filter(None, (bad.sentence(), *found.notices)):
        say(f"{source}: {sentence}")
    return found.manifest


def comparison_rows(manifest: Manifest, images: int) -> np.ndarray:
    """(n,) int64, at most `images` rows to compare on: test, then val, then train, each in fair order.

    So that whoever looks at the first few only (the reference evaluator of BF16) sees a sample as well.
    """
    picked: list[np.ndarray] = []
    for split in ("test", "val", "train"):
        picked.append(manifest.fair_order(manifest.rows(split))[: max(0, images - sum(map(len, picked)))])
    return np.concatenate(picked)
