"""What is minimised: cross-entropy with soft targets, smoothing and weights, exact under padding and accumulation."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.config import LossConfig
from ..core.errors import ConfigError, near

_EFFECTIVE_BETA = 0.999


def class_weights(config: LossConfig, classes: tuple[str, ...], counts: np.ndarray) -> np.ndarray | None:
    """The weight of each class, with mean 1 over the training images; None when all are equal.

    Args:
        config: `class_weights` is none, auto (inverse frequency), effective (Cui et al., "Class-balanced loss based on
            effective number of samples", CVPR 2019, eq. 2), one number a class in class order, or names to numbers.
        classes: names in column order.
        counts: (K,) int64 training images of each class.

    Returns:
        (K,) float32, or None.

    Raises:
        ConfigError: C003 for a wrong count of numbers or an unknown class name.
    """
    asked: Any = config.class_weights
    if asked == "none":
        return None
    if asked == "auto":
        weights = 1.0 / np.maximum(counts, 1)
    elif asked == "effective":
        weights = (1 - _EFFECTIVE_BETA) / (1 - _EFFECTIVE_BETA ** np.maximum(counts, 1))
    elif isinstance(asked, dict):
        weights = _named(asked, classes)
    else:
        weights = np.array(asked, np.float64)
        if len(weights) != len(classes):
            raise ConfigError(
                "C003",
                f"loss.class_weights has {len(weights)} numbers, and there are {len(classes)} classes",
                why="the order is the class order: " + ", ".join(classes),
                try_=f"--class-weights {','.join(f'{name}=1' for name in classes[:3])}",
            )
    return (weights * counts.sum() / (weights * counts).sum()).astype(np.float32)


def _named(asked: dict[str, float], classes: tuple[str, ...]) -> np.ndarray:
    for name in asked:
        if name not in classes:
            guess = near(name, classes)
            raise ConfigError(
                "C003",
                f"loss.class_weights names an unknown class {name!r}; the classes are {', '.join(classes)}",
                try_=f"--class-weights {guess or classes[0]}={asked[name]:g}",
            )
    return np.array([asked.get(name, 1.0) for name in classes], np.float64)


class CrossEntropy:
    """Cross-entropy of logits against soft targets, as a sum over rows that the caller divides by `total`.

    Dividing by the weight of the whole batch, known before the first micro-batch, makes accumulation over micro-batches
    equal to one large batch, and padding (weight 0) invisible.

    Args:
        smoothing: mass moved from the target to all K classes (Szegedy et al., CVPR 2016, section 7).
        weights: (K,) float32 class weights, or None.
        device: where the logits are.
    """

    def __init__(self, smoothing: float, weights: np.ndarray | None, device: torch.device) -> None:
        self.smoothing = smoothing
        self._host = None if weights is None else torch.from_numpy(weights)
        self._weights = None if weights is None else self._host.to(device)  # type: ignore[union-attr]

    def total(self, targets: Tensor, weight: Tensor) -> float:
        """The divisor of a batch, from CPU tensors (no device sync): sum of row weights times class weights."""
        if self._host is not None:
            weight = weight * (targets @ self._host)
        return float(weight.sum())

    def sum(self, logits: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
        """Weighted sum of row losses: logits (n, K), targets (n, K) float32, weight (n,) float32 -> scalar float32."""
        if self._weights is not None:
            weight = weight * (targets @ self._weights)
        soft = targets * (1 - self.smoothing) + self.smoothing / targets.shape[1]
        rows = -(soft * torch.log_softmax(logits.float(), 1)).sum(1)
        return (rows * weight).sum()
