"""Learning-rate schedules: their shapes, and the rate of every optimizer step. `core.choices.SCHEDULES` names them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

from ..core.choices import SCHEDULES
from ..core.config import OptimConfig

if TYPE_CHECKING:
    import torch


class Schedule:
    """The learning rate as a function of the optimizer step: a rise over the warm-up, then the schedule's own fall.

    Every schedule but plateau is a pure function, so a resumed run needs no state; plateau keeps `factor`, `best` and
    `wait`, which go into the checkpoint.

    Args:
        config: resolved (no "auto").
        steps_per_epoch: optimizer steps.
        epochs: length of the run.
    """

    def __init__(self, config: OptimConfig, steps_per_epoch: int, epochs: int) -> None:
        self.config, self.steps_per_epoch = config, steps_per_epoch
        self.total = steps_per_epoch * epochs
        self.warmup = round(number(config.warmup) * steps_per_epoch)
        self.shape: Shape = resolve_name(SCHEDULES[config.sched])
        self.state: dict[str, Any] = {"factor": 1.0, "best": None, "wait": 0}

    def lr(self, step: int) -> float:
        """Return the learning rate of optimizer step `step` (from 0)."""
        peak = number(self.config.lr)
        if step < self.warmup:
            return self.shape.rise(self, peak, step)
        done = (step - self.warmup) / max(1, self.total - self.warmup)
        return peak * max(self.config.min_lr, self.shape.fall(self, done, step))

    def momentum(self, step: int) -> float | None:
        """Return the momentum of a schedule that cycles it, 0.95 -> 0.85 -> 0.95 (Smith and Topin, 2017), else None."""
        if not self.shape.cycles_momentum:
            return None
        rise = self.warmup
        down = step / rise if step < rise else 1 - (step - rise) / max(1, self.total - rise)
        return 0.95 - 0.1 * min(1.0, max(0.0, down))

    def after_epoch(self, value: float) -> None:
        """Take the monitored value of an epoch (higher is better); only a schedule that watches it is changed."""
        if not self.shape.watches or math.isnan(value):
            return
        state = self.state
        if state["best"] is None or value > state["best"]:
            state["best"], state["wait"] = value, 0
            return
        state["wait"] += 1
        if state["wait"] > self.config.plateau_patience:
            state["factor"], state["wait"] = state["factor"] * self.config.gamma, 0


def _linear(schedule: Schedule, peak: float, step: int) -> float:
    return peak * (step + 1) / schedule.warmup


def _half_cosine(schedule: Schedule, peak: float, step: int) -> float:
    share = 0.04 + 0.96 * 0.5 * (1 - math.cos(math.pi * step / schedule.warmup))  # from lr / 25
    return peak * max(schedule.config.min_lr, share)


def _cosine(schedule: Schedule, done: float, step: int) -> float:
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def _onecycle(schedule: Schedule, done: float, step: int) -> float:
    return 1e-4 + (1 - 1e-4) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))  # down to lr / 1e4


def _step(schedule: Schedule, done: float, step: int) -> float:
    return schedule.config.gamma ** (step // (schedule.steps_per_epoch * schedule.config.step_epochs))


@dataclass(frozen=True)
class Shape:
    """One schedule: how the rate rises and falls, and what else it moves.

    Args:
        fall: (schedule, share of the way after the warm-up, step) -> fraction of the peak.
        rise: (schedule, peak, step of the warm-up) -> rate.
        cycles_momentum: whether momentum mirrors the rate.
        watches: whether the monitored value of each epoch lowers `state["factor"]`.
    """

    fall: Callable[[Schedule, float, int], float]
    rise: Callable[[Schedule, float, int], float] = _linear
    cycles_momentum: bool = False
    watches: bool = False


COSINE = Shape(_cosine)
ONECYCLE = Shape(_onecycle, _half_cosine, cycles_momentum=True)  # the rise is the first part of the cycle (as above)
STEP = Shape(_step)
PLATEAU = Shape(lambda schedule, done, step: float(schedule.state["factor"]), watches=True)
NONE = Shape(lambda schedule, done, step: 1.0)


def set_rates(optimizer: torch.optim.Optimizer, schedule: Schedule, step: int) -> float:
    """Write the rates of `step` into the optimizer; returns the learning rate."""
    lr, momentum = schedule.lr(step), schedule.momentum(step)
    for group in optimizer.param_groups:
        group["lr"] = lr
        if momentum is not None and group.get("momentum"):  # SGD without momentum stays without
            group["momentum"] = momentum
        elif momentum is not None and "betas" in group:
            group["betas"] = (momentum, group["betas"][1])
    return lr


def number(value: Any) -> float:
    """Return a resolved setting as a number; "auto" here would be a programmer's mistake."""
    assert not isinstance(value, str), "resolve the plan before training"
    return float(value)
