"""The temperature of few rows: worth having on rows that nobody has seen.

Scores are calibrated by construction: logits are normal with deviation `sharp`, the truth is drawn from their softmax.
Overconfident ones are the same logits times `factor`. Losses are expected ones over 4,000 unseen rows, relative to T = 1.
The figures of many draws stand in docs/evaluation.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
from scipy.special import log_softmax

from imgcls_fast.evaluation.calibration import TEMPERATURES, fit_temperature
from imgcls_fast.evaluation.metrics import judge

GRID = np.geomspace(*TEMPERATURES, 160)


@dataclass(frozen=True)
class World:
    """Scores whose best temperature is `factor`."""

    classes: int
    sharp: float
    factor: float = 1.0

    def rows(self, n: int, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(n, K) logits as the model gives them, (n, K) true probabilities, (n,) classes."""
        honest = draw.normal(0, self.sharp, (n, self.classes))
        chance = np.exp(log_softmax(honest, 1))
        truth = (chance.cumsum(1) < draw.random((n, 1))).sum(1).clip(0, self.classes - 1)
        return honest * self.factor, chance, truth

    def loss(self, draw: np.random.Generator) -> Callable[[float], float]:
        """Expected log-loss on unseen rows, as a function of T."""
        logits, chance, _ = self.rows(4000, draw)
        found = [float(-(chance * log_softmax(logits / t, 1)).sum(1).mean()) for t in GRID]
        return lambda t: float(np.interp(np.log(t), np.log(GRID), found))

    def fitted(self, n: int, draws: int, draw: np.random.Generator, fit: Callable[..., float]) -> list[float]:
        """The temperature of each of some validation sets of n rows."""
        out = []
        for _ in range(draws):
            logits, _, truth = self.rows(n, draw)
            out.append(fit(logits, truth))
        return out


def cost_and_best(world: World, n: int, draws: int, fit: Callable[..., float] = fit_temperature) -> tuple[float, float]:
    """(mean loss above T = 1, the lowest that any T has above T = 1)."""
    draw = np.random.default_rng([world.classes, int(10 * world.sharp), int(10 * world.factor), n])
    loss = world.loss(draw)
    mean = float(np.mean([loss(t) for t in world.fitted(n, draws, draw, fit)]))
    return mean - loss(1.0), loss(world.factor) - loss(1.0)


FEW = [World(2, 5), World(5, 20), World(10, 2)]  # 0.92, 0.96 and 0.53 of the answers are right
MORE = [World(2, 1.5), World(5, 8), World(10, 5), World(100, 3), World(100, 8)]


@pytest.mark.parametrize("n", [10, 40, 100])
@pytest.mark.parametrize("world", FEW, ids=str)
def test_calibrated_scores_stay_calibrated_whatever_the_rows_happen_to_be(world: World, n: int) -> None:
    above, _ = cost_and_best(world, n, 60)
    assert above <= 0.005


@pytest.mark.parametrize("factor", [2.0, 3.0])
@pytest.mark.parametrize("world", [World(2, 1.5), World(10, 5)], ids=str)
def test_a_hundred_rows_mend_most_of_an_overconfidence(world: World, factor: float) -> None:
    above, best = cost_and_best(World(world.classes, world.sharp, factor), 100, 60)
    assert above <= 0.8 * best < 0


@pytest.mark.slow
@pytest.mark.parametrize("n", [10, 20, 40, 100, 300, 1000])
@pytest.mark.parametrize("world", [*FEW, *MORE], ids=str)
def test_calibrated_scores_stay_calibrated_everywhere(world: World, n: int) -> None:
    above, _ = cost_and_best(world, n, 400 if n <= 100 else 60)
    assert above <= 0.005


@pytest.mark.slow
@pytest.mark.parametrize("factor", [2.0, 3.0])
@pytest.mark.parametrize(
    "world", [World(2, 1.5), World(4, 3), World(5, 8), World(10, 2), World(10, 12), World(100, 3)], ids=str
)
def test_a_hundred_rows_mend_most_of_an_overconfidence_everywhere(world: World, factor: float) -> None:
    above, best = cost_and_best(World(world.classes, world.sharp, factor), 100, 200)
    assert above <= 0.8 * best < 0


@pytest.mark.parametrize(("margin", "least"), [(2, 0.75), (3, 0.85), (4, 1), (6, 1)])
def test_twelve_rows_that_are_all_right_cannot_tell_much(margin: float, least: float) -> None:
    """Mean confidence 0.65, 0.83, 0.92 and 0.99; the likelihood alone gives 0.05 each time."""
    draw = np.random.default_rng(0)
    logits, truth = draw.normal(0, 0.6, (12, 4)), draw.integers(0, 4, 12)
    logits[np.arange(12), truth] += margin
    assert (logits.argmax(1) == truth).all()
    assert least <= fit_temperature(logits, truth) <= 1


def test_one_row_or_scores_without_spread_leave_the_temperature_alone() -> None:
    assert fit_temperature(np.array([[3.0, 0.0]]), np.array([0])) == 1.0
    assert fit_temperature(np.zeros((500, 3)), np.arange(500) % 3) == 1.0


def test_the_fitted_loss_is_never_above_that_of_one_on_the_same_rows(predictions_of) -> None:
    draw = np.random.default_rng(1)
    for _ in range(20):
        logits, _, truth = World(4, 3, float(draw.choice([0.5, 1, 2]))).rows(60, draw)
        found = fit_temperature(logits, truth)
        losses = [
            judge(predictions_of(np.exp(log_softmax(logits / t, 1)).astype(np.float32), truth), bootstrap=0).log_loss
            for t in (found, 1.0)
        ]
        assert losses[0] <= losses[1] + 1e-6
