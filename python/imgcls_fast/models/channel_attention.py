"""Attention modules with one gate per channel. See `attention`."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention_parts import LEAST_GROUP, demand_positive, gated, hidden_units, wide_dtype


class SE(nn.Module):
    """Squeeze-and-excitation: ``x * sigmoid(W2 relu(W1 mean(x)))``, without biases.

    Source: Hu, Shen, Sun, "Squeeze-and-Excitation Networks", CVPR 2018, eq. 2 to 4.

    Args:
        channels: C.
        reduction: r, hidden units are C / r.
    """

    def __init__(self, channels: int, *, reduction: int = 16) -> None:
        super().__init__()
        hidden = hidden_units(channels, reduction)
        self.squeeze = nn.Linear(channels, hidden, bias=False)
        self.excite = nn.Linear(hidden, channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return gated(x, torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3)))))))


class SRM(nn.Module):
    """Style recalibration: ``x * sigmoid(norm(w . [mean(x), std(x)]))``, two weights and a batch norm per channel.

    Source: Lee, Kim, Nam, "SRM: A Style-based Recalibration Module for Convolutional Neural Networks", ICCV 2019,
    sections 3.1 and 3.2.

    Args:
        channels: C.
        eps: added to the variance before its root.
    """

    def __init__(self, channels: int, *, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(channels, 2))
        self.norm = nn.BatchNorm1d(channels)
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))  # as a linear layer with two inputs

    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(x, (2, 3), correction=0)
        style = torch.stack((mean, (variance + self.eps).sqrt()), 2)  # (N, C, 2)
        return gated(x, torch.sigmoid(self.norm((style * self.weight).sum(2))))


class SK(nn.Module):
    """Selective kernel: branches with larger and larger kernels, mixed channel by channel.

    Branch i is a grouped 3x3 convolution with dilation i, a batch norm and a ReLU (the second is the paper's 5x5).
    Their sum, averaged over positions, decides through d = max(C / r, L) units a softmax over the branches of each
    channel.

    Source: Li, Wang, Hu, Yang, "Selective Kernel Networks", CVPR 2019, eq. 1 to 6.

    Args:
        channels: C.
        branches: M.
        reduction: r.
        least: L, the least d.
        groups: G of the convolutions; the greatest common divisor with C is taken.
    """

    def __init__(
        self, channels: int, *, branches: int = 2, reduction: int = 16, least: int = 32, groups: int = 32
    ) -> None:
        super().__init__()
        demand_positive(branches=branches, groups=groups)
        hidden = hidden_units(channels, reduction, least)
        self.branches = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(channels, channels, 3, padding=i, dilation=i, groups=math.gcd(channels, groups), bias=False),
                nn.BatchNorm2d(channels),
                nn.ReLU(),
            )
            for i in range(1, branches + 1)
        )
        self.fuse = nn.Sequential(nn.Linear(channels, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU())
        self.select = nn.Linear(hidden, branches * channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        maps = [branch(x) for branch in self.branches]
        pooled = sum(maps[1:], maps[0]).mean((2, 3))
        shares = self.select(self.fuse(pooled)).unflatten(1, (len(maps), -1)).softmax(1)  # (N, M, C)
        weighed = [gated(one, shares[:, index]) for index, one in enumerate(maps)]
        return sum(weighed[1:], weighed[0]).to(x.dtype)


class LCT(nn.Module):
    """Linear context transform: ``x * sigmoid(w * group_norm(mean(x)) + b)``.

    w starts at 1 and b at 0, as in any group norm: with w = 0 all channels would begin with one factor, which a norm
    behind the place takes out again.

    Source: Ruan, Wen, Zheng, Zheng, "Linear Context Transform Block", AAAI 2020.

    Args:
        channels: C.
        groups: number of groups of channels that are normalised together; fewer where they do not divide C into groups of
            four or more (the least that the paper's ResNet-50 has), because a group of one carries nothing.
        eps: added to the variance.
    """

    def __init__(self, channels: int, *, groups: int = 64, eps: float = 1e-5) -> None:
        super().__init__()
        demand_positive(groups=groups)
        fitting = math.gcd(channels, min(groups, max(channels // LEAST_GROUP, 1)))
        self.norm = nn.GroupNorm(fitting, channels, eps)

    def forward(self, x: Tensor) -> Tensor:
        return gated(x, torch.sigmoid(self.norm(x.mean((2, 3)))))


class GCT(nn.Module):
    """Gated channel transformation: ``x * (1 + tanh(gamma * s' + beta))``.

    ``s = alpha * sqrt(sum(x^2) + eps)`` per channel, and ``s' = sqrt(C) s / sqrt(sum(s^2) + eps)``.

    Source: Yang, Zhu, Wu, Yang, "Gated Channel Transformation for Visual Recognition", CVPR 2020, section 3.

    Args:
        channels: C.
        eps: as above.
        gamma_init: the paper starts at 0, where the module is the identity and alpha has no gradient.
    """

    def __init__(self, channels: int, *, eps: float = 1e-5, gamma_init: float = 0.1) -> None:
        super().__init__()
        self.eps = eps
        self.alpha = nn.Parameter(torch.ones(channels))
        self.gamma = nn.Parameter(torch.full((channels,), float(gamma_init)))
        self.beta = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        norms = torch.linalg.vector_norm(x, dim=(2, 3), dtype=wide_dtype(x))
        s = self.alpha * (norms.square() + self.eps).sqrt()
        s = s * math.sqrt(s.shape[1]) / (s.square().sum(1, keepdim=True) + self.eps).sqrt()
        return gated(x, 1 + torch.tanh(self.gamma * s + self.beta))


class ECA(nn.Module):
    """Efficient channel attention: ``x * sigmoid(conv_k(mean(x)))``, a convolution over neighbouring channels.

    Its width is k = |log2(C) / gamma + b / gamma|, rounded to the nearest odd number, upwards between two.

    Source: Wang et al., "ECA-Net: Efficient Channel Attention for Deep Convolutional Neural Networks", CVPR 2020,
    section 3.2 and eq. 12.

    Args:
        channels: C.
        gamma: as above.
        b: as above.
    """

    def __init__(self, channels: int, *, gamma: float = 2.0, b: float = 1.0) -> None:
        super().__init__()
        if gamma <= 0:
            raise ValueError(f"gamma must be above 0, got {gamma}")
        width = 2 * math.floor(abs((math.log2(channels) + b) / gamma) / 2) + 1
        self.conv = nn.Conv1d(1, 1, width, padding=width // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return gated(x, torch.sigmoid(self.conv(x.mean((2, 3)).unsqueeze(1)).squeeze(1)))
