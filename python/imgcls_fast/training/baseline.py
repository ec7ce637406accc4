"""What a linear probe reaches in seconds: the figure that a trained model must beat."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from ..core.batch import Batch
from ..core.manifest import LabelSpace, Manifest
from ..core.predictions import Predictions
from ..core.run import Run
from ..data.loader import open_loader
from ..data.sampler import Sampler
from ..evaluation.metrics import judge
from .plan import Plan, starting_model

MOST_ROWS = 2000  # training images that the probe sees at most
_GRID = 8


def fit_baseline(plan: Plan, manifest: Manifest, run: Run, emit: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """The linear probe of a run, on published weights if the model starts from them, else on simple image features.

    Returns:
        What `linear_probe` returns; also written to baseline.json.
    """
    split = "test" if len(manifest.rows("test")) else "val"
    features, name = _probe_features(plan)
    loaders = []
    for part in (manifest.spread(manifest.rows("train"), MOST_ROWS), manifest.rows(split)):
        sampler = Sampler(manifest, part, plan.pixels, min(64, int(plan.config.evaluate.batch_size)))
        backend = plan.config.train.loader if plan.config.train.loader != "dali-gpu" else "dali-cpu"
        loaders.append(open_loader(sampler, backend, workers=int(plan.config.train.workers), once=True))
    try:
        found = linear_probe(
            features,
            loaders[0].epoch(0),
            loaders[1].epoch(0),
            manifest.labels,
            name=name,
            split=split,
            seed=plan.config.train.seed,
        )
    finally:
        for loader in loaders:
            loader.close()
    run.write_json("baseline.json", found)
    return found


def _probe_features(plan: Plan) -> tuple[Callable[[Any], np.ndarray], str]:
    if plan.start.kind == "scratch":
        return lambda pixels: image_features(np.asarray(pixels)), "simple image features"
    import torch

    start_from = plan.start
    model = starting_model(plan.spec, start_from)
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


def linear_probe(
    features: Any,
    fit_on: Iterable[Batch],
    judge_on: Iterable[Batch],
    labels: LabelSpace,
    *,
    name: str,
    split: str,
    seed: int,
) -> dict[str, Any]:
    """Fit logistic regression on frozen features and judge it.

    Args:
        features: (N, S, S, C) uint8 -> (N, F) float.
        fit_on, judge_on: evaluation batches of training rows, and of the rows to judge on.
        name: what the features are, for the console.
        split: name of the judged rows.

    Returns:
        features, split, accuracy, ci, n_train, n and seconds.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    begin = time.monotonic()
    x, y, _ = _collect(features, fit_on)
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=300, random_state=seed))
    probe.fit(x, y)
    x, y, rows = _collect(features, judge_on)
    scores = np.zeros((len(y), labels.size), np.float32)
    scores[:, probe[-1].classes_] = probe.predict_proba(x)
    order = np.argsort(rows)
    targets = np.eye(labels.size, dtype=np.float32)[y[order]]
    paths = tuple(str(r) for r in rows[order])
    metrics = judge(Predictions(rows[order], scores[order], targets, labels, paths), bootstrap=1000, seed=seed)
    return {
        "features": name,
        "split": split,
        "accuracy": metrics.accuracy,
        "ci": list(metrics.accuracy_ci),
        "n": metrics.n,
        "seconds": round(time.monotonic() - begin, 2),
    }


def _collect(features: Any, batches: Iterable[Batch]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    x, y, rows = [], [], []
    for batch in batches:
        keep = np.asarray(batch.weight) > 0
        x.append(features(batch.pixels)[keep])
        y.append(np.asarray(batch.targets).argmax(1)[keep])
        rows.append(np.asarray(batch.rows)[keep])
    return np.concatenate(x), np.concatenate(y), np.concatenate(rows)
