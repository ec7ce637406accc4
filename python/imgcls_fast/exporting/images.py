"""Real images of a run as the model sees them: for comparing, calibrating and judging exports."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..core import env
from ..core.batch import Batch
from ..core.bundle import Bundle
from ..core.manifest import Manifest
from ..data.loader import open_loader, usual_loader
from ..data.sampler import Sampler


def batches_of(bundle: Bundle, manifest: Manifest, rows: np.ndarray, *, batch_size: int = 32) -> Iterator[Batch]:
    """Batches of some rows, in order, each row once (padding has weight 0); undecodable rows are left out."""
    sampler = Sampler(manifest, rows, bundle.pixels, batch_size)
    backend = usual_loader(bundle.pixels, "cpu")
    loader = open_loader(sampler, backend, workers=min(2, env.usable_cpus()), once=True)
    try:
        yield from loader.epoch(0)
    finally:
        loader.close()


def pixels_of(bundle: Bundle, manifest: Manifest, rows: np.ndarray, *, batch_size: int = 32) -> list[np.ndarray]:
    """(n, S, S, C) uint8 arrays of some rows, without padding."""
    found = []
    for batch in batches_of(bundle, manifest, rows, batch_size=batch_size):
        keep = np.asarray(batch.weight) > 0
        if keep.any():
            found.append(np.ascontiguousarray(np.asarray(batch.pixels)[keep]))
    return found


def comparison_rows(manifest: Manifest, images: int) -> np.ndarray:
    """(n,) int64, at most `images` rows to compare on: test, then val, then train, each in fair order.

    So that whoever looks at the first few only (the reference evaluator of BF16) sees a sample as well.
    """
    picked: list[np.ndarray] = []
    for split in ("test", "val", "train"):
        picked.append(manifest.fair_order(manifest.rows(split))[: max(0, images - sum(map(len, picked)))])
    return np.concatenate(picked)
