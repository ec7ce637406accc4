"""What the attention modules share: checks of their arguments, widths, gates."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from ..ops.library import autocast_dtype

# Hidden layers are never thinner. Behind positive maps a ReLU unit is dead for all images in half of the draws,
# so that with 64 / 16 = 4 units one gate in 16 could never learn. Coordinate attention has the same least width.
LEAST_HIDDEN = 8

# A group norm over one number gives nothing; the papers' own networks have no fewer than 256 channels / 64.
LEAST_GROUP = 4


def demand_positive(**sizes: int) -> None:
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def demand_odd(kernel_size: int) -> None:
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd, so that the map keeps its size, got {kernel_size}")


def hidden_units(channels: int, reduction: int, least: int = LEAST_HIDDEN) -> int:
    demand_positive(reduction=reduction, least=least)
    return max(channels // reduction, least)


def gated(x: Tensor, gate: Tensor) -> Tensor:
    """`x` (N, C, H, W) times a factor per channel (N, C) or any that broadcasts, in the dtype of `x`."""
    return x * (gate[:, :, None, None] if gate.dim() == 2 else gate).to(x.dtype)


def wide_dtype(x: Tensor) -> torch.dtype:
    """The dtype for sums over a map of squares and products, which overflow float16: at least float32."""
    return torch.promote_types(x.dtype, torch.float32)


def tokens(maps: Tensor) -> Tensor:
    """(N, C, H, W) to (N, 1, H * W, C): positions as a sequence, one head."""
    return maps.flatten(2).transpose(1, 2).unsqueeze(1)


def float32_products(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Inside, autocast does not lower the precision of matrix products."""
    return contextlib.nullcontext() if autocast_dtype(x) is None else torch.autocast(x.device.type, enabled=False)
