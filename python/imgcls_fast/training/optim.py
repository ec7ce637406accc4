"""How it is minimised: optimizers, learning-rate schedules, averaged weights."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Collection
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from ..core.config import OptimConfig

# tables that shift attention or mark a place or a kind of token: what torchvision's and timm's families call them
_TABLES = re.compile(
    r"(pos_embed|position_embed|relative_position|rel_pos|bias_table|attention_bias|_token|cls_token|class_token)"
)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: matrices and filters decay, what only scales, shifts or marks does not.

    Exempt are biases and norms (rank < 2), layer scales, logit scales and temperatures (one number per channel or head),
    embeddings of positions, tokens, tables of biases, and what the library names in `no_weight_decay()`.

    Source: timm's `param_groups_weight_decay`; for torchvision's families the same kinds by name.
    """
    decay: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    listed: Collection[str] = getattr(getattr(model, "backbone", model), "no_weight_decay", set)()
    modules = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            owner, _, own_name = name.rpartition(".")
            exempt = _exempt(modules[owner], own_name, parameter) or _named(name.removeprefix("backbone."), listed)
            (plain if exempt else decay).append(parameter)
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _exempt(owner: nn.Module, name: str, parameter: nn.Parameter) -> bool:
    if parameter.ndim < 2 or name == "bias":
        return True
    if name == "weight" and isinstance(owner, nn.Linear | _ConvNd):  # a single output has a row, not a scale
        return False
    return parameter.numel() == max(parameter.shape) or _TABLES.search(name) is not None


def _named(name: str, listed: Collection[str]) -> bool:
    """In the library's list, which may hold patterns; Swin V2's authors exempt what computes its bias table, too."""
    return "cpb_mlp" in name or any(fnmatchcase(name, pattern) for pattern in listed)


def _sgd(groups: list[dict[str, Any]], config: OptimConfig, fused: bool) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        groups, lr=_number(config.lr), momentum=config.momentum, nesterov=config.momentum > 0, fused=fused
    )


def _adamw(groups: list[dict[str, Any]], config: OptimConfig, fused: bool) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=_number(config.lr), fused=fused)


OPTIMIZERS: dict[str, Callable[[list[dict[str, Any]], OptimConfig, bool], torch.optim.Optimizer]] = {
    "sgd": _sgd,
    "adamw": _adamw,
}


def build_optimizer(model: nn.Module, config: OptimConfig, device: torch.device) -> torch.optim.Optimizer:
    """The optimizer of a resolved configuration, fused: a third of the time on a CPU, no host sync for a scaler on a GPU."""
    groups = parameter_groups(model, _number(config.weight_decay))
    return OPTIMIZERS[config.opt](groups, config, device.type in ("cpu", "cuda"))


class Schedule:
    """The learning rate as a function of the optimizer step: a rise over the warm-up, then the schedule's own fall.

    Every schedule but plateau is a pure function, so a resumed run needs no state; plateau keeps `factor`, `best` and
    `wait`, which go into the checkpoint. The rise is linear from lr / steps of warm-up, except for one-cycle, whose
    rise is the first part of the cycle (Smith and Topin, "Super-convergence", 2017): a half cosine from lr / 25.

    Args:
        config: resolved (no "auto").
        steps_per_epoch: optimizer steps.
        epochs: length of the run.
    """

    def __init__(self, config: OptimConfig, steps_per_epoch: int, epochs: int) -> None:
        self.config, self.steps_per_epoch = config, steps_per_epoch
        self.total = steps_per_epoch * epochs
        self.warmup = round(_number(config.warmup) * steps_per_epoch)
        self.state: dict[str, Any] = {"factor": 1.0, "best": None, "wait": 0}

    def lr(self, step: int) -> float:
        """Learning rate of optimizer step `step` (from 0)."""
        peak, floor = _number(self.config.lr), self.config.min_lr
        if step < self.warmup:
            if self.config.sched != "onecycle":
                return peak * (step + 1) / self.warmup
            return peak * max(floor, 0.04 + 0.96 * 0.5 * (1 - math.cos(math.pi * step / self.warmup)))
        done = (step - self.warmup) / max(1, self.total - self.warmup)
        shape = _SHAPES[self.config.sched](self, done, step)
        return peak * max(floor, shape)

    def momentum(self, step: int) -> float | None:
        """One-cycle also cycles momentum 0.95 -> 0.85 -> 0.95 (Smith and Topin, 2017); others leave it alone."""
        if self.config.sched != "onecycle":
            return None
        rise = self.warmup
        down = step / rise if step < rise else 1 - (step - rise) / max(1, self.total - rise)
        return 0.95 - 0.1 * min(1.0, max(0.0, down))

    def after_epoch(self, value: float) -> None:
        """Tell plateau the monitored value of an epoch (higher is better)."""
        if self.config.sched != "plateau":
            return
        state = self.state
        if state["best"] is None or value > state["best"]:
            state["best"], state["wait"] = value, 0
            return
        state["wait"] += 1
        if state["wait"] > self.config.plateau_patience:
            state["factor"], state["wait"] = state["factor"] * self.config.gamma, 0


def _cosine(schedule: Schedule, done: float, step: int) -> float:
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def _onecycle(schedule: Schedule, done: float, step: int) -> float:
    return 1e-4 + (1 - 1e-4) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))  # down to lr / 1e4


def _step(schedule: Schedule, done: float, step: int) -> float:
    return schedule.config.gamma ** (step // (schedule.steps_per_epoch * schedule.config.step_epochs))


_SHAPES: dict[str, Callable[[Schedule, float, int], float]] = {
    "cosine": _cosine,
    "onecycle": _onecycle,
    "step": _step,
    "plateau": lambda schedule, done, step: float(schedule.state["factor"]),
    "none": lambda schedule, done, step: 1.0,
}


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


class Averaged:
    """Exponential moving average of weights and batch statistics (integer buffers are copied), updated once an optimizer step.

    The decay rises as (1 + t) / (10 + t) at first, so that early weights are forgotten (as in TensorFlow's
    ExponentialMovingAverage). `model` is a twin of the trained one that holds the averaged weights.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.model.eval()
        mine, theirs = self.model.state_dict(), model.state_dict()
        floating = [name for name, value in theirs.items() if value.is_floating_point()]
        self._pairs = [mine[name] for name in floating], [theirs[name].detach() for name in floating]
        self._copied = [(mine[name], theirs[name]) for name in theirs if name not in set(floating)]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the trained weights after optimizer step `step` (from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(*self._pairs, 1 - decay)
        for mine, theirs in self._copied:
            mine.copy_(theirs)


def _number(value: Any) -> float:
    """A resolved setting as a number; "auto" here would be a programmer's mistake."""
    assert not isinstance(value, str), "resolve the plan before training"
    return float(value)
