"""A whole run: data, plan, baseline, training, judgement, report; started or resumed."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core import env
from ..core.bundle import Bundle, read_bundle
from ..core.config import RunConfig, bits_settings, free_settings
from ..core.diary import last_end, unexplained_end
from ..core.errors import DataError, HardwareError, Interrupted, ModelError
from ..core.manifest import Manifest
from ..core.phases import heard_by, phase
from ..core.pixels import Pixels
from ..core.places import clear_leftovers
from ..core.predictions import Predictions
from ..core.record import Work, record_of, unequal_line, work_on
from ..core.run import Run
from ..core.runs import mark_begun, mark_last, new_run_path
from ..core.settings import flatten, replace_settings
from ..core.text import command, some
from ..core.undecoded import Undecoded
from ..data import reach
from ..data.prepare import Prepared, changed_files, prepare, require_splits
from ..data.quarantine import write_quarantine
from ..data.split import write_split_csv
from ..engines.as_found import as_found
from ..engines.hush import hushed
from ..engines.scoring import score_rows
from ..engines.torch_runtime import TorchEngine
from ..evaluation.metrics import Metrics, judge, without
from ..evaluation.paired import Difference
from ..evaluation.plots import training_curves
from ..evaluation.report import write_evaluation, write_plots
from ..models.build import ModelSpec, sketch_model
from ..models.kernels import use_kernels
from ..tracking.events import (
    BaselineFitted,
    DataRead,
    Done,
    Emit,
    Event,
    ImageLeftOut,
    Notice,
    PlanMade,
    Stopped,
    Warned,
    event_of,
    warnings_as_events,
)
from ..tracking.sinks import LogSink, Sinks
from .baseline import fit_baseline
from .early import refuse_early
from .failures import Recorded
from .fit import Fit
from .identity import require_same_trajectory, trajectory
from .judging import best_model, calibrated, make_bundle
from .last_words import watched
from .learnt import about_parents
from .plan import Plan, look_at_machine, make_plan, starting_model
from .plan_numbers import require_compiler
from .progress import told_end
from .quarantined import Quarantined, require_same_validation
from .reporting import against_baseline, next_commands, report_run
from .signals import signal_as_interrupt


@dataclass
class _Stage:
    """What the parts of one session share."""

    plan: Plan
    manifest: Manifest
    run: Run
    emit: Emit
    work: Work
    began: float  # `time.monotonic()` at the beginning of this process's work, before the scan
    trained_s: float = 0.0  # spent in epochs by this process


@as_found()
def start(config: RunConfig, sinks: Sequence[Callable[[Any], Any]] = (), command: Sequence[str] | None = None) -> Run:
    """Train a new run from the beginning to its report.

    Args:
        config: what was asked for; "auto" is resolved here.
        sinks: receive events (see `track`).
        command: the command line, for env.json.

    Returns:
        The finished run.

    Raises:
        ImgclsError: of any family; Interrupted after a signal, with the work saved.
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
            prepared = prepare(config)
            tell(event_of(DataRead, {"event": "data", **prepared.facts()}))
            require_splits(prepared)
            with phase("planning"):
                plan = make_plan(config, prepared.manifest, machine, lambda text: tell(Notice(event="notice", text=text)))
                parameters = _parameters(plan, prepared.manifest)  # a network that is refused leaves no folder
            out = Path(config.out) if config.out else new_run_path(config.data.source, plan.spec["arch"])
            run = record.run = Run.create(out)
            log = LogSink(run)
            for event in early:
                log(event)
            listeners.sinks.append(log)
            _warn_without_locks(run, listeners)
            with work_on(run.directory, parent=plan.start.parent) as work:
                stage = _Stage(plan, prepared.manifest, run, listeners, work, began)
                _write_beginning(stage, prepared, parameters, command)
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
        config = _changed_config(run, changes)
        manifest = run.manifest
        facts = run.read_json("model.json")
        if facts is None:
            raise ModelError(
                "M005",
                f"{run.directory} stopped before its plan was written",
                try_=command("train", manifest.source),
            )
        plan = Plan.from_dict(facts, config)
        if "trajectory" in facts:
            require_same_trajectory(facts["trajectory"], trajectory(plan, manifest), run, run.directory / "model.json")
        listeners.sinks.append(LogSink(run))
        _warn_without_locks(run, listeners)
        death, end = unexplained_end(run.directory), last_end(run.directory)
        if death:
            listeners(Warned(event="warning", text=death))
        if run.finished and run.report_path.exists():
            more = command("train", manifest.source, "--init", run.directory)
            done = f"{run.name} is finished; to go on training, begin a new run: {more}"
            listeners(Warned(event="warning", text=done))
            return run
        with Recorded(run, listeners), heard_by(listeners):
            if not run.finished:
                _require_compiler(run, config)
            _require_same_files(run, manifest)
            changed = _differing(run.config, config)
            with work_on(run.directory, changed, death=death, end=end) as work:
                if changed:
                    plan = plan.with_changes(changed)
                    run.write_json("model.json", {**facts, "plan": plan.to_dict()["plan"]})
                    run.save_config(config)
                return _conduct(_Stage(plan, manifest, run, listeners, work, began), resumed=True)
    finally:
        listeners.close()
        run.unlock()


def _warn_without_locks(run: Run, emit: Emit) -> None:
    if run.caution:
        emit(Warned(event="warning", text=run.caution))


def _changed_config(run: Run, changes: dict[str, Any]) -> RunConfig:
    """The run's configuration with the changes that resume allows."""
    stored = run.config
    differing = _differing(stored, replace_settings(stored, changes))
    refused = [name for name in differing if name not in free_settings() | bits_settings()]
    if refused:
        name = refused[0]
        raise ModelError(
            "M006",
            f"{name} is {differing[name][0]} in {run.name} and cannot become {differing[name][1]}: it would not be the same run"
            + (f" (also: {', '.join(refused[1:])})" if refused[1:] else ""),
            try_=f"{command('train', 'DATA', '--init', run.directory)}   (a new run that begins with these weights)",
        )
    return replace_settings(
        stored, {name: now for name, (_, now) in differing.items() if name != "out"}
    )  # a run stays where it is


def _differing(before: RunConfig, after: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Settings that differ: name -> (before, after)."""
    old, new = flatten(before), flatten(after)
    return {name: (old[name], new[name]) for name in new if new[name] != old[name]}


def _require_compiler(run: Run, config: RunConfig) -> None:
    """Refuse to train on without a compiler where the run is compiled; what is left to judge needs none.

    Raises:
        HardwareError: H004.
    """
    try:
        require_compiler(config, look_at_machine(), resumed=True)
    except HardwareError:
        ended = told_end(config.train, run.epochs)
        if ended is None or (ended["epoch"] < ended["epochs"] and not ended["early"]):
            raise


def _require_same_files(run: Run, manifest: Manifest) -> None:
    """Quarantined files are not compared: they are left out, whatever has become of them.

    Raises:
        DataError: D015 when files are missing and the others are as they were, D010 when there are changed ones.
    """
    late = Quarantined(run, manifest, run.config.data.max_bad).rows()
    changed = changed_files(manifest, env.usable_cpus(), without=late)
    away = [path for path in changed if not (manifest.root / path).exists()]
    if changed and len(away) == len(changed):  # a disk that is not there, much rather than as many deleted files
        missing = FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        error = reach.unreachable(manifest.root / away[0], missing, sum(reach.WAITS_S), others=len(away) - 1)
        error.try_ = (
            f"bring the files back, then {run.resume_command}"
            f"   (gone for good: {command('train', manifest.source, '--init', run.directory)})"
        )
        raise error
    if changed:
        raise DataError(
            "D010",
            f"{len(changed)} of {len(manifest)} images changed or vanished since {run.name} began",
            where=some(changed),
            try_=f"restore the files, or begin a new run: {command('train', manifest.source, '--init', run.directory)}",
        )


def _write_beginning(stage: _Stage, prepared: Prepared, parameters: int, command: Sequence[str] | None) -> None:
    run, plan, manifest = stage.run, stage.plan, stage.manifest
    facts = run_facts(plan, command)
    run.write_json("env.json", facts)
    run.write_json("data.json", prepared.facts())
    write_split_csv(run.directory / "split.csv", manifest)
    write_quarantine(run.directory / "quarantine.csv", prepared.found.quarantine)
    shape = trajectory(plan, manifest)
    run.write_json("model.json", {**plan.to_dict(), "parameters": parameters, "trajectory": shape})
    run.save_config(replace_settings(plan.config, {"out": None}))  # so that -c makes a new run of it
    manifest.save(run.manifest_path)
    if note := mark_begun(run):
        stage.emit(Warned(event="warning", text=note))


def run_facts(plan: Plan, command: Sequence[str] | None) -> dict[str, Any]:
    """env.json: machine, versions, command, seed."""
    facts = env.run_facts(plan.config.train.seed)
    if command is not None:
        facts["command"] = list(command)
    return facts


def _parameters(plan: Plan, manifest: Manifest) -> int:
    """Number of parameters of the network that training will build.

    Raises:
        ImgclsError: everything that is wrong with the network or the weights that it begins with.
    """
    if plan.start.kind == "scratch":
        model = sketch_model(ModelSpec.from_dict(plan.spec))
    else:  # published weights are read, and checked
        model = starting_model(plan.spec, plan.start, manifest.labels)
    if plan.config.model.freeze != "none":
        model.freeze(plan.config.model.freeze)
    use_kernels(model, plan.config.model.kernels)
    return sum(p.numel() for p in model.parameters())


def _conduct(stage: _Stage, *, resumed: bool) -> Run:
    """Baseline, training, judgement. A signal outside of training stops at once: nothing there takes long to do again."""
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
    facts = run.read_json("model.json")
    stage.emit(
        PlanMade(
            event="plan",
            rows=[list(row) for row in plan.rows],
            parameters=facts["parameters"],
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
    if not run.finished:
        _train(stage, resumed=resumed)
    _finish(stage, baseline)
    return run


def _train(stage: _Stage, *, resumed: bool) -> None:
    with phase("building the network"):
        fit = Fit(stage.plan, stage.manifest, stage.run, stage.emit)
        notes = fit.restore() if resumed else []
    for note in notes:
        stage.emit(Warned(event="warning", text=note))
    stage.work.differs(fit.saves.differences)
    compiles = "; the first step compiles the network" if stage.plan.config.train.compile else ""
    begin = time.monotonic()
    with phase(f"training{compiles}"), hushed():
        fit.run()
    stage.trained_s = time.monotonic() - begin


def _finish(stage: _Stage, baseline: dict[str, Any] | None) -> None:
    """Bundle, judgement of val and test, report, final box."""
    run, manifest = stage.run, stage.manifest
    config = stage.plan.config
    with phase("reading the best checkpoint"):
        model, facts, progress = best_model(run)
    device = config.train.device
    raw = TorchEngine(model.to(device), manifest.labels, Pixels.from_dict(facts["pixels"]), device=device)
    quarantined = Quarantined(run, manifest, config.data.max_bad)
    bad = quarantined.rows()

    def on_bad(row: int, reason: str, epoch: int) -> None:
        require_same_validation(run, manifest, row, reason)
        bad[row] = reason
        path = manifest.paths[row]
        stage.emit(ImageLeftOut(event="quarantine", path=path, reason=reason, epoch=progress.epoch, row=row))
        quarantined.add(row, reason, "judging")

    def score(split: str) -> Predictions:
        return score_rows(
            raw, manifest, manifest.rows(split), batch_size=int(config.evaluate.batch_size), loader=str(config.train.loader),
            workers=int(config.train.workers), bad=bad, on_bad=on_bad,
        )  # fmt: skip

    validation = score("val")
    bundle = (
        read_bundle(run.bundle_path) if run.finished else make_bundle(run, manifest, model, facts, progress, validation)
    )
    if note := mark_last(run):
        stage.emit(Warned(event="warning", text=note))
    judged: dict[str, Metrics] = {}
    against = None
    for split in ("val", "test"):
        if len(manifest.rows(split)):
            predictions = calibrated(validation if split == "val" else score(split), bundle.temperature)
            with phase(f"computing intervals of the {split} figures"):
                judged[split] = judge(
                    predictions, top_k=config.evaluate.top_k, bootstrap=config.evaluate.bootstrap, seed=config.train.seed,
                    group=manifest.group,
                )  # fmt: skip
            rows = set(manifest.rows(split).tolist())
            left = Undecoded({manifest.paths[row]: reason for row, reason in sorted(bad.items()) if row in rows})
            judged[split] = without(judged[split], left, about_parents(run, manifest, split))
            with phase(f"drawing the {split} pictures"):
                write_evaluation(run.evaluation(split), predictions, judged[split], run.plots)
            against = against_baseline(run, manifest, split, predictions)
    with phase("drawing the curves"):
        write_plots(run.plots, training_curves(run.epochs))
    report = report_run(run)
    stage.emit(_done_event(stage, judged, baseline, report, bundle, against))


def _done_event(
    stage: _Stage,
    judged: dict[str, Metrics],
    baseline: dict[str, Any] | None,
    report: Path,
    bundle: Bundle,
    against: Difference | None,
) -> Done:
    split = "test" if "test" in judged else "val"
    metrics = judged[split]
    notes = list(metrics.warnings)
    if bundle.temperature == 1:
        notes.append(str(bundle.provenance.get("calibration", "")))
    if split == "val":
        notes.append(
            "the data has no test split: this is the validation split, which also chose the epoch, so it is optimistic"
        )
    if unequal := unequal_line(record_of(stage.run.directory)):
        notes.append(unequal)
    worst = sorted((c for c in metrics.per_class if c.support), key=lambda c: c.f1)[:3]
    return Done(
        event="done",
        split=split,
        accuracy=metrics.accuracy,
        ci=list(metrics.accuracy_ci),
        macro_f1=metrics.macro_f1,
        balanced_accuracy=metrics.balanced_accuracy,
        imbalanced=metrics.imbalanced,
        majority=metrics.majority.to_dict(),
        ece=metrics.ece,
        n=metrics.n,
        baseline=baseline["accuracy"] if baseline else None,
        baseline_balanced=baseline.get("balanced_accuracy") if baseline else None,
        worst=[[c.name, c.f1, c.support] for c in worst],
        seconds=round(sum(e.get("seconds") or 0 for e in stage.run.epochs), 1),
        ended=told_end(stage.plan.config.train, stage.run.epochs),
        report=str(report),
        run=str(stage.run.directory),
        commands=[list(pair) for pair in next_commands(stage.run)],
        notes=notes,
        against=against.to_dict() if against else None,
        around_s=round(time.monotonic() - stage.began - stage.trained_s, 1),
        resumed=len(record_of(stage.run.directory)["work"]) > 1,
    )
