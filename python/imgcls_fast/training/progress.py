"""How far and how fast a run is: its pace, and whether an epoch is the best so far."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch

from ..core.batch import Batch
from ..evaluation.metrics import Metrics
from .checkpoint import Progress


class Pace:
    """Times of one epoch: since when it runs, how long the loop waited for batches, how many images it has had."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.waited = self.busy = 0.0  # seconds
        self.images = 0

    def begin(self, spent: float) -> None:
        """Start an epoch of which `spent` seconds have been done before."""
        self.began = time.monotonic() - spent
        self.waited = self.busy = 0.0
        self.images = 0

    @property
    def seconds(self) -> float:
        """Since the epoch began."""
        return time.monotonic() - self.began

    def waiting(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches; the time spent waiting for them is counted."""
        while True:
            begin = time.monotonic()
            batch = next(batches, None)
            now = time.monotonic()
            self.waited += now - begin
            if batch is None:
                return
            yield batch
            self.busy += time.monotonic() - now

    @property
    def images_per_s(self) -> float:
        return self.images / max(self.waited + self.busy, 1e-9)

    @property
    def data_share(self) -> float:
        """Share of the time that went by in waiting for batches."""
        return self.waited / max(self.waited + self.busy, 1e-9)


def monitored(name: str, metrics: Metrics) -> float:
    """The value that picks the best checkpoint; higher is better."""
    return {
        "val/accuracy": metrics.accuracy,
        "val/macro_f1": metrics.macro_f1,
        "val/balanced_accuracy": metrics.balanced_accuracy,
        "val/loss": -metrics.log_loss,
    }[name]


def is_better(value: float, loss: float, progress: Progress) -> bool:
    """Higher value; between equal values (common with few validation rows) the lower loss."""
    if progress.best is None or value > progress.best:
        return True
    return value == progress.best and progress.best_loss is not None and loss < progress.best_loss


def memory_mb(device: torch.device) -> float:
    """The most memory that was in use so far: of the GPU, or of the process."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 1e6, 1)
    import resource

    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3, 1)
