"""Optimizers, groups of parameters, averaged weights. `core.choices.OPTIMIZERS` names the optimizers."""

from __future__ import annotations

import copy
import re
from collections.abc import Collection
from fnmatch import fnmatchcase
from pkgutil import resolve_name
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from ..core.choices import OPTIMIZERS
from ..core.config import OptimConfig
from .schedule import number

# tables that shift attention or mark a place or a kind of token: what torchvision's and timm's families call them
_TABLES = re.compile(
    r"(pos_embed|position_embed|relative_position|rel_pos|bias_table|attention_bias|_token|cls_token|class_token)"
)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split trainable parameters in two groups: matrices and filters decay, what only scales, shifts or marks does not.

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
    """Return whether the library lists it, perhaps by a pattern; Swin V2's authors exempt what computes its bias table, too."""
    return "cpb_mlp" in name or any(fnmatchcase(name, pattern) for pattern in listed)


def build_optimizer(model: nn.Module, config: OptimConfig, device: torch.device) -> torch.optim.Optimizer:
    """Build the optimizer of a resolved configuration.

    Fused where it can be: a third of the time on a CPU, and no host sync for a scaler on a GPU.
    """
    chosen = OPTIMIZERS[config.opt]
    settings = {
        "momentum": config.momentum,
        "nesterov": config.momentum > 0,
        "fused": device.type in ("cpu", "cuda"),
    }
    groups = parameter_groups(model, number(config.weight_decay))
    made: torch.optim.Optimizer = resolve_name(chosen.make)(
        groups, lr=number(config.lr), **{name: settings[name] for name in chosen.takes}
    )
    return made


class Averaged:
    """Exponential moving average of weights and batch statistics (integer buffers are copied), updated once per optimizer step.

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
