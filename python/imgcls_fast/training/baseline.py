"""Fits linear probes in seconds: the figure that a trained model must beat."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.batch import Batch
from ..core.labels import THRESHOLD, LabelSpace
from ..core.manifest import Manifest
from ..core.predictions import Predictions
from ..core.run import Run
from ..evaluation.metrics import Metrics
from ..evaluation.tasks import TaskMetrics, judge_all
from ..loading.loader import read_rows
from .plan import Plan, starting_model

if TYPE_CHECKING:
    from sklearn.pipeline import Pipeline

READ_S, FIT_S, JUDGE_S = 20.0, 20.0, 20.0  # seconds: features of training images, fitting, features of judged images
LEAST_ROWS = 500  # images that are read however long it takes
_MOST_BYTES = 512 << 20  # of features
_FIRST_FIT, _FIRST_FLOP = 2000, 2e11  # most rows and work of the fit that tells how long more rows would take
_LEAST_FIT = 100  # rows of it, whatever the work
_ITERATIONS = 300
_GRID = 8
_RESAMPLES = 200  # for the intervals of means over tasks


def fit_baseline(plan: Plan, manifest: Manifest, run: Run) -> dict[str, Any]:
    """Fit and judge the linear probes of a run: on the starting weights where there are any, else on simple image features.

    Each `one_of` task has a probe, and each class of an `any_of` task has one (one against the rest, held against 0.5). They see
    as many images as a minute allows, whatever their number; a run keeps the probes that it once had.

    Returns:
        features (what they are), split, n and of (rows judged, rows of the split), train_rows and train_of, limit (what kept
        it from using every training image, or ""), seconds, and figures as in `Metrics`: accuracy, ci, macro_f1; of one-label
        data also balanced_accuracy, imbalanced and majority, of other data exact_match, exact_match_ci and macro_ap. Written
        to baseline.json; the answers are in eval/baseline.
    """
    begin = time.monotonic()
    split = "test" if len(manifest.rows("test")) else "val"
    train, judged = (manifest.fair_order(manifest.rows(name)) for name in ("train", split))
    features, name = _probe_features(plan, manifest.labels)
    x, targets, _, limit = read_features(features, _batches(plan, manifest, train), READ_S)
    probes, used = fit_probes(x, targets, manifest.labels, FIT_S, plan.config.train.seed)
    if used < int((~np.isnan(targets)).any(1).sum()):
        limit = f"{FIT_S:.0f} s of fitting"
    x, _, rows, _ = read_features(features, _batches(plan, manifest, judged), JUDGE_S)
    predictions = answers(probes, x, rows, manifest)
    predictions.save(run.evaluation("baseline"))
    bootstrap = 0 if manifest.labels.is_single else min(_RESAMPLES, plan.config.evaluate.bootstrap)
    metrics = judge_all(predictions, bootstrap=bootstrap, seed=plan.config.train.seed, group=manifest.group)
    found = {
        "features": name,
        "split": split,
        **_figures(metrics),
        "n": metrics.n,
        "of": len(judged),
        "train_rows": used,
        "train_of": len(train),
        "limit": limit,
        "seconds": round(time.monotonic() - begin, 2),
    }
    run.write_json("baseline.json", found)
    return found


def _figures(metrics: Metrics | TaskMetrics) -> dict[str, Any]:
    if isinstance(metrics, TaskMetrics):
        headline = metrics.headline()
        return {name: headline[name] for name in ("accuracy", "ci", "exact_match", "exact_match_ci", "macro_f1", "macro_ap")}
    return {
        "accuracy": metrics.accuracy,
        "ci": list(metrics.accuracy_ci),
        "balanced_accuracy": metrics.balanced_accuracy,
        "macro_f1": metrics.macro_f1,
        "imbalanced": metrics.imbalanced,
        "majority": metrics.majority.to_dict(),
    }


def _batches(plan: Plan, manifest: Manifest, rows: np.ndarray) -> Generator[Batch, None, None]:
    """Read some rows, in their order, in batches as evaluation sees them."""
    train, size = plan.config.train, min(64, int(plan.config.evaluate.batch_size))
    return read_rows(manifest, rows, plan.pixels, batch_size=size, backend=str(train.loader), workers=int(train.workers))


def _probe_features(plan: Plan, labels: LabelSpace) -> tuple[Callable[[Any], np.ndarray], str]:
    if plan.start.kind == "scratch":
        return lambda pixels: image_features(np.asarray(pixels)), "simple image features"
    import torch

    start_from = plan.start
    model = starting_model(plan.spec, start_from, labels)
    device = torch.device(plan.config.train.device)
    model = model.to(device).eval()

    def features(pixels: Any) -> np.ndarray:
        with torch.inference_mode():
            return model.features(torch.as_tensor(pixels).to(device)).float().cpu().numpy()

    return (
        features,
        f"frozen features of the starting weights ({start_from.path.name if start_from.path else plan.spec['arch']})",
    )


def image_features(pixels: np.ndarray) -> np.ndarray:
    """Describe images simply: colour thumbnails, colour histograms, gradient orientations on a 4 x 4 grid.

    Args:
        pixels: (N, S, S, C) uint8, S at least 8.

    Returns:
        (N, F) float32, each block scaled to similar size. The orientation histograms follow Dalal and Triggs (CVPR
        2005) without overlapping blocks.
    """
    x = pixels.astype(np.float32) / 255
    n, size = len(x), x.shape[1]
    side = size // _GRID * _GRID
    middle = x[:, :side, :side]
    step = side // _GRID
    thumbnail = middle.reshape(n, _GRID, step, _GRID, step, -1).mean((2, 4)).reshape(n, -1)
    bins = np.minimum((x * 8).astype(np.int64), 7)
    histogram = np.stack([(bins == b).mean((1, 2)) for b in range(8)], 1).reshape(n, -1)
    gray = x[..., :3].mean(3)
    dy, dx = np.gradient(gray, axis=(1, 2))
    strength = np.hypot(dx, dy)
    angle = np.minimum((np.arctan2(dy, dx) % np.pi) / np.pi * 9, 8.999).astype(np.int64)
    cell = np.minimum(np.arange(size) * 4 // size, 3)
    where = (cell[:, None] * 4 + cell[None, :])[None] * 9 + angle + np.arange(n)[:, None, None] * 144
    orientation = np.bincount(where.ravel(), strength.ravel(), minlength=n * 144).reshape(n, 144)
    orientation = orientation / (orientation.sum(1, keepdims=True) + 1e-6)
    return np.concatenate([thumbnail, 2 * histogram, 10 * orientation], 1).astype(np.float32)


def read_features(
    features: Callable[[Any], np.ndarray], batches: Generator[Batch, None, None], seconds: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, str]:
    """Read features (n, F), targets (n, K) and rows of as many images as some seconds allow, at least `LEAST_ROWS`; and what ended it.

    Args:
        features: (N, S, S, C) uint8 -> (N, F) float.
        batches: in an order whose every beginning is a sample; closed at the end.
    """
    x, targets, rows, limit = [], [], [], ""
    end, read, held = time.monotonic() + seconds, 0, 0
    with closing(batches):
        for batch in batches:
            if read >= LEAST_ROWS and time.monotonic() > end:
                limit = f"{seconds:.0f} s of reading"
            elif read >= LEAST_ROWS and held > _MOST_BYTES:
                limit = f"{_MOST_BYTES >> 20} MB of features"
            if limit:
                break
            keep = np.asarray(batch.weight) > 0
            x.append(features(batch.pixels)[keep])
            targets.append(np.asarray(batch.targets)[keep])
            rows.append(np.asarray(batch.rows)[keep])
            read, held = read + int(keep.sum()), held + x[-1].nbytes
    return np.concatenate(x), np.concatenate(targets), np.concatenate(rows), limit


@dataclass(frozen=True)
class Probe:
    """Holds one fitted probe and the columns that it answers: those of a `one_of` task, or one class of an `any_of` task.

    Args:
        columns: first and last column + 1.
        model: None where its rows hold a single answer: then `constant` is the score of each column.
        holds: whether the model answers no or yes about its one column, and not with one of its columns.
    """

    columns: slice
    model: Pipeline | None
    constant: np.ndarray
    holds: bool

    def scores(self, x: np.ndarray) -> np.ndarray:
        """Return (n, columns) float32 probabilities."""
        found = np.tile(self.constant.astype(np.float32), (len(x), 1))
        if self.model is None:
            return found
        given, classes = self.model.predict_proba(x), self.model[-1].classes_
        if self.holds:
            found[:, 0] = given[:, classes == 1][:, 0]
        else:
            found[:, classes] = given
        return found


def fit_probes(
    x: np.ndarray, targets: np.ndarray, labels: LabelSpace, seconds: float, seed: int
) -> tuple[list[Probe], int]:
    """Fit the probes of all tasks, each to the rows in which its answer is known; returns how many rows any of them has used.

    Args:
        x, targets: (n, F) features and (n, K) targets with NaN where unknown, in an order whose every beginning is a sample.
        seconds: for all of them together.
    """
    wanted: list[tuple[slice, np.ndarray, np.ndarray, bool]] = []  # columns, rows, answers, whether it is about one class
    for task, part in labels.parts:
        if task.kind == "any_of":
            for k in range(part.start, part.stop):
                rows = np.flatnonzero(~np.isnan(targets[:, k]))
                wanted.append((slice(k, k + 1), rows, (targets[rows, k] >= THRESHOLD).astype(np.int64), True))
        else:
            rows = np.arange(len(x)) if labels.is_single else np.flatnonzero(~np.isnan(targets[:, part]).any(1))
            wanted.append((part, rows, targets[rows, part].argmax(1), False))
    probes, used = [], np.zeros(len(x), bool)
    for columns, rows, y, holds in wanted:
        model, fitted = None, len(y)
        if len(np.unique(y)) > 1:
            model, fitted = fit_probe(x if len(rows) == len(x) else x[rows], y, seconds / len(wanted), seed)
        used[rows[:fitted]] = True
        probes.append(Probe(columns, model, _constant(columns, y, model is not None, holds), holds))
    return probes, int(used.sum())


def _constant(columns: slice, y: np.ndarray, fitted: bool, holds: bool) -> np.ndarray:
    """Return the scores of columns that no model answers: zeros beside one, else the only answer that there is, or no opinion."""
    size = columns.stop - columns.start
    if fitted:
        return np.zeros(size)
    if holds:
        return np.array([(y.sum() + 1) / (len(y) + 2)])
    return np.bincount(y, minlength=size) / len(y) if len(y) else np.full(size, 1 / size)


def fit_probe(x: np.ndarray, y: np.ndarray, seconds: float, seed: int) -> tuple[Pipeline, int]:
    """Fit a logistic regression to as many of the first rows as some seconds are likely to allow; returns it and their number.

    Args:
        x, y: (n, F) features and (n,) classes in an order whose every beginning is a sample.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    # floating-point operations of a fit to the first rows: 2 products an iteration, with the classes that occur in them
    classes = np.cumsum(np.bincount(np.unique(y, return_index=True)[1], minlength=len(y)))
    work = 4.0 * _ITERATIONS * x.shape[1] * np.arange(1, len(y) + 1) * classes
    least = int(np.argmax(classes > 1)) + 1  # a rare label may come late, and a fit needs two answers
    end, used = time.monotonic() + seconds, max(least, _rows_within(work[:_FIRST_FIT], _FIRST_FLOP))
    while True:
        begin = time.monotonic()
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=_ITERATIONS, random_state=seed % 2**32))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The number of unique classes")  # so it is with few rows of many
            probe.fit(x[:used], y[:used])
        now = time.monotonic()
        # the time grows with the rows, and a little faster where more of them take more steps
        more = _rows_within(work, work[used - 1] * (end - now) / (1.5 * max(now - begin, 1e-3)))
        if used == len(y) or more < min(2 * used, len(y)):
            return probe, used
        used = more


def _rows_within(work: np.ndarray, most: float) -> int:
    """Return how many rows can be fitted with this much work, given the work of each number of rows."""
    return min(len(work), max(_LEAST_FIT, int(np.searchsorted(work, most, side="right"))))


def answers(probes: list[Probe], x: np.ndarray, rows: np.ndarray, manifest: Manifest) -> Predictions:
    """Return the answers of fitted probes about some rows of a manifest."""
    scores = np.zeros((len(rows), manifest.labels.size), np.float32)
    for probe in probes:
        scores[:, probe.columns] = probe.scores(x)
    return Predictions.gather(
        [rows], [scores], [manifest.targets(rows)], manifest.labels, manifest.paths, manifest.fingerprint
    )
