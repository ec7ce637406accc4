"""Sinks that hand the figures of a run to other programs. `core.choices.TRACKERS` names them."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from pkgutil import resolve_name
from typing import Any

from ..core import env
from ..core.choices import TRACKERS
from ..core.files import explained_write
from ..core.run import Run
from .events import Event, Sink

_EPOCH = {  # figures of an epoch that are drawn, beside those of the validation rows
    "train_loss": "train/loss",
    "lr": "train/lr",
    "images_per_s": "pace/images_per_s",
    "data_share": "pace/data_share",
    "memory_mb": "pace/memory_mb",
}


def require_trackers(names: tuple[str, ...]) -> None:
    """Check that the libraries of these trackers are installed.

    Raises:
        HardwareError: H004, with the line that installs the missing one.
    """
    for name in names:
        if library := TRACKERS[name].needs:
            env.require(library, library, f"--track {name}")


def trackers(names: tuple[str, ...], run: Run) -> list[Sink]:
    """Make the sinks that `train.track` names, for one run.

    Raises:
        HardwareError: H004 when a library is missing.
    """
    require_trackers(names)
    return [resolve_name(TRACKERS[name].make)(run) for name in names]


class TensorBoard:
    """Writes `tensorboard/events.out.tfevents.*` of a run directory, which TensorBoard draws: `tensorboard --logdir runs`.

    Curves run over epochs: loss, rate and pace of training, every figure of the validation rows; `batch/loss` runs over steps. A
    resumed run adds a file.

    Events go through TensorBoard's `RecordWriter`, in this thread. Its `EventFileWriter` writes in a thread of its own, which
    would print a traceback on a full disk, beside our error.
    """

    def __init__(self, run: Run) -> None:
        self.folder = run.directory / "tensorboard"
        self._path = self.folder / f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}"

    def __call__(self, event: Event) -> None:
        if event["event"] == "progress":
            step = (event["epoch"] - 1) * event["steps"] + event["step"]
            self._write(step, {"batch/loss": event["loss"], "batch/lr": event["lr"]})
        elif event["event"] == "epoch":
            found: dict[str, Any] = {**event}
            figures = {_EPOCH[key]: found[key] for key in _EPOCH}
            judged = {f"val/{key[4:]}": value for key, value in found.items() if key.startswith("val_")}
            self._write(event["epoch"], figures | judged)
        elif event["event"] == "done":
            self._write(0, {f"judged/{event['split']}_accuracy": event["accuracy"]})

    def close(self) -> None:
        """Nothing stays open between events."""

    def _write(self, step: int, figures: Mapping[str, float]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event as Message
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in figures.items()]
        message = Message(wall_time=time.time(), step=step, summary=Summary(value=values))
        with explained_write(self.folder):
            self.folder.mkdir(exist_ok=True)
            with open(self._path, "ab") as file:
                writer = RecordWriter(file)
                if not file.tell():
                    writer.write(Message(wall_time=time.time(), file_version="brain.Event:2").SerializeToString())
                writer.write(message.SerializeToString())
