"""The loss of every label kind against its formula: missing answers, padding and accumulation change neither value nor gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from imgcls_fast.core.batch import Batch
from imgcls_fast.core.config import LossConfig
from imgcls_fast.core.errors import ConfigError
from imgcls_fast.core.labels import LabelSpace, Task
from imgcls_fast.training.objectives import Objective, class_weights

CPU = torch.device("cpu")
NAN = float("nan")
TWO = LabelSpace((Task("shape", ("round", "square")), Task("marks", ("dot",), "any_of")))  # 3 columns
CELLS = LabelSpace((Task("label", ("RBC", "WBC", "platelets"), "any_of"),))


def objective(labels: LabelSpace, weights: np.ndarray | None = None, smoothing: float = 0.0) -> Objective:
    return Objective(labels, LossConfig(label_smoothing=smoothing), weights, CPU)


def loss_of(found: Objective, logits: Tensor, targets: Tensor, weight: Tensor | None = None) -> Tensor:
    weight = torch.ones(len(targets)) if weight is None else weight
    return found.mean(found.sums(logits, targets, weight), found.totals(targets, weight))


def missing(targets: Tensor, seed: int = 0, share: float = 0.4) -> Tensor:
    """The targets of TWO with whole answers to `shape` and to `marks` unknown."""
    gone = torch.rand(len(targets), 2, generator=torch.Generator().manual_seed(seed)) < share
    return torch.where(torch.stack([gone[:, 0], gone[:, 0], gone[:, 1]], 1), NAN, targets)


def two_task_targets(n: int) -> Tensor:
    draw = torch.Generator().manual_seed(n)
    shape = nn.functional.one_hot(torch.arange(n) % 2, 2).float()
    return torch.cat([shape, torch.randint(0, 2, (n, 1), generator=draw).float()], 1)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True], ids=["equal", "weighted"])
def test_any_of_equals_torchs_binary_cross_entropy_over_the_known_answers(smoothing: float, weighted: bool) -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(11, 3), torch.randint(0, 2, (11, 3)).float()
    known = torch.rand(11, 3) < 0.7
    positives = torch.tensor([0.5, 3.0, 8.0]) if weighted else torch.ones(3)
    weights = positives.numpy() if weighted else None
    found = loss_of(objective(CELLS, weights, smoothing), logits, torch.where(known, targets, NAN))
    soft = targets * (1 - smoothing) + smoothing / 2
    each = nn.functional.binary_cross_entropy_with_logits(logits, soft, reduction="none")
    share = torch.where(targets == 1, positives, 1.0)[known]
    torch.testing.assert_close(found, (each[known] * share).sum() / share.sum())


def test_soft_targets_of_one_task_equal_torchs_cross_entropy() -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(9, 4), torch.randn(9, 4).softmax(1)
    found = loss_of(objective(LabelSpace.single("abcd")), logits, targets)
    torch.testing.assert_close(found, nn.functional.cross_entropy(logits, targets))


def test_the_loss_of_several_tasks_is_the_sum_of_their_means_over_what_is_known() -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(12, 3), missing(two_task_targets(12))
    shape, dot = ~targets[:, 0].isnan(), ~targets[:, 2].isnan()
    assert 0 < shape.sum() < 12
    assert shape.sum() != dot.sum()
    expected = nn.functional.cross_entropy(logits[shape, :2], targets[shape, :2])
    expected = expected + nn.functional.binary_cross_entropy_with_logits(logits[dot, 2], targets[dot, 2])
    torch.testing.assert_close(loss_of(objective(TWO), logits, targets), expected)


@pytest.mark.parametrize("labels", [TWO, CELLS], ids=["two tasks", "several classes"])
def test_what_is_unknown_or_padding_has_a_gradient_of_exactly_zero(labels: LabelSpace) -> None:
    torch.manual_seed(0)
    logits = torch.randn(8, 3, requires_grad=True)
    targets = two_task_targets(8)
    targets[1], targets[2, :2], targets[5, 2] = NAN, NAN, NAN
    weight = torch.ones(8)
    weight[7], targets[7, 2] = 0, NAN  # padding repeats a row of which something is unknown
    found = loss_of(objective(labels, smoothing=0.1), logits, targets, weight)
    found.backward()
    assert torch.isfinite(found)
    gone = targets.isnan() | (weight == 0)[:, None]
    assert logits.grad is not None
    assert (logits.grad[gone] == 0).all()
    assert (logits.grad[~gone] != 0).all()


@pytest.mark.parametrize("value", [6e4, -6e4])
def test_large_logits_of_half_precision_give_a_finite_loss(value: float) -> None:
    logits = torch.full((4, 3), value, dtype=torch.float16, requires_grad=True)
    for labels in (TWO, CELLS):
        found = loss_of(objective(labels), logits, two_task_targets(4))
        assert found.dtype == torch.float32
        assert torch.isfinite(found)


class TestClassWeights:
    """Of positives against negatives for `any_of`, mean 1 over the images for `one_of`."""

    counts, known = np.array([90, 30, 20]), np.array([120, 120, 100])

    def weights(self, asked: Any, labels: LabelSpace = TWO) -> np.ndarray:
        found = class_weights(LossConfig(class_weights=asked), labels, self.counts, self.known)
        assert found is not None
        return found

    def test_auto_is_negatives_per_positive(self) -> None:
        np.testing.assert_allclose(self.weights("auto", CELLS), [30 / 90, 90 / 30, 80 / 20], rtol=1e-6)
        np.testing.assert_allclose(self.weights("auto"), [120 / 180, 120 / 60, 80 / 20], rtol=1e-6)

    def test_effective_follows_the_formula(self) -> None:
        positives, negatives = 1 - 0.999**self.counts, 1 - 0.999 ** (self.known - self.counts)
        np.testing.assert_allclose(self.weights("effective", CELLS), negatives / positives, rtol=1e-6)

    @pytest.mark.parametrize("asked", [(1, 1, 5), {"marks: dot": 5}, {"dot": 5}, "dot=5"])
    def test_numbers_may_be_listed_or_named_with_or_without_the_task(self, asked: Any) -> None:
        np.testing.assert_allclose(self.weights(asked), [1, 1, 5])

    def test_a_class_that_nobody_has_or_that_all_have_keeps_a_finite_weight(self) -> None:
        found = class_weights(LossConfig(class_weights="auto"), CELLS, np.array([0, 5, 10]), np.full(3, 10))
        np.testing.assert_allclose(found, [10, 1, 0.1])

    @pytest.mark.parametrize("asked", ["auto", "effective"])
    def test_a_task_without_a_training_answer_keeps_finite_weights(self, asked: str) -> None:
        found = class_weights(LossConfig(class_weights=asked), TWO, np.array([0, 0, 5]), np.array([0, 0, 10]))
        assert found is not None and np.isfinite(found).all()

    def test_a_name_of_two_tasks_is_refused_with_both(self) -> None:
        twice = LabelSpace((Task("top", ("ok", "bad")), Task("side", ("ok",), "any_of")))
        with pytest.raises(ConfigError, match="top: ok, side: ok") as refused:
            self.weights({"ok": 2}, twice)
        assert refused.value.try_ == "--class-weights 'top: ok=2'"


def batch_of(n: int) -> Batch:
    """Two tasks, two fifths of the answers missing, padding at the end that repeats such a row."""
    pixels = torch.randint(0, 256, (n, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))
    targets, weight = missing(two_task_targets(n)), torch.ones(n)
    weight[-2:], targets[-2:] = 0, targets[:1]
    return Batch(pixels, targets, weight, torch.arange(n))


class Plain(nn.Module):
    """A network without batch norm: each image by itself."""

    aux_weights: tuple[float, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))

    def forward(self, pixels: Tensor) -> Any:
        return self.layers(pixels.permute(0, 3, 1, 2).float() / 255)


class WithAux(Plain):
    """The same with an auxiliary output."""

    aux_weights = (0.3,)

    def __init__(self) -> None:
        super().__init__()
        self.aux = nn.Linear(3, 3)

    def forward(self, pixels: Tensor) -> Any:
        logits = super().forward(pixels)
        return logits, self.aux(logits)


@pytest.mark.parametrize("network", [Plain, WithAux])
def test_gradients_of_several_tasks_do_not_depend_on_the_micro_batch(
    network: type[Plain], make_fit: Callable[..., Any]
) -> None:
    step, batch = make_fit().step, batch_of(13)
    step.objective = objective(TWO, np.array([0.5, 2, 4], np.float32), 0.1)
    step.loss_sum, step._shape = torch.zeros(2), (2,)
    totals = step.objective.totals(batch.targets, batch.weight)
    found = []
    for micro in (13, 1, 3):
        step.model = step.forward = model = network()
        step.micro_batch, step.images_needed = micro, 1
        sums = step.gradients(batch, totals)
        found.append((torch.cat([p.grad.flatten() for p in model.parameters()]), sums))
    model, good = network(), batch.weight > 0
    outputs = model(batch.pixels[good])
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    whole = [loss_of(step.objective, logits, batch.targets[good]) for logits in outputs]
    sum(share * loss for share, loss in zip((1, 0.3), whole, strict=False)).backward()  # type: ignore[union-attr]
    found.append((torch.cat([p.grad.flatten() for p in model.parameters()]), found[0][1]))  # type: ignore[union-attr]
    for gradient, sums in found[1:]:
        torch.testing.assert_close(gradient, found[0][0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(sums, found[0][1], rtol=1e-5, atol=1e-6)


def test_a_task_without_an_answer_is_left_out_and_a_batch_without_any_is_passed_over(make_fit: Callable[..., Any]) -> None:
    step, batch = make_fit().step, batch_of(6)
    step.objective = objective(TWO)
    step.loss_sum, step.loss_weight, step._shape = torch.zeros(2), torch.zeros(2, dtype=torch.float64), (2,)
    batch.targets[:, :2] = NAN
    batch.targets[:2, 2] = 1
    step.take(batch, 0)
    assert step.loss_weight[0] == 0
    assert step.loss_weight[1] > 0
    assert step.loss == pytest.approx(float(step.loss_sum[1] / step.loss_weight[1]))  # not the mean with a task that was never asked
    assert step.is_finite()
    before = [p.detach().clone() for p in step.model.parameters()]
    batch.targets[:] = NAN
    step.take(batch, 1)
    assert all(torch.equal(a, b) for a, b in zip(before, step.model.parameters(), strict=True))
