"""What a linear probe reaches in seconds: the figure that a trained model must beat."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Generator
from contextlib import closing
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.batch import Batch
from ..core.manifest import LabelSpace, Manifest
from ..core.predictions import Predictions
from ..core.run import Run
from ..evaluation.metrics import judge
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


def fit_baseline(plan: Plan, manifest: Manifest, run: Run) -> dict[str, Any]:
    """Fit and judge the linear probe of a run: on the starting weights where there are any, else on simple image features.

    It sees as many images as a minute allows, whatever their number; a run keeps the probe that it once had.

    Returns:
        features (what they are), split, accuracy, ci, balanced_accuracy, macro_f1, imbalanced and majority (as in `Metrics`), n and
        of (rows judged, rows of the split), train_rows and train_of,
        limit (what kept it from using every training image, or ""), seconds. Written to baseline.json; the answers lie in
        eval/baseline.
    """
    begin = time.monotonic()
    split = "test" if len(manifest.rows("test")) else "val"
    train, judged = (manifest.fair_order(manifest.rows(name)) for name in ("train", split))
    features, name = _probe_features(plan, manifest.labels)
    x, y, _, limit = read_features(features, _batches(plan, manifest, train), READ_S)
    probe, used = fit_probe(x, y, FIT_S, plan.config.train.seed)
    if used < len(y):
        limit = f"{FIT_S:.0f} s of fitting"
    x, _, rows, _ = read_features(features, _batches(plan, manifest, judged), JUDGE_S)
    predictions = answers(probe, x, rows, manifest)
    predictions.save(run.evaluation("baseline"))
    metrics = judge(predictions, bootstrap=0, group=manifest.group)
    found = {
        "features": name,
        "split": split,
        "accuracy": metrics.accuracy,
        "ci": list(metrics.accuracy_ci),
        "balanced_accuracy": metrics.balanced_accuracy,
        "macro_f1": metrics.macro_f1,
        "imbalanced": metrics.imbalanced,
        "majority": metrics.majority.to_dict(),
        "n": metrics.n,
        "of": len(judged),
        "train_rows": used,
        "train_of": len(train),
        "limit": limit,
        "seconds": round(time.monotonic() - begin, 2),
    }
    run.write_json("baseline.json", found)
    return found


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
    """Simple features of images: colour thumbnails, colour histograms, gradient orientations on a 4 x 4 grid.

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
    """Features (n, F), classes and rows of the images that can be read in some seconds, at least `LEAST_ROWS`; and what ended it.

    Args:
        features: (N, S, S, C) uint8 -> (N, F) float.
        batches: of an order whose every beginning is a sample; closed at the end.
    """
    x, y, rows, limit = [], [], [], ""
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
            y.append(np.asarray(batch.targets).argmax(1)[keep])
            rows.append(np.asarray(batch.rows)[keep])
            read, held = read + int(keep.sum()), held + x[-1].nbytes
    return np.concatenate(x), np.concatenate(y), np.concatenate(rows), limit


def fit_probe(x: np.ndarray, y: np.ndarray, seconds: float, seed: int) -> tuple[Pipeline, int]:
    """Logistic regression on features, on as many of the first rows as some seconds are likely to allow; and their number.

    Args:
        x, y: (n, F) features and (n,) classes in an order whose every beginning is a sample.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    # floating-point operations of a fit to the first rows: 2 products an iteration, with the classes that occur in them
    classes = np.cumsum(np.bincount(np.unique(y, return_index=True)[1], minlength=len(y)))
    work = 4.0 * _ITERATIONS * x.shape[1] * np.arange(1, len(y) + 1) * classes
    end, used = time.monotonic() + seconds, _rows_within(work[:_FIRST_FIT], _FIRST_FLOP)
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
    """How many rows can be fitted with this much work, given the work of each number of rows."""
    return min(len(work), max(_LEAST_FIT, int(np.searchsorted(work, most, side="right"))))


def answers(probe: Pipeline, x: np.ndarray, rows: np.ndarray, manifest: Manifest) -> Predictions:
    """What a fitted probe says about some rows of a manifest."""
    scores = np.zeros((len(rows), manifest.labels.size), np.float32)
    scores[:, probe[-1].classes_] = probe.predict_proba(x)
    return Predictions.gather(
        [rows], [scores], [manifest.targets(rows)], manifest.labels, manifest.paths, manifest.fingerprint
    )
