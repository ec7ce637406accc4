"""What is minimised: a loss per task, exact under padding, accumulation and missing answers. `core.choices.LOSSES` names them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import reduce
from pkgutil import resolve_name
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..core.choices import LOSSES
from ..core.config import LossConfig
from ..core.errors import ConfigError, near
from ..core.labels import LabelSpace
from ..core.text import quoted

_EFFECTIVE_BETA = 0.999
Loss = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each row: (n, C) float32 logits and probabilities -> (n,)."""
    return -(targets * torch.log_softmax(logits, 1)).sum(1)


def binary_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy of each answer: (n, C) float32 logits and probabilities -> (n, C)."""
    return torch.nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")


class Term(Protocol):
    """The loss of one task, as a sum that is divided by a total of the whole batch.

    The total is known before the first micro-batch: so accumulation over micro-batches equals one large batch, and what
    has no weight (padding, unknown answers) changes neither the value nor any gradient.
    """

    def total(self, targets: Tensor, weight: Tensor) -> float:
        """Return the divisor of a batch, from CPU tensors (no device sync)."""
        ...

    def sum(self, logits: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
        """Return the weighted sum: logits, targets (n, C) with NaN where unknown, weight (n,) -> scalar float32."""
        ...


class _Weighted(ABC):
    """The loss of one task over what is known of it.

    Args:
        loss: (logits, probabilities) -> one value per row, or per answer.
        smoothing: mass that is moved from the target to all `choices`.
        weights: (C,) float32 class weights, or None.
        device: where the logits are.
    """

    def __init__(self, loss: Loss, smoothing: float, weights: np.ndarray | None, device: torch.device) -> None:
        self._loss, self.smoothing = loss, smoothing
        self._host = None if weights is None else torch.from_numpy(weights)
        self._weights = None if self._host is None else self._host.to(device)

    def total(self, targets: Tensor, weight: Tensor) -> float:
        """Sum of the weights of what is known."""
        return float(self.counts(*_filled(targets), weight, self._host).sum())

    def sum(self, logits: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
        """See `Term`."""
        known, filled = _filled(targets)
        soft = filled * (1 - self.smoothing) + self.smoothing / self.choices(targets)
        return (self._loss(logits.float(), soft) * self.counts(known, filled, weight, self._weights)).sum()

    @abstractmethod
    def choices(self, targets: Tensor) -> int:
        """Return how many answers the mass of smoothing is shared by."""

    @abstractmethod
    def counts(self, known: Tensor, targets: Tensor, weight: Tensor, weights: Tensor | None) -> Tensor:
        """Return what each value of the loss weighs."""


class OneOf(_Weighted):
    """A task with exactly one true class: its loss over the rows whose answer is known.

    Smoothing moves mass from the target to all C classes (Szegedy et al., CVPR 2016, section 7); a row counts as much as its
    target's classes.
    """

    def choices(self, targets: Tensor) -> int:
        return targets.shape[1]

    def counts(self, known: Tensor, targets: Tensor, weight: Tensor, weights: Tensor | None) -> Tensor:
        weight = torch.where(known.all(1), weight, 0.0)
        return weight if weights is None else weight * (targets @ weights)


class AnyOf(_Weighted):
    """A task of which any number of classes may hold: its loss over the answers that are known.

    Smoothing moves each answer towards 0.5; class weights are those of positive answers, and a negative answer weighs 1.
    """

    def choices(self, targets: Tensor) -> int:
        return 2

    def counts(self, known: Tensor, targets: Tensor, weight: Tensor, weights: Tensor | None) -> Tensor:
        weight = torch.where(known, weight[:, None], 0.0)
        return weight if weights is None else weight * (1 + (weights - 1) * targets)


def _filled(targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return what is known, and targets with zeros elsewhere: NaN times a weight of 0 would be NaN, also in the gradient."""
    known = ~targets.isnan()
    return known, torch.where(known, targets, 0.0)


class Objective:
    """The sum over tasks of each one's mean loss; tasks weigh the same, however many classes and answers they have.

    Args:
        labels: the tasks.
        config: resolved.
        weights: (K,) as `class_weights` returns them, or None.
        device: where the logits are.
    """

    def __init__(self, labels: LabelSpace, config: LossConfig, weights: np.ndarray | None, device: torch.device) -> None:
        chosen, smoothing = LOSSES[config.name], float(config.label_smoothing)
        self._sizes = [len(task.classes) for task in labels.tasks]
        self.terms: list[Term] = []
        for task, part in labels.parts:
            loss: Loss = resolve_name(chosen.any_of if task.kind == "any_of" else chosen.one_of)
            kind = AnyOf if task.kind == "any_of" else OneOf
            self.terms.append(kind(loss, smoothing, None if weights is None else weights[part], device))

    def totals(self, targets: Tensor, weight: Tensor) -> list[float]:
        """Return the divisor of each task for a batch, from CPU tensors; 0 where nothing is known of a task."""
        parts = zip(self.terms, self._columns(targets), strict=True)
        return [term.total(part, weight) for term, part in parts]

    def sums(self, logits: Tensor, targets: Tensor, weight: Tensor) -> list[Tensor]:
        """Return the weighted sum of each task: logits and targets (n, K), weight (n,) -> scalars, float32."""
        parts = zip(self.terms, self._columns(logits), self._columns(targets), strict=True)
        return [term.sum(own, part, weight) for term, own, part in parts]

    @staticmethod
    def mean(sums: Sequence[Tensor], totals: Sequence[float]) -> Tensor:
        """Return the loss, from sums and totals of each task; a task of which nothing is known is left out."""
        return reduce(torch.add, [part / total for part, total in zip(sums, totals, strict=True) if total])

    def _columns(self, values: Tensor) -> Sequence[Tensor]:
        return values.split(self._sizes, 1) if len(self._sizes) > 1 else (values,)


def class_weights(
    config: LossConfig, labels: LabelSpace, counts: np.ndarray, known: np.ndarray
) -> np.ndarray | None:
    """Return the weight of each class, or None when all are equal.

    Of a `one_of` task the weights have mean 1 over the training images. Of an `any_of` task they are weights of positive
    answers; negative ones weigh 1.

    Args:
        config: `class_weights` is none, auto (inverse frequency; any_of: negatives per positive), effective (Cui et al.,
            "Class-balanced loss based on effective number of samples", CVPR 2019, eq. 2), one number per class in class
            order, or names to numbers.
        labels: the tasks.
        counts: (K,) int64 training images of each class.
        known: (K,) int64 training images in which the answer is known.

    Returns:
        (K,) float32, or None.

    Raises:
        ConfigError: C003 for a wrong count of numbers or an unknown class name.
    """
    asked: Any = config.class_weights
    if asked == "none":
        return None
    if asked in ("auto", "effective"):
        rarity = _RARITY[asked]
        weights = np.where(labels.any_of, rarity(counts) / rarity(known - counts), rarity(counts))
    elif isinstance(asked, dict):
        weights = _named(asked, labels)
    else:
        weights = np.array(asked, np.float64)
        if len(weights) != labels.size:
            raise ConfigError(
                "C003",
                f"loss.class_weights has {len(weights)} numbers, and there are {labels.size} classes",
                why="the order is the class order: " + ", ".join(labels.classes),
                try_=f"--class-weights {','.join(f'{name}=1' for name in labels.classes[:3])}",
            )
    for task, part in labels.parts:
        if task.kind == "one_of" and counts[part].any():  # of a task without an answer there is nothing to scale by
            own, images = weights[part], counts[part]
            weights[part] = own * images.sum() / (own * images).sum()
    return weights.astype(np.float32)


_RARITY: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "auto": lambda images: 1.0 / np.maximum(images, 1),
    "effective": lambda images: (1 - _EFFECTIVE_BETA) / (1 - _EFFECTIVE_BETA ** np.maximum(images, 1)),
}


def _named(asked: dict[str, float], labels: LabelSpace) -> np.ndarray:
    """Return the numbers in column order, 1 where a class is not named; the name of a class may stand without its task."""
    plain = [name for task in labels.tasks for name in task.classes]
    weights = np.ones(labels.size)
    for name, weight in asked.items():
        at = [k for k, names in enumerate(zip(labels.classes, plain, strict=True)) if name in names]
        if len(at) == 1:
            weights[at] = weight
            continue
        known = [labels.classes[k] for k in at] or list(labels.classes)
        what = f"names {name!r}, a class of several tasks: " if at else f"names an unknown class {name!r}; the classes are "
        guess = known[0] if at else near(name, known) or known[0]
        raise ConfigError(
            "C003",
            f"loss.class_weights {what}{', '.join(known)}",
            try_=f"--class-weights {quoted(f'{guess}={weight:g}')}",
        )
    return weights
