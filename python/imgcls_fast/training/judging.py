"""Turns the best checkpoint into a judged bundle with its report, and a run into an engine that can be asked."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from safetensors.torch import save

from ..core import env
from ..core.bundle import Bundle, read_bundle, write_bundle
from ..core.config import RunConfig
from ..core.errors import ConfigError, ModelError
from ..core.files import sha256_json
from ..core.labels import THRESHOLD, LabelSpace
from ..core.manifest import Manifest
from ..core.phases import phase
from ..core.predictions import Predictions
from ..core.record import record_of, unequal_line
from ..core.run import Run
from ..core.runs import find_run, mark_last
from ..core.settings import flatten
from ..core.undecoded import Undecoded
from ..engines.as_found import as_found
from ..engines.base import Engine
from ..engines.runtimes import open_engine
from ..engines.scoring import score_rows
from ..engines.torch_runtime import TorchEngine
from ..evaluation.calibration import fit_temperatures, with_temperatures
from ..evaluation.metrics import Metrics, without
from ..evaluation.paired import Difference
from ..evaluation.plots import training_curves
from ..evaluation.report import write_evaluation, write_plots
from ..evaluation.tasks import TaskMetrics
from ..evaluation.thresholds import fit_thresholds
from ..models.build import Classifier, ModelSpec, build_model, load_weights
from ..models.kernels import use_kernels
from ..tracking.events import Done, Emit, ImageLeftOut, Warned, event_of
from .checkpoint import final_state
from .learnt import about_parents
from .plan import Plan
from .progress import Progress, how_it_ended
from .quarantined import Quarantined, require_same_validation
from .reporting import against_baseline, ended, judge_split, next_commands, report_run


def finish(
    plan: Plan,
    manifest: Manifest,
    run: Run,
    emit: Emit,
    baseline: dict[str, Any] | None,
    around_s: Callable[[], float],
) -> None:
    """Make the bundle of the best epoch, judge val and test, and write the report.

    Args:
        plan: the resolved plan of the run.
        manifest: images and splits.
        run: the directory, locked by this process.
        emit: receives events, `done` at the end.
        baseline: baseline.json, None without one.
        around_s: returns the seconds that this process has spent on the run outside of epochs; asked at the end.

    Raises:
        ModelError: M005 when there is no intact best checkpoint.
        DataError: D010 for a validation image that cannot be decoded any more, D013 for too many bad images, D015.
    """
    config = plan.config
    with phase("reading the best checkpoint"):
        model, stored, progress = best_model(run)
    device = config.train.device
    raw = TorchEngine(model.to(device), manifest.labels, plan.pixels, device=device)
    quarantined = Quarantined(run, manifest, config.data.max_bad)
    bad = quarantined.rows()

    def on_bad(row: int, reason: str, epoch: int) -> None:
        require_same_validation(run, manifest, row, reason)
        bad[row] = reason
        path = manifest.paths[row]
        emit(ImageLeftOut(event="quarantine", path=path, reason=reason, epoch=progress.epoch, row=row))
        quarantined.add(row, reason, "judging")

    def score(split: str) -> Predictions:
        return score_rows(
            raw,
            manifest,
            manifest.rows(split),
            batch_size=int(config.evaluate.batch_size),
            loader=str(config.train.loader),
            workers=int(config.train.workers),
            bad=bad,
            on_bad=on_bad,
        )

    validation = score("val")
    bundle = (
        read_bundle(run.bundle_path) if run.finished else make_bundle(run, manifest, model, stored, progress, validation)
    )
    if note := mark_last(run):
        emit(Warned(event="warning", text=note))
    judged: dict[str, Metrics | TaskMetrics] = {}
    against = None
    for split in ("val", "test"):
        if len(manifest.rows(split)):
            predictions = as_answered(validation if split == "val" else score(split), bundle)
            with phase(f"computing intervals of the {split} figures"):
                judged[split] = judge_split(config, manifest, predictions)
            rows = set(manifest.rows(split).tolist())
            left = Undecoded({manifest.paths[row]: reason for row, reason in sorted(bad.items()) if row in rows})
            judged[split] = without(judged[split], left, about_parents(run, manifest, split))
            with phase(f"drawing the {split} pictures"):
                write_evaluation(run.evaluation(split), predictions, judged[split], run.plots)
            against = against_baseline(run, manifest, split, predictions)
    with phase("drawing the curves"):
        write_plots(run.plots, training_curves(run.epochs))
    report = report_run(run)
    emit(_done_event(run, config, judged, baseline, report, bundle, against, around_s))


def _done_event(
    run: Run,
    config: RunConfig,
    judged: dict[str, Metrics | TaskMetrics],
    baseline: dict[str, Any] | None,
    report: Path,
    bundle: Bundle,
    against: Difference | None,
    around_s: Callable[[], float],
) -> Done:
    split = "test" if "test" in judged else "val"
    metrics = judged[split]
    notes = list(metrics.warnings)
    if all(temperature == 1 for temperature in bundle.temperatures):
        notes.append(str(bundle.provenance.get("calibration", "")))
    if split == "val":
        notes.append(
            "the data has no test split: this is the validation split, which also chose the epoch, so it is optimistic"
        )
    if unequal := unequal_line(record_of(run.directory)):
        notes.append(unequal)
    facts = {
        "event": "done",
        "split": split,
        **_headline(metrics),
        "baseline": baseline["accuracy"] if baseline else None,
        "baseline_balanced": baseline.get("balanced_accuracy") if baseline else None,
        "seconds": round(sum(e.get("seconds") or 0 for e in run.epochs), 1),
        "ended": ended(run, config),
        "report": str(report),
        "run": str(run.directory),
        "commands": [list(pair) for pair in next_commands(run)],
        "notes": notes,
        "against": against.to_dict() if against else None,
        "around_s": round(around_s(), 1),
        "resumed": len(record_of(run.directory)["work"]) > 1,
    }
    return event_of(Done, facts)


def _headline(metrics: Metrics | TaskMetrics) -> dict[str, Any]:
    """Return the figures of the event `done`."""
    if isinstance(metrics, TaskMetrics):
        return metrics.headline()
    worst = sorted((c for c in metrics.per_class if c.support), key=lambda c: c.f1)[:3]
    return {
        "accuracy": metrics.accuracy,
        "ci": list(metrics.accuracy_ci),
        "macro_f1": metrics.macro_f1,
        "balanced_accuracy": metrics.balanced_accuracy,
        "imbalanced": metrics.imbalanced,
        "majority": metrics.majority.to_dict(),
        "ece": metrics.ece,
        "n": metrics.n,
        "worst": [[c.name, c.f1, c.support] for c in worst],
    }


def best_model(run: Run) -> tuple[Classifier, Plan, Progress]:
    """Return the network with the weights of the best epoch, the plan of the run, and how training went.

    Raises:
        ModelError: M005 when there is no intact best checkpoint yet.
    """
    facts = run.plan_facts
    if facts is None:
        raise ModelError("M005", f"{run.directory} has no model yet", try_=run.resume_command)
    plan = Plan.from_dict(facts, run.config)
    tensors, progress = final_state(run)
    model = build_model(ModelSpec.from_dict(plan.spec))
    load_weights(model, tensors)
    use_kernels(model, plan.config.model.kernels)
    return model.eval(), plan, progress


def make_bundle(
    run: Run, manifest: Manifest, model: Classifier, plan: Plan, progress: Progress, validation: Predictions
) -> Bundle:
    """Fit temperatures and thresholds on the validation rows, and write the bundle: weights, labels, pixels, provenance."""
    config, labels = plan.config, manifest.labels
    temperatures, found = (1.0,) * len(labels.tasks), "no calibration was asked for"
    if config.evaluate.calibrate and len(validation):
        temperatures, found = fit_temperatures(validation), f"fitted on {len(validation):,} validation images"
    thresholds = None
    if labels.any_of.any():
        thresholds = _thresholds(replace(validation, scores=with_temperatures(validation.scores, labels, temperatures)))

    best = float(how_it_ended(config.train, progress.history)["best"])

    def weights(file: BinaryIO) -> None:
        file.write(save({name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}))

    provenance = {
        "run": run.name,
        "config": sha256_json(flatten(config)),
        "data": manifest.fingerprint,
        "source": manifest.source,
        "epoch": progress.best_epoch + 1,
        "monitor": config.train.monitor,
        "monitored": None if math.isnan(best) else best,
        "start": str(plan.start),
        "calibration": _calibration(labels, temperatures, found, len(validation)),
        "machine": env.machine_facts(),
    }
    return write_bundle(
        run.bundle_path,
        weights,
        arch=plan.spec,
        labels=labels,
        pixels=plan.pixels,
        temperature=temperatures,
        provenance=provenance,
        thresholds=thresholds,
    )


def _thresholds(validation: Predictions) -> list[float]:
    """Fit (K,) thresholds of the classes of `any_of` tasks, from scores with the bundle's temperatures; 0.5 elsewhere."""
    found = np.full(validation.labels.size, THRESHOLD)
    for k, (task, part) in enumerate(validation.labels.parts):
        if task.kind == "any_of":
            found[part] = fit_thresholds(validation.of_task(k))
    return [float(value) for value in found]


def _calibration(labels: LabelSpace, temperatures: Sequence[float], found: str, n: int) -> str:
    """Report in a sentence how the scores were calibrated."""
    if not labels.is_single:
        names = [f"{task.name} {value:.3g}" for task, value in zip(labels.tasks, temperatures, strict=True)]
        fitted = f"; thresholds fitted on {n:,} validation images" if labels.any_of.any() else ""
        if set(temperatures) == {1}:
            why = f"{n:,} validation images show no better one" if found.startswith("fitted") else found
            return f"temperature 1: {why}{fitted}"
        return f"temperature {', '.join(names) if len(names) > 1 else f'{temperatures[0]:.3g}'}, {found}{fitted}"
    if temperatures[0] != 1:
        return f"temperature {temperatures[0]:.3g}, {found}"
    if found.startswith("fitted"):
        return f"temperature 1: {n:,} validation images show no better one, so confidences are the network's own"
    return f"temperature 1: {found}"


def as_answered(predictions: Predictions, bundle: Bundle) -> Predictions:
    """Return predictions of the network itself as its bundle gives them: with its temperatures and thresholds."""
    scores = with_temperatures(predictions.scores, predictions.labels, bundle.temperatures)
    thresholds = None if bundle.thresholds is None else np.array(bundle.thresholds, np.float32)
    return replace(predictions, scores=scores, thresholds=thresholds)


@as_found()  # building a network draws random numbers
def run_engine(
    run: Run, runtime: str = "torch", device: str = "cpu", precision: str | None = None, trust: bool = False
) -> tuple[Engine, str]:
    """Open an engine for a run; also returns a note where it is not the judged model (training has not ended yet).

    Raises:
        ModelError: M004, M005 when there is no usable model.
        ConfigError: C004 for another runtime than torch before training has ended.
    """
    if run.finished:
        return open_engine(
            read_bundle(run.bundle_path), runtime, device=device, exports=run.exports, precision=precision, trust=trust
        ), ""
    if runtime != "torch":
        raise ConfigError(
            "C004",
            f"{run.directory} is not finished, so only the runtime torch can answer",
            try_=run.resume_command,
        )
    model, plan, progress = best_model(run)
    engine = TorchEngine(model.to(device), run.manifest.labels, plan.pixels, device=device)
    return (
        engine,
        f"{run.name} is not finished: answers come from its best checkpoint so far (epoch {progress.best_epoch + 1}), not calibrated",
    )


def bundle_folder(path: Path) -> Path | None:
    """Return `path` itself or its sub-folder `bundle`, whichever holds a bundle."""
    return next((folder for folder in (path, path / "bundle") if os.path.isfile(folder / "bundle.json")), None)


@as_found()
def open_model(
    run: Run | str | Path | None, runtime: str, device: str, precision: str | None, trust: bool = False
) -> tuple[Engine, str]:
    """Open the engine of a run (None: the last one) or of a lone bundle's folder. See `run_engine`."""
    lone = bundle_folder(Path(run)) if isinstance(run, str | Path) and str(run) != "last" else None
    if lone is not None:
        return open_engine(read_bundle(lone), runtime, device=device, precision=precision, trust=trust), ""
    return run_engine(run if isinstance(run, Run) else find_run(run), runtime, device, precision, trust)
