"""Keeps how far and how fast a run is, and decides whether an epoch is the best so far."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..core.batch import Batch
from ..core.config import TrainConfig
from ..core.figures import MONITORS, usual_figures
from ..evaluation.metrics import Metrics
from ..evaluation.tasks import TaskMetrics
from ..tracking.events import Ended, Started


@dataclass
class Progress:
    """How far a run is: all of its state that is neither a tensor nor changed by a step."""

    epoch: int = 0  # the epoch that is being trained
    index: int = 0  # next batch of it that was not yet trained on
    step: int = 0  # optimizer steps done
    best: float | None = None  # monitored value of the best epoch
    best_loss: float | None = None  # its validation loss, which breaks ties
    best_epoch: int = -1
    wait: int = 0  # epochs since the best one
    seconds: float = 0.0  # training time of the epochs so far
    spent: float = 0.0  # training time of the unfinished epoch
    quarantined: dict[str, str] = field(default_factory=dict)  # row -> reason, found while training
    history: list[dict[str, Any]] = field(default_factory=list)  # one dict per epoch


ShouldStop = Callable[[Mapping[str, Any]], bool]  # asked after every epoch but the last, with its row of metrics.csv


class Pace:
    """Times one epoch: since when it runs, how long the loop waited for batches, how many images it has had."""

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
        """Time since the epoch began."""
        return time.monotonic() - self.began

    def waiting(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yield the same batches and count the time spent waiting for them."""
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
        """Share of the time spent waiting for batches."""
        return self.waited / max(self.waited + self.busy, 1e-9)


def end_epoch(
    progress: Progress, monitor: str, metrics: Metrics | TaskMetrics, facts: dict[str, Any]
) -> tuple[dict[str, Any], float, float | None]:
    """Add an epoch to the history, and judge whether it is the best so far.

    Args:
        progress: changed, but for its counters of epochs and batches.
        facts: figures of training: train_loss, lr, images, images_per_s, data_share, memory_mb, seconds.

    Returns:
        The row of metrics.csv, the monitored value (higher is better), and the monitored figure minus that of the best
        epoch before (None in the first epoch, and where one of the two is not defined).
    """
    monitored = MONITORS[monitor]
    sign = 1 if monitored.more_is_better else -1
    figures = usual_figures(single=isinstance(metrics, Metrics), monitor=monitor)
    record = {
        "epoch": progress.epoch + 1,
        "train_loss": facts["train_loss"],
        **{figure.column: figure.value(metrics) for figure in figures},
        **facts,
    }
    value = sign * record[monitored.column]  # higher is better
    best, former = is_better(value, metrics.log_loss, progress), progress.best
    record["best"] = int(best)
    progress.history.append(record)
    if best:
        progress.best, progress.best_loss, progress.best_epoch, progress.wait = value, metrics.log_loss, progress.epoch, 0
    else:
        progress.wait += 1
    delta = None if former is None or math.isnan(value - former) else (value - former) * sign
    return record, value, delta


def is_better(value: float, loss: float, progress: Progress) -> bool:
    """Return whether the value is higher; between equal values (common with few validation rows) the lower loss wins.

    A value that is not defined (NaN: no validation image has any of the labels) is below every other.
    """
    if progress.best is None:
        return True
    now, before = (-math.inf if math.isnan(one) else one for one in (value, progress.best))
    return now > before or (now == before and progress.best_loss is not None and loss < progress.best_loss)


def started(train: TrainConfig, progress: Progress, steps: int) -> Started:
    """Return the event with which the loop begins or goes on, for epochs of so many steps."""
    return Started(
        event="start",
        epoch=progress.epoch + 1,
        epochs=int(train.epochs),
        steps_per_epoch=steps,
        resumed=progress.step > 0,
        step=progress.step,
        batch=progress.index,
        monitor=train.monitor,
        patience=train.patience,
    )


def how_it_ended(train: TrainConfig, history: Sequence[Mapping[str, Any]], *, by_caller: bool = False) -> Ended:
    """Return what picked the best epoch, and whether patience or the caller ended training before its last epoch.

    Args:
        history: the epochs done, as in metrics.csv; one of them is the best.
        by_caller: whoever began the run ended it.

    Returns:
        epoch (the last), epochs (planned), monitor, best_epoch, best (its monitored figure), patience, early, and by_caller
        where that is so.
    """
    best = next(epoch for epoch in reversed(history) if epoch["best"])
    done, planned = len(history), int(train.epochs)
    over = train.patience is not None and done - int(best["epoch"]) >= train.patience
    ended = Ended(
        epoch=done,
        epochs=planned,
        monitor=train.monitor,
        best_epoch=int(best["epoch"]),
        best=best[MONITORS[train.monitor].column],
        patience=train.patience,
        early=(over or by_caller) and done < planned,
    )
    if by_caller:
        ended["by_caller"] = True
    return ended


def patience_is_over(train: TrainConfig, progress: Progress) -> bool:
    """Return whether as many epochs as `train.patience` allows have passed since the best one."""
    return train.patience is not None and progress.wait >= train.patience and progress.index == 0


def caller_stops(should_stop: ShouldStop | None, progress: Progress) -> bool:
    """Ask the caller after an epoch whether training ends there."""
    if should_stop is None or not progress.history or progress.index:
        return False
    return bool(should_stop(progress.history[-1]))


def told_end(train: TrainConfig, history: Sequence[Mapping[str, Any]], *, by_caller: bool = False) -> Ended | None:
    """Return what `how_it_ended` does; None where no epoch is known as the best one: metrics.csv may be gone."""
    return how_it_ended(train, history, by_caller=by_caller) if any(epoch.get("best") for epoch in history) else None


def memory_mb(device: torch.device) -> float:
    """Return the most memory that was in use so far, of the GPU or of the process."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 1e6, 1)
    import resource

    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3, 1)
