"""What training shows while it runs: the loss and the rate, now and then."""

from __future__ import annotations

import math
import time

from ..core.config import TrainConfig
from ..tracking.events import Emit, Stepped, Warned
from .crowding import Crowd
from .progress import Pace, Progress
from .step import Step


class Display:
    """Looks at the loss at most every `log_every` seconds: the only point where the host waits for the device.

    Args:
        train: resolved.
        steps: optimizer steps per epoch.
        resume: command that continues the run.
        emit: receives progress, and once a warning when other processes have the cores.
    """

    def __init__(self, train: TrainConfig, steps: int, resume: str, emit: Emit) -> None:
        self._train, self._steps, self._emit = train, steps, emit
        self._crowd = Crowd(str(train.device), int(train.threads), resume)
        self._at = time.monotonic()

    def show(self, progress: Progress, pace: Pace, step: Step, lr: float) -> bool:
        """Report where training is, if it is time; returns False when the loss is not finite."""
        now, train = time.monotonic(), self._train
        if now - self._at < train.log_every:
            return True
        self._at = now
        if not math.isfinite(loss := step.loss):
            return False
        steps, rate, epochs = self._steps, pace.images_per_s, int(train.epochs)
        left = steps - progress.index + steps * (epochs - progress.epoch - 1)
        self._emit(
            Stepped(
                event="progress",
                epoch=progress.epoch + 1,
                epochs=epochs,
                step=progress.index,
                steps=steps,
                loss=loss,
                lr=lr,
                images_per_s=rate,
                data_share=pace.data_share,
                eta_s=left * int(train.batch_size) / max(rate, 1e-9),
            )
        )
        if crowded := self._crowd.look(progress.step * int(train.batch_size)):
            self._emit(Warned(event="warning", text=crowded))
        return True
