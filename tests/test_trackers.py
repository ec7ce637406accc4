"""What other programs get of a run."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

from google.protobuf.empty_pb2 import Empty
from google.protobuf.unknown_fields import UnknownFieldSet

from imgcls_fast.core.places import RUN_NAMES
from imgcls_fast.core.run import Run
from imgcls_fast.tracking.events import EpochDone, Stepped
from imgcls_fast.tracking.trackers import TensorBoard, crc32c, trackers


def messages(path: Path) -> list[dict[int, list[Any]]]:
    """The messages of a TFRecord file, with their checksums tested."""
    found, data = [], path.read_bytes()
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        for part, stored in ((data[:8], data[8:12]), (data[12 : 12 + length], data[12 + length : 16 + length])):
            crc = crc32c(part)
            assert struct.unpack("<I", stored)[0] == ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32
        found.append(fields(data[12 : 12 + length]))
        data = data[16 + length :]
    return found


def fields(message: bytes) -> dict[int, list[Any]]:
    """number -> values, as the library of protocol buffers reads them."""
    read, found = Empty(), {}
    read.ParseFromString(message)
    for field in UnknownFieldSet(read):
        found.setdefault(field.field_number, []).append(field.data)
    return found


def scalars(message: dict[int, list[Any]]) -> dict[str, float]:
    values = [fields(value) for value in fields(message[5][0])[1]]
    return {value[1][0].decode(): struct.unpack("<f", struct.pack("<I", value[2][0]))[0] for value in values}


def epoch(number: int) -> EpochDone:
    return EpochDone(
        event="epoch", epoch=number, epochs=2, train_loss=0.5, val_loss=0.25, val_accuracy=0.75, val_macro_f1=0.7, lr=0.1, images=4,
        images_per_s=100.0, data_share=0.0, memory_mb=1.0, seconds=1.0, best=True, monitor="val/accuracy", eta_s=0.0, delta=None,
    )  # fmt: skip


def test_the_checksum_is_that_of_the_standard() -> None:
    assert crc32c(b"123456789") == 0xE3069283  # RFC 3720 and every table of CRC catalogues
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(b"\xff" * 32) == 0x62A8AB43


def test_tensorboard_gets_every_figure_by_epoch_and_the_loss_by_step(tmp_path: Path) -> None:
    (sink,) = trackers(("tensorboard",), Run(tmp_path))
    more = {"loss": 1.5, "lr": 0.125, "images_per_s": 1.0, "data_share": 0.0, "eta_s": 0.0}
    sink(Stepped(event="progress", epoch=2, epochs=2, step=3, steps=10, **more))  # type: ignore[typeddict-item]
    sink(epoch(1))
    sink(epoch(2))
    sink.close()
    (path,) = (tmp_path / "tensorboard").iterdir()
    assert path.name.startswith("events.out.tfevents.")
    first, *events = messages(path)
    assert first[3] == [b"brain.Event:2"]
    assert [message[2] for message in events] == [[13], [1], [2]]
    assert scalars(events[0]) == {"batch/loss": 1.5, "batch/lr": 0.125}
    found = scalars(events[2])
    assert found["train/loss"] == 0.5
    assert found["val/accuracy"] == 0.75
    assert found["pace/images_per_s"] == 100


def test_a_run_that_is_resumed_adds_a_file_and_the_folder_is_one_of_a_run(tmp_path: Path, monkeypatch: Any) -> None:
    for _ in range(2):
        TensorBoard(Run(tmp_path))(epoch(1))
        monkeypatch.setattr("os.getpid", lambda: 1)
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2
    assert "tensorboard" in RUN_NAMES
