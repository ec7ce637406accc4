"""A run that fails leaves a trace, loses nothing, and continues where it stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from imgcls_fast.core.bundle import read_bundle
from imgcls_fast.core.diary import last_end
from imgcls_fast.core.errors import (
    ConfigError,
    DataError,
    HardwareError,
    ImgclsError,
    Interrupted,
    ModelError,
    UsageError,
)
from imgcls_fast.core.overview import details
from imgcls_fast.core.run import Run
from imgcls_fast.core.runs import last_begun
from imgcls_fast.data import reach
from imgcls_fast.data.quarantine import read_quarantine
from imgcls_fast.tracking.lines import plain_lines
from imgcls_fast.training import checkpoint, quarantined, session
from imgcls_fast.training.fit import Fit

STEPS = 5  # of an epoch: 42 // 8
Patch = pytest.MonkeyPatch


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: Patch) -> None:
    monkeypatch.setattr(reach, "WAITS_S", (0.0, 0.01))


@pytest.fixture
def at_step(monkeypatch: Patch) -> Callable[[int, Callable[[Fit], Any]], None]:
    """Do something before the batch after optimizer step `step` is asked for, once."""

    def arrange(step: int, action: Callable[[Fit], Any]) -> None:
        original, done = Fit._learn, list[int]()

        def stepping(self: Fit, batch: Any) -> Any:
            answer = original(self, batch)
            if self.progress.step == step and not done:
                done.append(1)
                action(self)
            return answer

        monkeypatch.setattr(Fit, "_learn", stepping)

    return arrange


def failed(config: Any, kind: type[BaseException]) -> tuple[Run, Any, list[dict[str, Any]]]:
    """The run that failed, the error, and the events that its sinks received."""
    heard: list[dict[str, Any]] = []
    with pytest.raises(kind) as raised:
        session.start(config, [heard.append])
    return Run(Path(config.out)), raised.value, heard


def require_trace(run: Run, code: str) -> dict[str, Any]:
    """Asserts that event and log name the failure and the command; returns the event."""
    end = last_end(run.directory)
    assert end is not None
    assert (end["event"], end["code"], end["command"]) == (
        "failed",
        code,
        f"imgcls-fast train {run.directory} --resume",
    )
    log = (run.directory / "log.txt").read_text("utf-8")
    assert f"failed: error[{code}]" in log
    assert f"continue with: imgcls-fast train {run.directory} --resume" in log
    Run(run.directory).lock()  # free again
    return end


def away(run_data: Path) -> Path:
    return run_data.with_name("away")


def bring_back(data: Path) -> None:
    os.rename(away(data), data)


LOADERS = {
    "torch": {"train.loader": "torch", "train.workers": 0},
    "torch2": {"train.loader": "torch", "train.workers": 2},
    "dali": {"train.loader": "dali-cpu", "train.workers": 2},
}


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.usefixtures("no_judging")
def test_files_out_of_reach_stop_training_at_a_checkpoint_and_nothing_is_lost(
    loader: str, configure: Callable[..., Any], own_data: Path, at_step: Any, same_result: Any
) -> None:
    straight = session.start(configure(LOADERS[loader], own_data))
    at_step(2, lambda fit: os.rename(own_data, away(own_data)))
    run, error, heard = failed(configure(LOADERS[loader], own_data), DataError)
    assert (error.code, error.exit_code) == ("D015", 3)
    assert str(own_data) in error.where
    assert f"{run.directory} --resume" in error.try_
    require_trace(run, "D015")
    assert [event["event"] for event in heard][-1] == "failed"
    step = checkpoint.read_checkpoint(run.checkpoints / "last").progress.step
    assert step >= 2
    assert not read_quarantine(run.directory / "quarantine.csv")
    bring_back(own_data)
    session.resume(run, {})
    same_result(straight, run)


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.usefixtures("no_judging")
def test_sigterm_while_files_are_waited_for_stops_training_at_once_and_in_order(
    loader: str, configure: Callable[..., Any], own_data: Path, at_step: Any, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(reach, "WAITS_S", (100.0,))

    def outage(fit: Fit) -> None:
        os.rename(own_data, away(own_data))
        threading.Timer(1.0, os.kill, [os.getpid(), signal.SIGTERM]).start()

    at_step(2, outage)
    began = time.monotonic()
    run, error, _ = failed(configure(LOADERS[loader], own_data), Interrupted)
    assert error.code == "X130" and time.monotonic() - began < 90
    assert checkpoint.read_checkpoint(run.checkpoints / "last").progress.step >= 2
    bring_back(own_data)
    session.resume(run, {})


@pytest.mark.usefixtures("no_judging")
def test_files_out_of_reach_in_validation_stop_at_a_checkpoint_and_nothing_is_lost(
    configure: Callable[..., Any], own_data: Path, at_step: Any, same_result: Any
) -> None:
    straight = session.start(configure({}, own_data))
    at_step(STEPS, lambda fit: os.rename(own_data / "val", away(own_data)))
    run, error, _ = failed(configure({}, own_data), DataError)
    assert error.code == "D015"
    progress = checkpoint.read_checkpoint(run.checkpoints / "last").progress
    assert (progress.epoch, progress.index, progress.step) == (0, STEPS, STEPS)
    require_trace(run, "D015")
    os.rename(away(own_data), own_data / "val")
    session.resume(run, {})
    same_result(straight, run)


@pytest.mark.parametrize("phase", ["fit_baseline", "_finish"])
def test_files_out_of_reach_in_baseline_and_judging_leave_a_run_that_resumes(
    phase: str, configure: Callable[..., Any], own_data: Path, monkeypatch: Patch
) -> None:
    original = getattr(session, phase)

    def without_files(*arguments: Any, **more: Any) -> Any:
        os.rename(own_data, away(own_data))
        return original(*arguments, **more)

    config = configure({"train.baseline": True, "train.epochs": 1}, own_data)
    with monkeypatch.context() as patch:
        patch.setattr(session, phase, without_files)
        run, error, _ = failed(config, DataError)
    assert error.code == "D015"
    require_trace(run, "D015")
    bring_back(own_data)
    assert session.resume(run, {}).finished
    assert last_end(run.directory)["event"] == "done"  # type: ignore[index]


def spoil(path: Path) -> None:
    path.write_bytes(b"this is no image")


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.usefixtures("no_judging")
def test_a_row_that_was_quarantined_while_training_does_not_block_resume(
    loader: str, configure: Callable[..., Any], own_data: Path, at_step: Any, stop_at: Any
) -> None:
    config = configure(LOADERS[loader], own_data)
    rows: list[int] = []

    def spoil_one(fit: Fit) -> None:
        rows.append(int(fit.loaders.train.sampler.rows_of(1, 3)[0]))
        spoil(fit.manifest.path(rows[0]))

    stop_at(STEPS + 5)
    at_step(2, spoil_one)
    with pytest.raises(Interrupted):
        session.start(config)
    run = Run(Path(config.out))
    path = run.manifest.paths[rows[0]]
    assert [file.path for file in read_quarantine(run.directory / "quarantine.csv")] == [path]
    session.resume(run, {})
    assert list(checkpoint.read_checkpoint(run.checkpoints / "last").progress.quarantined) == [str(rows[0])]


@pytest.mark.usefixtures("no_judging")
def test_a_row_found_bad_just_before_a_kill_stays_out_and_does_not_block_resume(
    configure: Callable[..., Any], own_data: Path, at_step: Any, same_result: Any
) -> None:
    kept: list[Any] = []

    def spoil_next(fit: Fit) -> None:
        path = fit.manifest.path(int(fit.loaders.train.sampler.rows_of(0, 3)[1]))
        kept[:] = [path, path.read_bytes()]
        spoil(path)

    class Killed(BaseException):
        pass

    def die(fit: Fit) -> None:
        raise Killed

    at_step(2, spoil_next)
    straight = session.start(configure({}, own_data))
    assert checkpoint.read_checkpoint(straight.checkpoints / "last").progress.quarantined
    kept[0].write_bytes(kept[1])
    config = configure({}, own_data)
    at_step(2, spoil_next)
    at_step(4, die)
    with pytest.raises(Killed):
        session.start(config)
    run = Run(Path(config.out))
    assert [own_data / file.path for file in read_quarantine(run.directory / "quarantine.csv")] == [kept[0]]
    assert not checkpoint.has_checkpoint(run.checkpoints)
    session.resume(run, {})
    same_result(straight, run)


def test_each_bad_row_is_on_disk_at_once_at_the_cost_of_one_line(make_fit: Any, monkeypatch: Patch) -> None:
    fit = make_fit({"data.max_bad": 1000.0})
    whole: list[int] = []
    original = quarantined.write_quarantine

    def writing(path: Path, files: list[Any]) -> None:
        whole.append(len(files))
        original(path, files)

    monkeypatch.setattr(quarantined, "write_quarantine", writing)
    path, rows = fit.run_.directory / "quarantine.csv", fit.manifest.rows("train").tolist()
    expected = [fit.manifest.paths[row] for row in rows]
    for count, row in enumerate(rows, 1):
        fit.quarantined.add(row, "cut, or \n worse", "epoch 1")
        fit.quarantined.add(row, "again", "epoch 1")
        assert [file.path for file in read_quarantine(path)] == expected[:count]
    assert whole == [1]
    with open(path, "ab") as file:
        file.write(b"train/a/999.jpg,the machine stopp")
    assert [file.path for file in read_quarantine(path)] == expected
    later = quarantined.Quarantined(fit.run_, fit.manifest, 1000.0)
    later.add(int(fit.manifest.rows("test")[0]), "bad", "judging")
    assert [file.path for file in read_quarantine(path)] == [*expected, fit.manifest.paths[fit.manifest.rows("test")[0]]]
    assert path.read_bytes().endswith(b",judging\n")


def test_quarantine_csv_holds_rows_that_were_found_after_the_best_epoch(
    configure: Callable[..., Any], own_data: Path, at_step: Any, monkeypatch: Patch
) -> None:
    monkeypatch.setattr("imgcls_fast.training.progress.is_better", lambda value, loss, progress: progress.best is None)
    rows: list[int] = []

    def spoil_one(fit: Fit) -> None:
        rows.append(int(fit.loaders.train.sampler.rows_of(1, 4)[0]))
        spoil(fit.manifest.path(rows[0]))

    at_step(STEPS + 2, spoil_one)
    run = session.start(configure({}, own_data))
    assert not checkpoint.read_checkpoint(run.checkpoints / "best").progress.quarantined
    found = read_quarantine(run.directory / "quarantine.csv")
    assert [(file.path, file.found) for file in found] == [(run.manifest.paths[rows[0]], "epoch 2")]


@pytest.mark.usefixtures("no_judging")
def test_too_many_rows_that_go_bad_while_training_stop_it_at_a_checkpoint(
    configure: Callable[..., Any], own_data: Path, at_step: Any
) -> None:
    kept: dict[Path, bytes] = {}

    def spoil_all(fit: Fit) -> None:
        for path in map(fit.manifest.path, fit.manifest.rows("train").tolist()):
            kept[path] = path.read_bytes()
            spoil(path)

    at_step(3, spoil_all)
    run, error, _ = failed(configure({}, own_data), DataError)
    assert error.code == "D013"
    assert "--max-bad" in error.try_
    require_trace(run, "D013")
    assert checkpoint.read_checkpoint(run.checkpoints / "last").progress.step >= 3
    out = {own_data / file.path for file in read_quarantine(run.directory / "quarantine.csv")}
    for path in kept.keys() - out:
        path.write_bytes(kept[path])
    with pytest.raises(DataError, match="cannot be decoded"):  # still too many
        session.resume(run, {})
    session.resume(run, {"data.max_bad": 1000.0})
    assert len(run.epochs) == 2


@pytest.mark.usefixtures("no_judging")
class TestValidationRows:
    """The best epoch always compares the same images."""

    def test_a_row_that_is_bad_from_the_first_validation_on_is_left_out_of_all(
        self, configure: Callable[..., Any], own_data: Path, at_step: Any
    ) -> None:
        rows: list[int] = []

        def spoil_one(fit: Fit) -> None:
            rows.append(int(fit.manifest.rows("val")[4]))
            spoil(fit.manifest.path(rows[0]))

        at_step(2, spoil_one)
        run = session.start(configure({}, own_data))
        assert list(checkpoint.read_checkpoint(run.checkpoints / "last").progress.quarantined) == [str(rows[0])]
        assert len(run.epochs) == 2

    def test_a_row_that_goes_bad_later_stops_the_run_and_restoring_it_changes_nothing(
        self, configure: Callable[..., Any], own_data: Path, at_step: Any, same_result: Any
    ) -> None:
        straight = session.start(configure({}, own_data))
        kept: list[Any] = []

        def spoil_one(fit: Fit) -> None:
            path = fit.manifest.path(int(fit.manifest.rows("val")[4]))
            kept.extend([path, path.read_bytes()])
            spoil(path)

        at_step(STEPS + 2, spoil_one)
        run, error, _ = failed(configure({}, own_data), DataError)
        assert error.code == "D010"
        assert str(kept[0]) in error.where
        assert not read_quarantine(run.directory / "quarantine.csv")
        assert checkpoint.read_checkpoint(run.checkpoints / "last").progress.step == 2 * STEPS
        kept[0].write_bytes(kept[1])
        session.resume(run, {})
        same_result(straight, run)


@pytest.mark.slow
def test_a_validation_row_that_goes_bad_before_judging_stops_it_and_restoring_it_changes_nothing(
    configure: Callable[..., Any], own_data: Path, monkeypatch: Patch
) -> None:
    straight = session.start(configure({}, own_data))
    original, kept = session._finish, list[Any]()

    def spoiled_first(stage: Any, baseline: Any) -> None:
        path = stage.manifest.path(int(stage.manifest.rows("val")[4]))
        kept.extend([path, path.read_bytes()])
        spoil(path)
        original(stage, baseline)

    with monkeypatch.context() as patch:
        patch.setattr(session, "_finish", spoiled_first)
        run, error, _ = failed(configure({}, own_data), DataError)
    assert error.code == "D010"
    assert str(kept[0]) in error.where
    assert not run.finished
    assert not read_quarantine(run.directory / "quarantine.csv")
    kept[0].write_bytes(kept[1])
    session.resume(run, {})
    assert read_bundle(run.bundle_path).temperature == read_bundle(straight.bundle_path).temperature
    assert (run.evaluation("val") / "metrics.json").read_text() == (
        straight.evaluation("val") / "metrics.json"
    ).read_text()


@pytest.mark.usefixtures("no_judging")
class TestEveryFailureLeavesATrace:
    """An event, a line in the log, closed sinks, a checkpoint where one can be trusted, the command."""

    def test_diverged(self, configure: Callable[..., Any]) -> None:
        run, error, _ = failed(configure({"optim.lr": 100.0, "optim.opt": "sgd", "optim.warmup": 0, "optim.weight_decay": 1.0}), ModelError)
        assert error.code == "M008"
        require_trace(run, "M008")

    def test_out_of_memory_in_validation(
        self, configure: Callable[..., Any], monkeypatch: Patch, same_result: Any
    ) -> None:
        straight = session.start(configure())

        def scarce(*arguments: Any, **more: Any) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

        with monkeypatch.context() as patch:
            patch.setattr("imgcls_fast.training.fit.predict", scarce)
            run, error, _ = failed(configure(), HardwareError)
        assert error.code == "H002"
        assert require_trace(run, "H002")["path"] == str(run.checkpoints / "last")
        assert checkpoint.read_checkpoint(run.checkpoints / "last").progress.step == STEPS
        session.resume(run, {})
        same_result(straight, run)

    def test_out_of_memory_in_the_first_optimizer_step(self, configure: Callable[..., Any], monkeypatch: Patch) -> None:
        def scarce(*arguments: Any, **more: Any) -> Any:
            raise RuntimeError(
                "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
            )

        with monkeypatch.context() as patch:
            patch.setattr(torch.optim.SGD, "step", scarce)
            run, error, _ = failed(configure({"optim.opt": "sgd"}), HardwareError)
        assert error.code == "H002"
        require_trace(run, "H002")
        assert not checkpoint.has_checkpoint(run.checkpoints)  # in the middle of a step nothing can be trusted
        session.resume(run, {})
        assert len(run.epochs) == 2

    def test_loader_processes_that_are_killed_again_and_again(
        self, configure: Callable[..., Any], at_step: Any, same_result: Any, monkeypatch: Patch
    ) -> None:
        workers = {"train.loader": "torch", "train.workers": 1}
        straight = session.start(configure(workers))

        def kill(fit: Fit) -> None:
            import multiprocessing

            for child in multiprocessing.active_children():
                os.kill(child.pid or 0, signal.SIGKILL)
                child.join(20)

        at_step(2, kill)
        monkeypatch.setattr("imgcls_fast.loading.torch_loader._PATIENCE", 1)  # the first death is one too many
        run, error, _ = failed(configure(workers), HardwareError)
        assert error.code == "H002"
        require_trace(run, "H002")
        assert checkpoint.read_checkpoint(run.checkpoints / "last").progress.step >= 2
        session.resume(run, {})
        same_result(straight, run)

    def test_any_exception(self, configure: Callable[..., Any], at_step: Any) -> None:
        class Sink:
            closed = False

            def __call__(self, event: dict[str, Any]) -> None: ...

            def close(self) -> None:
                self.closed = True

        def stumble(fit: Fit) -> None:
            raise LookupError("a fault of ours")

        sink, config = Sink(), configure()
        at_step(2, stumble)
        with pytest.raises(LookupError):
            session.start(config, [sink])
        assert sink.closed
        assert "LookupError: a fault of ours" in require_trace(Run(Path(config.out)), "X001")["message"]


class Listener:
    """A sink that remembers what it received, and whether it was closed."""

    def __init__(self) -> None:
        self.heard: list[dict[str, Any]] = []
        self.closed = False

    def __call__(self, event: dict[str, Any]) -> None:
        self.heard.append(event)

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize("phase", ["prepare", "make_plan", "counted", "Run.create"])
def test_a_failure_before_there_is_a_run_is_an_event_and_closes_the_sinks(
    phase: str, configure: Callable[..., Any], monkeypatch: Patch
) -> None:
    def fails(*arguments: Any) -> Any:
        raise DataError("D013", "too many bad images", where="here")

    owner, name = (Run, "create") if phase == "Run.create" else (session, phase)
    monkeypatch.setattr(owner, name, fails)
    sink, config = Listener(), configure()
    with pytest.raises(DataError):
        session.start(config, [sink])
    assert sink.closed
    end = sink.heard[-1]
    assert (end["event"], end["code"], end["where"], end["path"]) == ("failed", "D013", "here", None)
    assert plain_lines(end)[0] == "failed: error[D013]: too many bad images"
    assert not any("continue with" in line for line in plain_lines(end))  # there is nothing to continue


def test_an_interruption_while_a_run_is_begun_is_no_failure(configure: Callable[..., Any], monkeypatch: Patch) -> None:
    def pressed(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(session, "_write_beginning", pressed)
    sink, config = Listener(), configure()
    with pytest.raises(KeyboardInterrupt):
        session.start(config, [sink])
    assert sink.closed
    assert [event["event"] for event in sink.heard if event["event"] != "phase"] == ["data", "interrupted"]
    assert plain_lines(sink.heard[-1]) == ["interrupted; there is no checkpoint yet"]
    Run(Path(config.out)).lock()  # free again


def test_a_refused_network_leaves_no_folder(configure: Callable[..., Any], tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.safetensors"
    wrong.write_bytes(b"\x02\x00\x00\x00\x00\x00\x00\x00{}")
    for changes in (
        {"model.args": {"width": -3}}, {"model.attention": ["cbam@nowhere"]}, {"model.init": str(wrong)},
        {"model.args": {"no_such_argument": 1}},
    ):  # fmt: skip
        config = configure(changes)
        with pytest.raises(ImgclsError):
            session.start(config)
        assert not Path(config.out).exists()


def test_a_run_that_is_refused_before_its_first_step_leaves_no_folder_and_is_not_the_last(
    configure: Callable[..., Any], monkeypatch: Patch, tmp_path: Path
) -> None:
    def fails(error: ImgclsError) -> Callable[..., Any]:
        def fail(*arguments: Any) -> Any:
            raise error

        return fail

    for error, stays in (
        (ConfigError("C004", "no compiler"), False), (HardwareError("H004", "no DALI"), False),
        (HardwareError("H003", "no space"), True), (DataError("D013", "too many bad images"), True),
    ):  # fmt: skip
        monkeypatch.setattr(session, "Fit", fails(error))
        sink, config = Listener(), configure({"out": str(tmp_path / "runs" / error.code)})
        with pytest.raises(ImgclsError):
            session.start(config, [sink])
        assert Path(config.out).exists() == stays
        assert bool(sink.heard[-1]["command"]) == stays
        if stays:
            assert last_begun().name == error.code
        else:
            with pytest.raises(UsageError, match="no last run"):
                last_begun()


TRAIN = """
import ctypes, os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from conftest import TINY
from imgcls_fast.core.settings import build_config
from imgcls_fast.training import session
from imgcls_fast.training.fit import Fit

how = sys.argv[4]
original = Fit._learn
def step(self, batch):
    if self.progress.step == 2:
        if how == "SIGSEGV":
            ctypes.string_at(0)
        os.kill(os.getpid(), getattr(signal, how))
    return original(self, batch)
Fit._learn = step
session.start(build_config({**TINY, "train.loader": "torch", "train.workers": 1, "data.source": sys.argv[1], "out": sys.argv[2]}))
"""


@pytest.mark.parametrize("how", ["SIGSEGV", pytest.param("SIGABRT", marks=pytest.mark.slow), "SIGKILL"])
@pytest.mark.slow
def test_a_training_process_that_dies_by_a_signal_is_reported_in_log_and_on_stderr(
    how: str, tiny_data: Path, tmp_path: Path, no_judging: None
) -> None:
    run = Run(tmp_path / "run")
    words = [sys.executable, "-c", TRAIN, str(tiny_data), str(run.directory), str(Path(__file__).parent), how]
    died = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert died.returncode == -getattr(signal, how)
    assert "error[X001]: the training process died" in died.stderr
    command = f"imgcls-fast train {run.directory} --resume"
    assert command in died.stderr
    event = require_trace(run, "X001")
    assert how in event["message"]
    log = (run.directory / "log.txt").read_text()
    assert ("in step" in log) == (how != "SIGKILL")  # the traceback
    heard: list[dict[str, Any]] = []
    session.resume(run, {}, [heard.append])
    assert any(how in e["text"] for e in heard if e["event"] == "warning")
    assert json.dumps(details(run), default=str)


def test_after_a_run_no_watcher_is_left_and_the_fault_handler_is_as_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import faulthandler

    from imgcls_fast.training import last_words

    start, begun = last_words._start, []
    monkeypatch.setattr(last_words, "_start", lambda words: begun.append(start(words)) or begun[-1])  # type: ignore[func-returns-value]
    before = faulthandler.is_enabled()
    with last_words.watched(tmp_path, "x"):
        assert begun[0].poll() is None
    assert begun[0].returncode == 0 and not Path(f"/proc/{begun[0].pid}").exists()
    assert faulthandler.is_enabled() == before


def test_a_finished_run_ends_though_a_process_of_a_c_library_holds_the_watcher_s_pipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from imgcls_fast.training import last_words

    start, begun = last_words._start, []
    monkeypatch.setattr(last_words, "_start", lambda words: begun.append(start(words)) or begun[-1])  # type: ignore[func-returns-value]
    with last_words.watched(tmp_path, "x"):
        holder = subprocess.Popen(["sleep", "30"], pass_fds=[begun[0].stdin.fileno()])
    assert holder.poll() is None and begun[0].returncode == 0, "it read on until everybody had closed the pipe"
    holder.kill()
    holder.wait()
    assert list(tmp_path.iterdir()) == [], "nothing is reported"


def test_many_runs_in_a_process_leave_one_callback_for_forks(tmp_path: Path, monkeypatch: Patch) -> None:
    from imgcls_fast.training import last_words

    with last_words.watched(tmp_path, "x"):
        pass
    monkeypatch.setattr(os, "register_at_fork", lambda **more: pytest.fail("one more callback"))
    with last_words.watched(tmp_path, "x"):
        pipes = [pipe.fileno() for pipe in last_words._pipes if not pipe.closed]
        if (child := os.fork()) == 0:
            os._exit(len([fd for fd in pipes if os.path.exists(f"/proc/self/fd/{fd}")]))
        assert len(pipes) == 1 and os.waitpid(child, 0)[1] == 0


def test_a_watcher_that_does_not_end_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from imgcls_fast.training import last_words

    start, begun = last_words._start, []

    def stopped(words: list[str]) -> Any:
        begun.append(start(words))
        begun[0].send_signal(signal.SIGSTOP)
        return begun[0]

    monkeypatch.setattr(last_words, "_start", stopped)
    monkeypatch.setattr(last_words, "_PATIENCE_S", 0.2)
    with last_words.watched(tmp_path, "x"):
        pass
    assert begun[0].returncode == -signal.SIGKILL
