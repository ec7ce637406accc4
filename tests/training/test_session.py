"""What a caller of a whole run may hand in and ask for: prepared data, a parent, an end; and runs of earlier versions."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from imgcls_fast.core.errors import Interrupted
from imgcls_fast.core.overview import brief, details
from imgcls_fast.core.record import record_of
from imgcls_fast.core.run import Run
from imgcls_fast.data.prepare import prepare
from imgcls_fast.training import judging, reporting, session

Configure = Callable[..., Any]


@pytest.mark.usefixtures("no_judging")
def test_prepared_images_are_trained_on_without_a_scan_and_the_parent_is_recorded(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure({"train.epochs": 1})
    prepared = prepare(config)
    split = prepared.manifest.split.copy()
    split[prepared.manifest.rows("train")[::2]] = 1  # a fold: half of the training images validate
    fold = replace(prepared, manifest=prepared.manifest.with_splits(split))
    monkeypatch.setattr(session, "prepare", lambda *_: pytest.fail("scanned"))
    run = session.start(config, prepared=fold, parent=tmp_path / "study")
    assert run.manifest.fingerprint == fold.manifest.fingerprint != prepared.manifest.fingerprint
    assert run.read_json("data.json")["splits"] == {"train": 21, "val": 35, "test": 9}
    assert details(run)["part_of"] == str(tmp_path / "study") and details(run)["parent"] is None


def test_a_caller_ends_training_after_an_epoch_and_the_run_is_judged(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("write_evaluation", "write_plots", "report_run"):  # drawing takes long
        monkeypatch.setattr(judging, name, lambda *_: None)
    asked: list[int] = []

    def should_stop(epoch: Any) -> bool:
        asked.append(epoch["epoch"])
        return bool(epoch["epoch"] == 2)

    events: list[dict[str, Any]] = []
    run = session.start(configure({"train.epochs": 4}), [events.append], should_stop=should_stop)
    assert asked == [1, 2] and len(run.epochs) == 2 and run.finished
    assert record_of(run.directory)["stopped_after"] == 2
    assert [entry["how"] for entry in record_of(run.directory)["work"]] == ["finished"]
    done = events[-1]
    assert done["event"] == "done" and done["n"] == 9 and done["ended"]["early"] and done["ended"]["by_caller"]
    assert "stopped by its caller" in (run.directory / "log.txt").read_text()
    assert reporting._ended(run)["stopped early"].startswith("after epoch 2 of 4: stopped by its caller; best: ")


def test_a_run_that_its_caller_ended_is_not_trained_on_when_it_is_resumed(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure({"train.epochs": 3})

    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(session, "_finish", die)
        session.start(config, should_stop=lambda epoch: True)
    monkeypatch.setattr(session, "_finish", lambda stage, baseline: None)
    assert len(session.resume(Run(Path(config.out)), {}).epochs) == 1


@pytest.mark.usefixtures("no_judging")
def test_a_run_whose_plan_is_in_model_json_is_listed_and_resumed_to_the_same_bits(
    configure: Configure, stop_at: Callable[..., None], same_result: Callable[[Run, Run], None], tmp_path: Path
) -> None:
    straight = session.start(configure())
    stop_at(3)
    config = configure()
    with pytest.raises(Interrupted):
        session.start(config)
    run = Run(Path(config.out))
    (run.directory / "plan.json").rename(run.directory / "model.json")
    assert brief(run)["model"] == "small-cnn"
    copy = Run(shutil.copytree(run.directory, tmp_path / "copy"))
    session.resume(run, {})
    same_result(straight, run)
    session.resume(copy, {"train.log_every": 5.0})  # a change is written to the new name
    assert ["train.log_every", "5", "given when the run was resumed; was 1e+06"] in copy.read_json("plan.json")["plan"]
