"""Runs training from its settings to its report: data, plan, baseline, epochs, judgement; begun or resumed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..core import env
from ..core.config import RunConfig
from ..core.diary import last_end, unexplained_end
from ..core.errors import HardwareError, Interrupted, ModelError
from ..core.manifest import Manifest
from ..core.phases import heard_by, phase
from ..core.places import clear_leftovers
from ..core.record import Work, record_of, work_on
from ..core.run import PLAN, Run
from ..core.runs import mark_begun, new_run_path
from ..core.settings import replace_settings
from ..core.text import command as command_line
from ..data.prepare import Prepared, prepare, require_splits
from ..data.quarantine import write_quarantine
from ..data.split import write_split_csv
from ..engines.as_found import as_found
from ..engines.hush import hushed
from ..tracking.events import (
    BaselineFitted,
    DataRead,
    Emit,
    Event,
    Notice,
    PlanMade,
    Stopped,
    Warned,
    event_of,
    warnings_as_events,
)
from ..tracking.sinks import LogSink, Sinks
from ..tracking.trackers import trackers
from .baseline import fit_baseline
from .early import refuse_early
from .failures import Recorded
from .fit import Fit
from .identity import changed_config, differing, require_same_files, require_same_trajectory, trajectory
from .judging import finish
from .last_words import watched
from .plan import Plan, counted, look_at_machine, make_plan
from .plan_numbers import require_compiler
from .progress import ShouldStop
from .reporting import ended
from .signals import signal_as_interrupt


@dataclass
class _Stage:
    """Holds what the steps of one session share."""

    plan: Plan
    manifest: Manifest
    run: Run
    emit: Emit
    work: Work
    began: float  # `time.monotonic()` at the beginning of this process's work, before the scan
    should_stop: ShouldStop | None = None
    trained_s: float = 0.0  # spent in epochs by this process


@as_found()
def start(
    config: RunConfig,
    sinks: Sequence[Callable[[Any], Any]] = (),
    command: Sequence[str] | None = None,
    *,
    prepared: Prepared | None = None,
    parent: Path | None = None,
    should_stop: ShouldStop | None = None,
) -> Run:
    """Train a new run from the beginning to its report.

    Args:
        config: settings as they were asked for; "auto" is resolved here.
        sinks: receive events (see `tracking`).
        command: the command line, for env.json.
        prepared: images with splits, in place of a scan of `data.source`: one fold, or the same data for many runs.
        parent: folder of the study or run that this run is a part of; recorded in run.json.
        should_stop: asked after every epoch but the last, with its row of metrics.csv; True ends training there, and the best
            epoch so far is judged as at any other end.

    Returns:
        The finished run.

    Raises:
        ImgclsError: any of its families; Interrupted after a signal, with the work saved.
    """
    began, early = time.monotonic(), list[Event]()
    listeners = Sinks(sinks)

    def tell(event: Event) -> None:
        early.append(event)
        listeners(event)

    record = Recorded(None, listeners)
    try:
        with record, heard_by(listeners):
            machine = look_at_machine()
            refuse_early(config, machine)
            prepared = prepared or prepare(config)
            tell(event_of(DataRead, {"event": "data", **prepared.facts()}))
            require_splits(prepared)
            with phase("planning"):
                plan = make_plan(config, prepared.manifest, machine, lambda text: tell(Notice(event="notice", text=text)))
                plan = counted(plan, prepared.manifest.labels)  # a network that is refused leaves no folder
            out = Path(config.out) if config.out else new_run_path(config.data.source, plan.spec["arch"])
            run = record.run = Run.create(out)
            log = LogSink(run)
            for event in early:
                log(event)
            listeners.sinks += [log, *trackers(config.train.track, run)]
            _warn_without_locks(run, listeners)
            with work_on(run.directory, parent=plan.start.parent, part_of=parent) as work:
                stage = _Stage(plan, prepared.manifest, run, listeners, work, began, should_stop)
                _write_beginning(stage, prepared, command)
                return _conduct(stage, resumed=False)
    finally:
        listeners.close()
        if record.run:
            record.run.unlock()


@as_found()
def resume(run: Run, changes: dict[str, Any], sinks: Sequence[Callable[[Any], Any]] = ()) -> Run:
    """Continue a run where it stopped, mid-epoch if need be.

    Args:
        run: to be continued.
        changes: settings (dotted names) that the user gave again.

    Raises:
        ModelError: M006 when a change would make it another run, M005 when no checkpoint is intact.
        DataError: D010 when files have changed since the run began, naming them.
    """
    began, listeners = time.monotonic(), Sinks(sinks)
    run.lock()
    try:
        clear_leftovers(run.directory)
        config = changed_config(run, changes)
        manifest = run.manifest
        facts = run.plan_facts
        if facts is None:
            raise ModelError(
                "M005",
                f"{run.directory} stopped before its plan was written",
                try_=command_line("train", manifest.source),
            )
        plan = Plan.from_dict(facts, config)
        if plan.trajectory is not None:
            require_same_trajectory(plan.trajectory, trajectory(plan, manifest), run, run.directory / PLAN)
        listeners.sinks += [LogSink(run), *trackers(config.train.track, run)]
        _warn_without_locks(run, listeners)
        death, end = unexplained_end(run.directory), last_end(run.directory)
        if death:
            listeners(Warned(event="warning", text=death))
        if run.finished and run.report_path.exists():
            more = command_line("train", manifest.source, "--init", run.directory)
            done = f"{run.name} is finished; to go on training, begin a new run: {more}"
            listeners(Warned(event="warning", text=done))
            return run
        with Recorded(run, listeners), heard_by(listeners):
            if not run.finished:
                _require_compiler(run, config)
            require_same_files(run, manifest)
            changed = differing(run.config, config)
            with work_on(run.directory, changed, death=death, end=end) as work:
                if changed:
                    plan = plan.with_changes(changed)
                    run.write_json(PLAN, plan.to_dict())
                    run.save_config(config)
                return _conduct(_Stage(plan, manifest, run, listeners, work, began), resumed=True)
    finally:
        listeners.close()
        run.unlock()


def _warn_without_locks(run: Run, emit: Emit) -> None:
    if run.caution:
        emit(Warned(event="warning", text=run.caution))


def _require_compiler(run: Run, config: RunConfig) -> None:
    """Refuse to train on without a compiler where the run is compiled; what is left to judge needs none.

    Raises:
        HardwareError: H004.
    """
    try:
        require_compiler(config, look_at_machine(), resumed=True)
    except HardwareError:
        how = ended(run, config)
        if how is None or (how["epoch"] < how["epochs"] and not how["early"]):
            raise


def _write_beginning(stage: _Stage, prepared: Prepared, command: Sequence[str] | None) -> None:
    run, plan, manifest = stage.run, stage.plan, stage.manifest
    facts = run_facts(plan, command)
    run.write_json("env.json", facts)
    run.write_json("data.json", prepared.facts())
    write_split_csv(run.directory / "split.csv", manifest)
    write_quarantine(run.directory / "quarantine.csv", prepared.found.quarantine)
    run.write_json(PLAN, replace(plan, trajectory=trajectory(plan, manifest)).to_dict())
    run.save_config(replace_settings(plan.config, {"out": None}))  # so that -c makes a new run of it
    manifest.save(run.manifest_path)
    if note := mark_begun(run):
        stage.emit(Warned(event="warning", text=note))


def run_facts(plan: Plan, command: Sequence[str] | None) -> dict[str, Any]:
    """Return env.json: machine, versions, command, seed."""
    facts = env.run_facts(plan.config.train.seed)
    if command is not None:
        facts["command"] = list(command)
    return facts


def _conduct(stage: _Stage, *, resumed: bool) -> Run:
    """Do the work of a run. A signal outside of training stops it at once: nothing there takes long to do again."""
    command = stage.run.resume_command
    try:
        with signal_as_interrupt(), watched(stage.run.directory, command), warnings_as_events(stage.emit):
            return _work(stage, resumed=resumed)
    except KeyboardInterrupt:
        stage.emit(Stopped(event="interrupted", command=command, path=str(stage.run.checkpoints / "last")))
        raise Interrupted(
            "X130",
            f"{stage.run.name} was stopped; what was done is saved",
            where=str(stage.run.directory),
            try_=command,
        ) from None


def _work(stage: _Stage, *, resumed: bool) -> Run:
    run, plan = stage.run, stage.plan
    stage.emit(
        PlanMade(
            event="plan",
            rows=[list(row) for row in plan.rows],
            parameters=plan.parameters,
            device=plan.config.train.device,
            memory_mb=None,
            run=str(run.directory),
        )
    )
    baseline = run.read_json("baseline.json")
    if baseline is None and plan.config.train.baseline and not run.finished:
        with phase("fitting the baseline"):
            baseline = fit_baseline(plan, stage.manifest, run)
    if baseline is not None and not resumed:
        stage.emit(event_of(BaselineFitted, {"event": "baseline", **baseline}))
    if not run.finished and "stopped_after" not in record_of(run.directory):
        _train(stage, resumed=resumed)
    _finish(stage, baseline)
    return run


def _train(stage: _Stage, *, resumed: bool) -> None:
    with phase("building the network"):
        fit = Fit(stage.plan, stage.manifest, stage.run, stage.emit, _recorded_stop(stage))
        notes = fit.restore() if resumed else []
    for note in notes:
        stage.emit(Warned(event="warning", text=note))
    stage.work.differs(fit.saves.differences)
    compiles = "; the first step compiles the network" if stage.plan.config.train.compile else ""
    begin = time.monotonic()
    with phase(f"training{compiles}"), hushed():
        fit.run()
    stage.trained_s = time.monotonic() - begin


def _recorded_stop(stage: _Stage) -> ShouldStop | None:
    """Return what the loop asks after an epoch: the caller's answer, which a resumed run must know of as well."""
    asked = stage.should_stop
    if asked is None:
        return None

    def answer(epoch: Mapping[str, Any]) -> bool:
        if not asked(epoch):
            return False
        stage.work.stopped_by_caller(int(epoch["epoch"]))
        return True

    return answer


def _finish(stage: _Stage, baseline: dict[str, Any] | None) -> None:
    def around_s() -> float:
        return time.monotonic() - stage.began - stage.trained_s

    finish(stage.plan, stage.manifest, stage.run, stage.emit, baseline, around_s)
