"""An engine and rows of a manifest become Predictions: the one way in which anything is judged."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import closing

import numpy as np

from ..core.batch import Batch
from ..core.manifest import Manifest
from ..core.phases import phase
from ..core.predictions import Predictions
from ..loading.loader import read_rows
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
    return Predictions.gather(rows, scores, targets if labelled else None, engine.labels, paths, fingerprint, engine.thresholds)


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
    """Predictions of some rows of a manifest, each exactly once; undecodable rows are left out and reported.

    Args:
        batch_size, loader, workers, bad, on_bad: as for `read_rows`; no batch is larger than the engine takes.
        labelled: whether the rows carry targets.

    Raises:
        DataError, HardwareError, ConfigError: as `read_rows`.
    """
    batches = read_rows(
        manifest,
        rows,
        engine.pixels,
        batch_size=min(batch_size, engine.max_batch),
        backend=loader,
        workers=workers,
        device=str(getattr(engine, "device", "cpu")),
        bad=bad,
        on_bad=on_bad,
    )
    with closing(batches), phase("judging images", len(rows), "images") as current:
        return predict(
            engine,
            batches,
            paths=manifest.paths,
            fingerprint=manifest.fingerprint,
            labelled=labelled,
            progress=current.to,
        )
