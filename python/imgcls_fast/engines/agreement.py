"""Do two engines give the same answers? Compared on real images, and judged by what the precision may cost."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..core.errors import ExportError, GateFailed
from ..core.labels import THRESHOLD, LabelSpace
from .base import Engine

_CLEAR = 1e-3
MAX_SCORE = 1e-4  # of an engine in FP32
# What half a mantissa may cost on real images. The gate on labelled rows is what decides about accuracy.
_REDUCED = {"score_diff": 5e-2, "relative_l2": 5e-2}


@dataclass(frozen=True)
class Comparison:
    """Two engines on the same images.

    Args:
        images: how many.
        same_top1: images with the same answer, to every task.
        clear: images with a clear answer of the reference: a first class that leads by more than the margin asked for, or a
            class of an any_of task that lies further from its threshold.
        same_clear: those of them with the same clear answers.
        max_score_diff: largest absolute difference of a score.
        relative_l2: norm of the differences over the norm of the scores, both after the mean over images was taken off: what all
            images share would hide a graph that ignores its input.
    """

    images: int
    same_top1: int
    clear: int
    same_clear: int
    max_score_diff: float
    relative_l2: float

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


def compare_engines(
    reference: Engine, other: Engine, batches: Iterable[np.ndarray], *, margin: float = _CLEAR
) -> Comparison:
    """Score the same (n, H, W, C) uint8 batches with both.

    Args:
        margin: see `Comparison.clear`.
    """
    pairs = [(reference.scores(pixels), other.scores(pixels)) for pixels in batches]
    if not pairs:
        return Comparison(0, 0, 0, 0, 0.0, 0.0)
    a, b = (np.concatenate(part).astype(np.float64) for part in zip(*pairs, strict=True))
    labels, least = reference.labels, reference.thresholds
    equal = labels.decide(a, least) == labels.decide(b, least)
    sure = _clear_columns(labels, least, a, margin)
    same, clear, kept = equal.all(1), sure.any(1), (equal | ~sure).all(1)
    centred = a - a.mean(0)
    error = float(np.linalg.norm(b - b.mean(0) - centred) / max(float(np.linalg.norm(centred)), 1e-30))
    worst = float(np.abs(a - b).max())
    if not np.isfinite(b).all():
        worst, error = float("inf"), float("inf")
    return Comparison(len(a), int(same.sum()), int(clear.sum()), int((kept & clear).sum()), worst, error)


def _clear_columns(labels: LabelSpace, thresholds: np.ndarray | None, scores: np.ndarray, margin: float) -> np.ndarray:
    """(n, K) bool: the columns whose answer is not close to another one."""
    least = np.full(labels.size, THRESHOLD, np.float32) if thresholds is None else thresholds
    sure = np.abs(scores - least) > margin
    for task, part in labels.parts:
        if task.kind == "one_of":
            best = np.sort(scores[:, part], 1)
            sure[:, part] = (best[:, -1:] - best[:, -2:-1] > margin) if best.shape[1] > 1 else True
    return sure


def clear_margin(precision: str) -> float:
    """The lead of a first class, or the distance from a threshold, that makes an answer clear."""
    return _CLEAR if precision == "fp32" else _REDUCED["score_diff"]


def judge_comparison(result: Comparison, precision: str, max_score_diff: float, runtime: str) -> None:
    """Refuse a file that does not compute what the original computes.

    Raises:
        ExportError: E001 without images.
        GateFailed: E901, with the numbers.
    """
    if result.images == 0:
        raise ExportError(
            "E001",
            "there are no images to compare the exported model on",
            try_="imgcls-fast export RUN --onnx   (with the images in place)",
        )
    full = precision == "fp32"
    allowed = max_score_diff if full else max(_REDUCED["score_diff"], max_score_diff)
    right = result.max_score_diff <= allowed and result.same_clear == result.clear
    if right and (full or result.relative_l2 <= _REDUCED["relative_l2"]):
        return
    raise GateFailed(
        "E901",
        f"{runtime} disagrees with torch on {result.images} images: largest score difference {result.max_score_diff:.2e} "
        f"(allowed {allowed:.0e}), relative error {result.relative_l2:.1e}, same answer on {result.same_top1} of {result.images}",
        why=f"in {precision}; nothing was exported",
        try_="imgcls-fast export --onnx --opset 18" if full else "the same command with --precision fp32",
    )
