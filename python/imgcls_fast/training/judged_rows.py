"""Chooses the images that an evaluation judges: not learnt from, and in files that are still what they were."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..core import env
from ..core.errors import ConfigError, DataError
from ..core.labels import LabelSpace
from ..core.manifest import SPLITS, Manifest
from ..core.predictions import Predictions
from ..core.run import Run
from ..core.text import command, some
from ..core.undecoded import Undecoded
from ..data.prepare import changed_files, scan_to_judge
from ..data.unknown import about_unknown
from ..engines.base import Engine
from .learnt import about_missing, about_parents, learnt_before, splits_seen
from .quarantined import Quarantined


@dataclass
class JudgedRows:
    """Holds the rows of a manifest that are to be judged, and what has to be reported about the others.

    Args:
        manifest: images of the run, or other ones.
        rows: to be judged.
        undecoded: images that the scan or the run has left out; the loader adds those that it cannot decode.
        warnings: sentences that must not be overlooked.
        notices: other sentences of the scan.
        facts: the same as figures, fields of `Metrics`: seen, unknown_classes, changed_files.
        changed: rows whose file has other bytes than at the scan; they are judged with the others, and `kept` drops them.
    """

    manifest: Manifest
    rows: np.ndarray
    undecoded: Undecoded = field(default_factory=Undecoded)
    warnings: tuple[str, ...] = ()
    notices: tuple[str, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)
    changed: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    def kept(self, predictions: Predictions) -> Predictions:
        """Return the predictions without those of changed files, which are then named in `warnings` and `facts`.

        A changed file that is no image any more has been reported as undecodable already.
        """
        drop = np.isin(predictions.rows, self.changed)
        if not drop.any():
            return predictions
        names = [path for path, gone in zip(predictions.paths, drop, strict=True) if gone]
        plural = len(names) > 1
        self.warnings += (
            f"{len(names):,} image{'s' * plural} changed since the run was trained and {'were' if plural else 'was'} left out: "
            + some(names),
        )
        self.facts["changed_files"] = tuple(names)
        return predictions.take(~drop)


def demand_split(split: str) -> None:
    """Raise for a split that there is not, before anything is opened.

    Raises:
        ConfigError: C003.
    """
    if split not in SPLITS:
        raise ConfigError("C003", f"split must be one of 'train', 'val', 'test', got {split!r}", try_="--split test")


def chosen_by_validation(labels: LabelSpace) -> str:
    """Name what the validation images of a run have chosen, in words."""
    if labels.any_of.any():
        return "the epoch, the temperature and the thresholds" if len(labels.tasks) == 1 else "the epoch, temperatures and thresholds"
    return "the epoch and the temperature" if labels.is_single else "the epoch and the temperatures"


def rows_to_judge(run: Run, data: Path | None, split: str, engine: Engine, *, include_train: bool = False) -> JudgedRows:
    """Choose the rows of one split of a run, or of other labelled images without those that the run was trained on.

    Args:
        data: the other images; None: those of the run.
        split: one of the run's; with `data` it is not looked at.
        engine: knows pixels and classes.
        include_train: judge images that the run was trained on as well; they are counted in any case.

    Raises:
        DataError: D014 when nothing is left to judge; D015 and D010 when files of the run are missing, or all have changed;
            D001..D013 for other images.
    """
    return _own(run, split) if data is None else _others(run, data, engine, include_train)


def _own(run: Run, split: str) -> JudgedRows:
    manifest = run.manifest
    late = Quarantined(run, manifest, run.config.data.max_bad).rows()
    rows = manifest.rows(split)
    if not len(rows):
        raise DataError(
            "D014", f"{run.name} has no {split} images", try_=command("eval", run.directory, "--split", "val")
        )
    own = set(rows.tolist())
    left = Undecoded({manifest.paths[row]: reason for row, reason in late.items() if row in own})
    rows = rows[~np.isin(rows, list(late))]
    changed = _same_files(run, manifest, rows, split)
    said = {
        "train": "these are the images that the run was trained on: the figures flatter the model",
        "val": f"these images also chose {chosen_by_validation(manifest.labels)} of the run: the figures are a little too good",
    }
    before = about_parents(run, manifest, split) if split != "train" else []
    return JudgedRows(manifest, rows, left, tuple(filter(None, [said.get(split), *before])), changed=changed)


def _same_files(run: Run, manifest: Manifest, rows: np.ndarray, split: str) -> np.ndarray:
    """Return the (m,) rows whose files have other bytes than at the scan.

    Raises:
        DataError: D015 where files are missing, D010 where none is as it was.
    """
    part = manifest.take(rows)
    found = changed_files(part, env.usable_cpus())
    away = found.missing
    there = Path(manifest.source).exists() and len(away) < len(rows)
    again = command("eval", run.directory, manifest.source if there else "DATA")
    if away:
        others = len(found.changed)
        also = f", and {others:,} {'have' if others > 1 else 'has'} changed" if others else ""
        raise DataError(
            "D015",
            f"{_share_of(len(away), len(rows))} {split} images of {run.name} are missing under {manifest.root}{also}",
            where=some(away),
            why="the rest alone is not what the run was judged on" if there else "the folder was moved, or its disk is not there",
            try_=f"bring the files back, or judge what is there now: {again}" if there else f"{again}   (where the images are now)",
        )
    if len(found.all) == len(rows) > 0:
        raise DataError(
            "D010",
            f"all {len(rows):,} {split} images of {run.name} changed since it was trained",
            where=some(found.all),
            try_=f"restore the files, or judge them as they are now: {again}",
        )
    other = set(found.changed)
    return np.array([row for row, path in zip(rows.tolist(), part.paths, strict=True) if path in other], np.int64)


def _others(run: Run, data: Path, engine: Engine, include_train: bool) -> JudgedRows:
    found = scan_to_judge(run.config.data, data, engine.pixels, engine.labels)
    manifest, total = found.manifest, len(found.manifest)
    seen = splits_seen(run.manifest, manifest)
    before, names = learnt_before(run, manifest)
    learnt = (seen == SPLITS.index("train")) | before
    chose, whose = (seen == SPLITS.index("val")) & ~before, f"{run.name} or {names}" if names else run.name
    train, rows = int(learnt.sum()), np.arange(total, dtype=np.int64)
    warnings = []
    if train and not include_train:
        anyhow = command("eval", run.directory, data, "--include-train")
        if train == total:
            raise DataError(
                "D014",
                f"all {total:,} images of {data} are training images of {whose}, so they cannot tell how good it is",
                try_=f"{command('eval', run.directory)}   (its own test images), or all the same: {anyhow}",
            )
        rows = rows[~learnt]
        warnings.append(
            f"{train:,} of {total:,} images are training images of {whose} and were left out (judge them too: --include-train)"
        )
    elif train:
        warnings.append(
            f"{train:,} of {total:,} images are training images of {whose}: the figures flatter the model"
        )
    if chose.any():
        warnings.append(
            f"{int(chose.sum()):,} of {len(rows):,} judged images also chose {chosen_by_validation(engine.labels)} of {run.name}: "
            "the figures are a little too good"
        )
    warnings.append(about_missing(run))
    judged = train if include_train else 0
    counts = {"train_left_out": train - judged, "train_judged": judged, "val_judged": int(chose.sum())}
    labels = engine.labels
    known = [name for task in labels.tasks for name in task.classes]  # without their task, as the scan names them
    unknown = about_unknown(found.unknown_classes, known, ignored=not labels.is_single)
    return JudgedRows(
        manifest,
        rows,
        Undecoded({file.path: file.reason for file in found.quarantine}),
        tuple(filter(None, (unknown, *warnings))),
        tuple(text for text in found.notices if text != unknown),
        {"seen": counts, "unknown_classes": dict(found.unknown_classes)},
    )


def _share_of(some: int, whole: int) -> str:
    return f"all {whole:,}" if some == whole else f"{some:,} of {whole:,}"
