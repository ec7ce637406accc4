"""Measures what the engines of a run are worth: right answers, and answers like torch's, on real images. Part of `imgcls-fast bench`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..core.bundle import Bundle
from ..core.errors import DataError
from ..core.labels import LabelSpace
from ..core.predictions import Predictions
from ..core.run import Run
from ..core.undecoded import Undecoded
from ..engines.agreement import MAX_SCORE
from ..engines.base import least_scores
from ..evaluation.metrics import accuracy_interval
from ..evaluation.row_scores import row_scores
from ..loading.loader import read_rows
from .contenders import Contender

MOST_ROWS = 1000
_MOST_BYTES = 512 << 20  # of their pixels
_NOISE = 16  # images, where there are no others


@dataclass(frozen=True, eq=False)
class Sample:
    """The images that judge: (n, S, S, C) uint8 parts and (N, K) targets; noise without targets where there are none."""

    split: str
    pixels: list[np.ndarray]
    targets: np.ndarray | None
    of: int  # rows of the split
    labels: LabelSpace
    thresholds: np.ndarray | None = None
    undecoded: Undecoded = field(default_factory=Undecoded)


def sample_of(run: Run, bundle: Bundle) -> Sample:
    """Test rows, else val rows, spread over the classes; noise where the run has neither, or their files are gone."""
    manifest = run.manifest
    labelled = {split: manifest.rows(split)[manifest.labelled[manifest.rows(split)]] for split in ("test", "val")}
    split = next((name for name, rows in labelled.items() if len(rows)), "")
    rows = labelled.get(split, np.zeros(0, np.int64))
    side, channels = bundle.pixels.size, bundle.pixels.channels
    take = min(len(rows), MOST_ROWS, max(1, _MOST_BYTES // (side * side * channels)))
    picked = manifest.spread(rows, take)
    pixels, targets, left = [], [], Undecoded()
    least = least_scores(bundle.labels, bundle.thresholds)
    try:
        for batch in read_rows(manifest, picked, bundle.pixels, on_bad=left.of(manifest)) if take else ():
            keep = np.asarray(batch.weight) > 0
            pixels.append(np.ascontiguousarray(np.asarray(batch.pixels)[keep]))
            targets.append(np.asarray(batch.targets)[keep])
    except DataError as error:
        if error.code != "D015":
            raise
        pixels.clear()  # out of reach: times are worth having without them, and part of the rows would be another sample
    if not sum(map(len, pixels)):
        noise = np.random.default_rng(0).integers(0, 256, (_NOISE, side, side, channels), np.uint8)
        return Sample("noise", [noise], None, 0, bundle.labels, least, left)
    return Sample(split, pixels, np.concatenate(targets), len(rows), bundle.labels, least, left)


def accuracy_of(scores: np.ndarray, sample: Sample) -> dict[str, Any] | None:
    """Share of images with right answers to all that is known of them, with the interval that `eval` gives."""
    if sample.targets is None:
        return None
    n = len(sample.targets)
    said = Predictions(np.arange(n), scores, sample.targets, sample.labels, ("",) * n, thresholds=sample.thresholds)
    hits = int((next(iter(row_scores(said).values())) == 1).sum())
    low, high = accuracy_interval(hits, n)
    figure = {} if sample.labels.is_single else {"figure": "exact match"}
    return {"accuracy": hits / n, "low": low, "high": high, "hits": hits, "rows": n, "split": sample.split, **figure}


def agreement_of(scores: np.ndarray, said: np.ndarray, sample: Sample) -> dict[str, Any]:
    same, n = int(sample.labels.same_answers(said, scores, sample.thresholds).sum()), len(said)
    apart = float(np.where(np.isfinite(scores), np.abs(scores - said), np.inf).max())
    return {"same_top1": same, "rows": n, "share": same / n, "max_score_diff": apart, "images": sample.split}


def why_not(contender: Contender, row: dict[str, Any], reference: dict[str, Any] | None) -> str | None:
    """Why the times of an engine and of the reference must not be compared, if so."""
    if reference is None:
        return None
    apart = row["agreement"]["max_score_diff"]
    if not math.isfinite(apart):
        return "its scores are not finite"
    full = {row["precision"], reference["precision"], contender.file_precision} == {"fp32"}
    if full and apart > MAX_SCORE:
        return f"its scores differ from torch's by up to {apart:.1e} (allowed: {MAX_SCORE:.0e}), so it is not the same model"
    return None
