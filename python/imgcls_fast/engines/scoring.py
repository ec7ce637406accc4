"""An engine and rows of a manifest become Predictions: the one way in which anything is judged."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from ..core.batch import Batch
from ..core.manifest import Manifest
from ..core.phases import phase
from ..core.predictions import Predictions
from ..loading.loader import open_loader
from ..loading.sampler import Sampler
from .base import Engine


def predict(
    engine: Engine,
    batches: Iterable[Batch],
    *,
    paths: Sequence[str],
    fingerprint: str = "",
    labelled: bool = True,
    progress: Callable[[int], None] | None = None,
) -> Predictions:
    """Score every batch. Drops padding and returns the rows sorted, each exactly once.

    Args:
        paths: file name of each row of the manifest.
        labelled: whether the batches carry targets.
        progress: gets the number of rows seen so far; may raise to stop.
    """
    rows: list[np.ndarray] = []
    scores: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    seen = 0
    for batch in batches:
        rows.append(np.asarray(batch.rows))
        scores.append(engine.scores(batch.pixels))
        targets.append(np.asarray(batch.targets))
        seen += int((rows[-1] >= 0).sum())
        if progress:
            progress(seen)
    return Predictions.gather(rows, scores, targets if labelled else None, engine.labels, paths, fingerprint)


def score_rows(
    engine: Engine,
    manifest: Manifest,
    rows: np.ndarray,
    *,
    batch_size: int,
    loader: str,
    workers: int,
    bad: dict[int, str] | None = None,
    on_bad: Callable[[int, str, int], None] | None = None,
    labelled: bool = True,
) -> Predictions:
    """Predictions of some rows of a manifest, each exactly once; undecodable rows are left out and reported."""
    sampler = Sampler(manifest, rows, engine.pixels, min(batch_size, engine.max_batch))
    device = str(getattr(engine, "device", "cpu"))
    backend = loader if device != "cpu" or loader != "dali-gpu" else "dali-cpu"
    source = open_loader(sampler, backend, workers=workers, bad=bad, on_bad=on_bad, device=device, once=True)
    try:
        with phase("judging images", len(rows), "images") as current:
            return predict(
                engine, source.epoch(0), paths=manifest.paths, fingerprint=manifest.fingerprint, labelled=labelled,
                progress=current.to,
            )  # fmt: skip
    finally:
        source.close()
