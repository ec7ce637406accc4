"""What other programs get of a run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from imgcls_fast.core.env import install_hint
from imgcls_fast.core.errors import HardwareError
from imgcls_fast.core.places import RUN_NAMES
from imgcls_fast.core.run import Run
from imgcls_fast.tracking.events import EpochDone, Stepped
from imgcls_fast.tracking.trackers import TensorBoard, trackers


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Tag -> (step, value), as TensorBoard itself reads the files of a folder."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    read = accumulator.EventAccumulator(str(folder)).Reload()
    return {tag: [(found.step, found.value) for found in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def epoch(number: int) -> EpochDone:
    return EpochDone(
        event="epoch", epoch=number, epochs=2, train_loss=0.5, val_loss=0.25, val_accuracy=0.75, val_macro_f1=0.7, lr=0.1, images=4,
        images_per_s=100.0, data_share=0.0, memory_mb=1.0, seconds=1.0, best=True, monitor="val/accuracy", eta_s=0.0, delta=None,
    )  # fmt: skip


def test_tensorboard_gets_every_figure_by_epoch_and_the_loss_by_step(tmp_path: Path) -> None:
    (sink,) = trackers(("tensorboard",), Run(tmp_path))
    more = {"loss": 1.5, "lr": 0.125, "images_per_s": 1.0, "data_share": 0.0, "eta_s": 0.0}
    sink(Stepped(event="progress", epoch=2, epochs=2, step=3, steps=10, **more))  # type: ignore[typeddict-item]
    sink(epoch(1))
    sink(epoch(2))
    sink.close()
    (path,) = (tmp_path / "tensorboard").iterdir()
    assert path.name.startswith("events.out.tfevents.")
    found = curves(path.parent)
    assert found["batch/loss"] == [(13, 1.5)]
    assert found["batch/lr"] == [(13, 0.125)]
    assert found["train/loss"] == [(1, 0.5), (2, 0.5)]
    assert found["val/accuracy"] == [(1, 0.75), (2, 0.75)]
    assert found["pace/images_per_s"] == [(1, 100), (2, 100)]
    assert {"val/loss", "val/macro_f1", "train/lr"} <= found.keys()


def test_a_run_that_is_resumed_adds_a_file_and_the_folder_is_one_of_a_run(tmp_path: Path, monkeypatch: Any) -> None:
    for number in (1, 2):
        monkeypatch.setattr("os.getpid", lambda number=number: number)
        TensorBoard(Run(tmp_path))(epoch(number))
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2
    assert [step for step, _ in curves(tmp_path / "tensorboard")["val/accuracy"]] == [1, 2]
    assert "tensorboard" in RUN_NAMES


def test_without_tensorboard_the_error_names_the_line_that_installs_it(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(HardwareError, match="tensorboard is not installed, and --track tensorboard needs it") as refused:
        trackers(("tensorboard",), Run(tmp_path))
    assert (refused.value.code, refused.value.try_) == ("H004", install_hint("tensorboard"))
