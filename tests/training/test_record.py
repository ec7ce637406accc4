"""A run's record: when it began, each interruption, what a resume changed, and whether that cost bitwise equality."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from imgcls_fast.core.compilers import Lack
from imgcls_fast.core.config import bits_settings, free_settings
from imgcls_fast.core.errors import DataError, HardwareError, Interrupted
from imgcls_fast.core.overview import brief, details
from imgcls_fast.core.record import NAME, record_of, resumed_lines, unequal_line, work_on
from imgcls_fast.core.run import Run
from imgcls_fast.core.runs import list_runs
from imgcls_fast.core.settings import build_config
from imgcls_fast.tracking.lines import plain_lines
from imgcls_fast.training import judging, session
from imgcls_fast.training.defaults import Machine

from .conftest import TINY

STEPS = 5  # of an epoch: 42 // 8


@pytest.fixture(scope="module")
def parent(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A judged run that stopped early: it learns nothing, so that the first of nine epochs is the best. Not to be changed."""
    out = tmp_path_factory.mktemp("runs") / "parent"
    changes = {"data.source": str(tiny_data), "out": str(out), "train.epochs": 9, "train.monitor": "val/loss", "train.patience": 1,
               "optim.lr": 1e-30, "optim.weight_decay": 0.0, "optim.ema": 0, "model.freeze": "backbone"}  # fmt: skip
    return session.start(build_config({**TINY, **changes}))


def interrupt(config: Any, events: list[dict[str, Any]] | None = None) -> Run:
    with pytest.raises(Interrupted):
        session.start(config, [] if events is None else [events.append])
    return Run(Path(config.out))


def test_a_run_interrupted_twice_tells_when_where_and_with_what_it_went_on(
    configure: Callable[..., Any], stop_at: Callable[..., None]
) -> None:
    stop_at(2)
    run = interrupt(configure())
    created = brief(run)["created"]
    events: list[dict[str, Any]] = []
    stop_at(STEPS + 3)
    with pytest.raises(Interrupted):
        session.resume(run, {"train.threads": 2, "evaluate.bootstrap": 30}, [events.append])
    started = next(event for event in events if event["event"] == "start")
    assert plain_lines(started)[0] == "resumed in epoch 1/2 after batch 2 of 5, 2 steps in all"
    rows = {name: (value, reason) for name, value, reason in next(e for e in events if e["event"] == "plan")["rows"]}
    assert rows["train.threads"] == ("2", "given when the run was resumed; was 1")
    assert ["train.threads", *rows["train.threads"]] in run.read_json("plan.json")["plan"]
    events.clear()
    session.resume(run, {}, [events.append])  # as many threads as the work before: nothing to warn of, but equality stays lost
    started = next(event for event in events if event["event"] == "start")
    assert plain_lines(started)[0] == "resumed in epoch 2/2 after batch 3 of 5, 8 steps in all"
    record = run.read_json(NAME)
    assert [entry["how"] for entry in record["work"]] == ["interrupted", "interrupted", "finished"]
    assert record["work"][0]["message"].startswith("stopped at epoch 1, batch 2 of 5")
    assert [entry["changes"] for entry in record["work"]] == [
        {}, {"evaluate.bootstrap": [20, 30], "train.threads": [1, 2]}, {},
    ]  # fmt: skip
    assert [entry["differences"] for entry in record["work"]] == [[], ["threads was 1, is 2"], []]
    times = [entry[when] for entry in record["work"] for when in ("began", "ended")]
    assert times == sorted(times)
    assert brief(run)["created"] == created == record["created"]
    lost = unequal_line(record)
    assert lost.startswith("not bitwise equal to an uninterrupted run: threads was 1, is 2 (resumed 20")
    assert lost in next(event for event in events if event["event"] == "done")["notes"]
    page = run.report_path.read_text()
    assert lost in page
    assert "interrupted 20" in page
    assert "train.threads 1 -&gt; 2" in page
    assert "given when the run was resumed; was 1" in page
    assert details(run)["work"] == record["work"]


def test_early_stopping_is_told_in_events_log_and_report(parent: Run) -> None:
    events = [json.loads(line) for line in (parent.directory / "events.jsonl").open()]
    stopped = next(event for event in events if event["event"] == "stopped_early")
    assert {k: stopped[k] for k in ("epoch", "epochs", "monitor", "patience", "best_epoch", "early")} == {
        "epoch": 2, "epochs": 9, "monitor": "val/loss", "patience": 1, "best_epoch": 1, "early": True,
    }  # fmt: skip
    assert stopped["best"] == parent.epochs[0]["val_loss"]
    log = (parent.directory / "log.txt").read_text()
    for line in plain_lines(stopped):
        assert line in log
    assert "val loss has not improved for 1 epoch (patience 1)" in log
    page = parent.report_path.read_text()
    assert "stopped early" in page
    assert "after epoch 2 of 9: val loss has not improved for 1 epoch (patience 1); best: epoch 1 with lowest val loss" in page
    assert next(event for event in events if event["event"] == "done")["ended"]["early"]


def test_the_bundle_names_the_monitored_loss_as_it_is_printed(parent: Run) -> None:
    bundle = json.loads((parent.bundle_path / "bundle.json").read_text())
    assert bundle["provenance"]["monitored"] == parent.epochs[0]["val_loss"] > 0


@pytest.mark.usefixtures("no_judging")
def test_a_run_that_begins_with_another_names_it_in_plan_record_and_report(
    configure: Callable[..., Any], parent: Run
) -> None:
    events: list[dict[str, Any]] = []
    child = session.start(configure({"train.epochs": 1, "model.init": str(parent.directory)}), [events.append])
    told = f"the weights of run {parent.name}"
    rows = {row[0]: row[1] for row in next(e for e in events if e["event"] == "plan")["rows"]}
    assert rows["model.init"] == told
    assert child.read_json("plan.json")["start"] == told  # what the report shows
    found = record_of(child.directory)["parent"]
    assert (found["run"], found["directory"], found["epoch"]) == (parent.name, str(parent.directory), 1)
    weights = json.loads((parent.bundle_path / "bundle.json").read_text())["digests"]["weights.safetensors"]
    assert found["weights"] == weights
    assert record_of(parent.directory)["parent"] is None


def test_work_that_could_not_record_its_end_counts_as_died(tmp_path: Path) -> None:
    with pytest.raises(SystemExit), work_on(tmp_path):
        raise SystemExit  # recorded
    record = json.loads((tmp_path / NAME).read_text())
    record["work"][0] |= {"ended": None, "how": None}  # a kill records nothing
    (tmp_path / NAME).write_text(json.dumps(record))
    with work_on(tmp_path, {"train.workers": (1, 2)}, death="last time the training process died: SIGKILL"):
        pass
    assert [entry["how"] for entry in record_of(tmp_path)["work"]] == ["died", "finished"]
    (line,) = resumed_lines(record_of(tmp_path))
    assert re.fullmatch(
        r"died \(last time the training process died: SIGKILL\), resumed \S+ \S+ with train\.workers 1 -> 2", line
    )
    assert unequal_line(record_of(tmp_path)) == ""


def test_how_work_failed_is_recorded_with_the_error(tmp_path: Path) -> None:
    with pytest.raises(DataError), work_on(tmp_path):
        raise DataError("D015", "the disk is away")
    entry = record_of(tmp_path)["work"][0]
    assert (entry["how"], entry["message"]) == ("failed", "the disk is away")
    assert entry["ended"] >= entry["began"]


@pytest.mark.parametrize("content", [None, "", "[]", '{"created": "x", "work": 3}', '{"work": [1]}'])
def test_a_run_without_a_readable_record_is_as_old_as_its_list_of_images(content: str | None, tmp_path: Path) -> None:
    (tmp_path / "manifest.npz").write_bytes(b"")
    os.utime(tmp_path / "manifest.npz", (5, 5))
    if content is not None:
        (tmp_path / NAME).write_text(content)
    record = record_of(tmp_path)
    assert record == {"created": 5, "parent": None, "work": []}
    assert (resumed_lines(record), unequal_line(record)) == ([], "")


def test_runs_are_listed_in_the_order_in_which_they_began(tmp_path: Path) -> None:
    for k, name in enumerate("ba"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text("")
        (tmp_path / name / "manifest.npz").write_text("")
        (tmp_path / name / NAME).write_text(json.dumps({"created": k, "work": []}))
        os.utime(tmp_path / name / "config.yaml", (9 - k, 9 - k))  # resumed in the other order
    assert [run.name for run in list_runs(tmp_path)] == ["b", "a"]


def test_the_documentation_names_the_settings_that_may_change_at_resume() -> None:
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    table = page[page.index("### What may change") :].split("\n\n")[2]
    named = set(re.findall(r"`([a-z]+\.[a-z_*]+)`", table))
    whole = {name.removesuffix("*") for name in named if name.endswith("*")}
    may = {name for name in free_settings() | bits_settings() if not name.startswith(tuple(whole))} - {"out"}
    assert whole == {"evaluate.", "export."}
    assert {name for name in named if not name.endswith("*")} == may
    with_price = next(line for line in table.splitlines() if "train.threads" in line)
    assert all(name in with_price for name in bits_settings())


@pytest.mark.parametrize("damage", [{"changes": {"a": 1}}, {"changes": ["a"]}, {"differences": [1]}, {"differences": "x"}])
def test_an_entry_that_is_damaged_inside_is_passed_over(damage: dict[str, Any], tmp_path: Path) -> None:
    whole = {"began": 1, "ended": 2, "how": "interrupted", "message": "", "changes": {"a": [1, 2]}, "differences": ["x"]}
    (tmp_path / NAME).write_text(json.dumps({"created": 1, "work": [whole, {**whole, **damage}, {**whole, "began": 1e300}]}))
    record = record_of(tmp_path)
    assert [entry["began"] for entry in record["work"]] == [1, 1e300]
    assert resumed_lines(record)[0].endswith("resumed - with a 1 -> 2") and "x (resumed -)" in unequal_line(record)


@pytest.mark.parametrize(
    ("death", "end", "how"),
    [("it was killed", None, "died"), ("", None, "died"), ("", {"event": "interrupted"}, "interrupted"),
     ("", {"event": "failed", "message": "the disk is full"}, "failed")],
)  # fmt: skip
def test_a_run_begun_before_there_was_a_record_counts_its_interruption(
    death: str, end: dict[str, Any] | None, how: str, tmp_path: Path
) -> None:
    (tmp_path / "manifest.npz").write_bytes(b"")
    os.utime(tmp_path / "manifest.npz", (5, 5))
    with work_on(tmp_path, {}, death=death, end=end):
        pass
    record = record_of(tmp_path)
    assert [(entry["began"], entry["how"]) for entry in record["work"]][:1] == [(5, how)] and len(record["work"]) == 2
    assert resumed_lines(record)[0].startswith(how)


def test_a_finished_run_whose_report_and_metrics_are_gone_is_judged_again_to_its_end(
    parent: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("write_evaluation", "write_plots", "report_run"):  # drawing takes long
        monkeypatch.setattr(judging, name, lambda *_: None)
    run = Run(shutil.copytree(parent.directory, tmp_path / "again"))
    for name in ("report.html", "metrics.csv", NAME):
        (run.directory / name).unlink()
    events: list[dict[str, Any]] = []
    session.resume(run, {}, [events.append])
    assert events[-1]["event"] == "done" and events[-1]["ended"] is None and events[-1]["resumed"]
    assert [entry["how"] for entry in record_of(run.directory)["work"]] == ["finished", "finished"]


def test_early_stopping_is_told_once_when_only_judging_is_left(parent: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(shutil.copytree(parent.directory, tmp_path / "again"))
    shutil.rmtree(run.bundle_path)
    monkeypatch.setattr(session, "_finish", lambda stage, baseline: None)
    lack = Lack("no C compiler was found", "apt-get install gcc")
    compiled = run.config.model_copy(update={"train": run.config.train.model_copy(update={"compile": True})})
    monkeypatch.setattr(session, "look_at_machine", lambda: Machine(lacks={"cpu": lack}))
    session._require_compiler(run, compiled)  # nothing is trained any more
    events: list[dict[str, Any]] = []
    session.resume(run, {}, [events.append])
    assert "start" in {event["event"] for event in events} and "stopped_early" not in {event["event"] for event in events}
    (run.directory / "metrics.csv").unlink()
    with pytest.raises(HardwareError) as refused:
        session._require_compiler(run, compiled)
    assert (refused.value.code, refused.value.try_) == ("H004", "apt-get install gcc")
