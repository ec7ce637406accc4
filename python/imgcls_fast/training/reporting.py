"""Makes a run's report from its directory alone, so that it can be made again at any time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..core.config import RunConfig
from ..core.errors import UsageError
from ..core.manifest import Manifest
from ..core.phases import phase
from ..core.predictions import Predictions
from ..core.record import day, record_of, resumed_lines, unequal_line
from ..core.run import Run
from ..core.text import command, quoted
from ..core.undecoded import Undecoded
from ..data.quarantine import read_quarantine
from ..data.store import reader
from ..evaluation.metrics import Metrics, without
from ..evaluation.paired import Difference, compare
from ..evaluation.report import ReportFacts, write_report
from ..evaluation.tasks import TaskMetrics, judge_all
from ..evaluation.thumbnails import MAX_BYTES
from ..tracking.events import Ended
from ..tracking.lines import ended_line
from .learnt import about_parents
from .progress import told_end

_JUDGED = ("test", "val")


def judge_split(config: RunConfig, manifest: Manifest, predictions: Predictions) -> Metrics | TaskMetrics:
    """Judge predictions of one split with the settings of their run."""
    return judge_all(
        predictions,
        top_k=config.evaluate.top_k,
        bootstrap=config.evaluate.bootstrap,
        seed=config.train.seed,
        group=manifest.group,
    )


def judged(run: Run) -> dict[str, tuple[Predictions, Metrics | TaskMetrics]]:
    """Return the stored predictions of each judged split, and what they are worth."""
    config, manifest = run.config, run.manifest
    out = {}
    for split in _JUDGED:
        if (run.evaluation(split) / "predictions.json").exists():
            predictions = Predictions.load(run.evaluation(split))
            metrics = judge_split(config, manifest, predictions)
            out[split] = predictions, without(metrics, Undecoded(), about_parents(run, manifest, split))
    return out


def against_baseline(run: Run, manifest: Manifest, split: str, predictions: Predictions) -> Difference | None:
    """Compare predictions of one split with the baseline's answers to the same rows; None where those were not kept."""
    found, folder = run.read_json("baseline.json"), run.evaluation("baseline")
    if not found or found["split"] != split or not (folder / "predictions.json").exists():
        return None
    return compare(Predictions.load(folder), predictions, manifest.group)


def next_commands(run: Run) -> list[tuple[str, str]]:
    """Return (what, command line) of what one usually does after training."""
    return [
        ("predict", command("predict", run.directory, "IMAGES")),
        ("export", command("export", run.directory, "--onnx")),
        ("evaluate", command("eval", run.directory, "OTHER_DATA")),
    ]


@phase("writing the report")
def report_run(run: Run) -> Path:
    """Write report.html from what lies in the run directory.

    Raises:
        UsageError: U003 when nothing of the run was judged yet.
    """
    run.demand_own_places()
    splits = judged(run)
    if not splits:
        raise UsageError(
            "U003",
            f"{run.directory} was not judged yet, so there is nothing to report",
            try_=run.resume_command,
        )
    manifest = run.manifest
    data, environment, planned = run.read_json("data.json") or {}, run.read_json("env.json") or {}, run.plan_facts or {}
    record = record_of(run.directory)
    bundle = run.read_json("bundle/bundle.json") or {}
    bad = read_quarantine(run.directory / "quarantine.csv") if (run.directory / "quarantine.csv").exists() else []
    headline = next(iter(splits))
    facts = ReportFacts(
        name=run.name,
        splits=splits,
        read=reader(manifest.root, MAX_BYTES),
        summary=_summary(run, planned, data, record),
        counts={split: manifest.counts(split) for split in ("train", "val", "test")},
        images=data.get("images", len(manifest)),
        bad=len(bad),
        duplicates=data.get("duplicates_removed", 0),
        epochs=run.epochs,
        config=[(name, value, reason) for name, value, reason in planned.get("plan", [])],
        quarantine=[(file.path, file.reason) for file in bad],
        baseline=_baseline(run),
        against=against_baseline(run, manifest, headline, splits[headline][0]),
        temperature=bundle.get("temperature"),
        calibration=bundle.get("provenance", {}).get("calibration", ""),
        env=_environment(environment),
        reproduce=command("train", data.get("source"), "-c", run.config_path),
        commands=[command for _, command in next_commands(run)],
        warnings=[*data.get("notices", []), *filter(None, [unequal_line(record)])],
        efficiency=run.efficiency,
    )
    return write_report(run.report_path, facts)


def _summary(run: Run, planned: dict[str, Any], data: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    epochs = run.epochs
    seconds = sum(e.get("seconds") or 0 for e in epochs)
    took = f"{seconds / 60:.1f} min" if seconds >= 90 else f"{seconds:.0f} s"
    resumed = resumed_lines(record)
    return {
        "created": day(record["created"]),
        "model": planned.get("spec", {}).get("arch", ""),
        "parameters": f"{planned['parameters']:,}" if planned.get("parameters") is not None else "",
        "starting weights": planned.get("start", ""),
        "data": data.get("source") or "embedded digits",
        **_ended(run),
        "training time": f"{took} (epochs with their validation; without scan, baseline and evaluation)",
        **({"interruptions": f"{len(resumed)}: {'; '.join(resumed)}"} if resumed else {}),
    }


def ended(run: Run, config: RunConfig) -> Ended | None:
    """Return `progress.told_end` of a run."""
    return told_end(config.train, run.epochs, by_caller="stopped_after" in record_of(run.directory))


def _ended(run: Run) -> dict[str, str]:
    how = ended(run, run.config)
    return {} if how is None else {"stopped early" if how["early"] else "best": ended_line(how)}


def _baseline(run: Run) -> dict[str, Any] | None:
    found = run.read_json("baseline.json")
    return None if not found else {"name": f"linear probe on {found['features']}", **found}


def _environment(facts: dict[str, Any]) -> dict[str, Any]:
    flat = {key: value for key, value in facts.items() if key not in ("libraries", "command") and value is not None}
    flat |= {name: version for name, version in facts.get("libraries", {}).items() if version}
    return flat | {"command": " ".join(map(quoted, facts.get("command", [])))}
