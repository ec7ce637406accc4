"""Sinks that hand the figures of a run to other programs. `core.choices.TRACKERS` names them."""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Mapping
from pkgutil import resolve_name
from typing import Any

from ..core.choices import TRACKERS
from ..core.files import explained_write
from ..core.run import Run
from .events import Event, Sink

_EPOCH = {  # what of an epoch is drawn, beside every figure of the validation rows
    "train_loss": "train/loss",
    "lr": "train/lr",
    "images_per_s": "pace/images_per_s",
    "data_share": "pace/data_share",
    "memory_mb": "pace/memory_mb",
}
_CASTAGNOLI = 0x82F63B78  # the polynomial of CRC-32C, reflected


def trackers(names: tuple[str, ...], run: Run) -> list[Sink]:
    """The sinks that `train.track` names, for one run."""
    return [resolve_name(TRACKERS[name])(run) for name in names]


class TensorBoard:
    """Writes `tensorboard/events.out.tfevents.*` of a run directory, which TensorBoard draws: `tensorboard --logdir runs`.

    Curves run over epochs: loss, rate and pace of training, every figure of the validation rows; `batch/loss` runs over steps. A
    resumed run adds a file. Needs no library.

    Source of the format: TFRecord (length, masked CRC-32C, data, masked CRC-32C) of `tensorflow.Event` messages.
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
        with explained_write(self.folder):
            self.folder.mkdir(exist_ok=True)
            begins = b"" if self._path.exists() else record(_field(1, time.time()) + _field(3, b"brain.Event:2"))
            values = b"".join(_field(1, _field(1, tag.encode()) + _single(2, value)) for tag, value in figures.items())
            with open(self._path, "ab") as file:
                file.write(begins + record(_field(1, time.time()) + _field(2, step) + _field(5, values)))


def _field(number: int, value: bytes | float | int) -> bytes:
    """A field of a protocol buffer: bytes or a message, a double, or a varint."""
    if isinstance(value, bytes):
        return _varint(number << 3 | 2) + _varint(len(value)) + value
    if isinstance(value, float):
        return _varint(number << 3 | 1) + struct.pack("<d", value)
    return _varint(number << 3) + _varint(value)


def _single(number: int, value: float) -> bytes:
    return _varint(number << 3 | 5) + struct.pack("<f", value)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def record(data: bytes) -> bytes:
    """One record of a TFRecord file."""
    length = struct.pack("<Q", len(data))
    return length + _masked(length) + data + _masked(data)


def _masked(data: bytes) -> bytes:
    crc = crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def crc32c(data: bytes) -> int:
    """CRC-32C of a short text (RFC 3720, appendix B.4): bit by bit, since a record is some hundred bytes long."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (_CASTAGNOLI if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF
