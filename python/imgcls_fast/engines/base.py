"""The Engine protocol, and the one way to turn an engine and batches into Predictions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from ..core.batch import Batch
from ..core.manifest import LabelSpace
from ..core.pixels import Pixels
from ..core.predictions import Predictions


@runtime_checkable
class Engine(Protocol):
    """Pixels in, calibrated probabilities out.

    `scores` takes (N, H, W, C) uint8 (NumPy, or a torch tensor for torch runtimes) with N up to `max_batch` and gives
    (N, K) float32. `precision` is what the runtime really computes in.
    """

    labels: LabelSpace
    pixels: Pixels
    max_batch: int
    thread_safe: bool
    runtime: str
    precision: str

    def scores(self, pixels: Any) -> np.ndarray:
        """(N, K) float32 probabilities of (N, H, W, C) uint8 pixels."""
        ...

    def warmup(self, n: int) -> None:
        """Run once at batch size `n`, so that the first answer is not slower than the others."""
        ...

    def close(self) -> None:
        """Free what the runtime holds."""
        ...


def predict(
    engine: Engine,
    batches: Iterable[Batch],
    *,
    paths: Sequence[str],
    fingerprint: str = "",
    labelled: bool = True,
    progress: Callable[[int], None] | None = None,
) -> Predictions:
    """Score every batch; padding goes, rows come out sorted, each exactly once.

    Args:
        paths: file name of each row of the manifest.
        labelled: whether the batches carry targets.
        progress: told the number of rows seen so far; may raise to stop.
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
