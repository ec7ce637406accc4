"""Attention modules that look at positions: a gate per position, or a mixture of positions. See `attention`."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.errors import ConfigError
from ..ops.cbam import cbam, cbam_refusal
from .attention_parts import demand_odd, demand_positive, float32_products, gated, hidden_units, tokens, wide_dtype


class CBAM(nn.Module):
    """Convolutional block attention: a gate per channel, then one per position; `ops.cbam` has the formula.

    The norm is that of the authors' code; the paper writes none. The maxima share their gradient among equal positions.

    Source: Woo, Park, Lee, Kweon, "CBAM: Convolutional Block Attention Module", ECCV 2018, eq. 1 to 3.

    Args:
        channels: C.
        reduction: r; `w1` is (R, C) and `w2` (C, R) with R = C / r.
        kernel_size: side of the one convolution over the two pooled maps.
    """

    def __init__(self, channels: int, *, reduction: int = 16, kernel_size: int = 7) -> None:
        super().__init__()
        demand_odd(kernel_size)
        hidden = hidden_units(channels, reduction)
        self.w1 = nn.Parameter(torch.empty(hidden, channels))
        self.w2 = nn.Parameter(torch.empty(channels, hidden))
        self.conv = nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2, bias=False)
        self.norm = nn.BatchNorm2d(1)
        self.kernels = "proven"  # or on, or off; set by `kernels.use_kernels`
        for weight in (self.w1, self.w2):
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))  # as nn.Linear draws it

    def forward(self, x: Tensor) -> Tensor:
        form = torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
        kernel = {"proven": None if form == torch.channels_last else False, "on": True, "off": False}[self.kernels]
        if kernel and (why := cbam_refusal(x, self.conv.weight, self.norm)):
            raise ConfigError("C004", f"no kernel for this CBAM: {why}", try_="--kernels auto")
        out = cbam(x, self.w1, self.w2, self.conv.weight, self.norm, kernel=kernel)
        return out.contiguous(memory_format=form)


class BAM(nn.Module):
    """Bottleneck attention: ``x + x * sigmoid(channel(x) + spatial(x))``, both halves ending in a batch norm.

    A ReLU follows each hidden layer, as in the authors' code; the paper's equations write none.

    Source: Park, Woo, Lee, Kweon, "BAM: Bottleneck Attention Module", BMVC 2018, eq. 1 to 4.

    Args:
        channels: C.
        reduction: r; the hidden layers of both halves have C / r units.
        dilation: d; both 3x3 convolutions of the spatial half have it.
    """

    def __init__(self, channels: int, *, reduction: int = 16, dilation: int = 4) -> None:
        super().__init__()
        demand_positive(dilation=dilation)
        hidden = hidden_units(channels, reduction)
        self.channel = nn.Sequential(
            nn.Linear(channels, hidden),
            nn.ReLU(),
            nn.Linear(hidden, channels, bias=False),
            nn.BatchNorm1d(channels),
        )
        self.spatial = nn.Sequential(
            nn.Conv2d(channels, hidden, 1),
            nn.ReLU(),
            nn.Conv2d(hidden, hidden, 3, padding=dilation, dilation=dilation),
            nn.ReLU(),
            nn.Conv2d(hidden, hidden, 3, padding=dilation, dilation=dilation),
            nn.ReLU(),
            nn.Conv2d(hidden, 1, 1, bias=False),
            nn.BatchNorm2d(1),
        )

    def forward(self, x: Tensor) -> Tensor:
        logits = self.channel(x.mean((2, 3)))[:, :, None, None] + self.spatial(x)
        return x + gated(x, torch.sigmoid(logits))


class DoubleAttention(nn.Module):
    """A2: gather n descriptors of the whole map, hand each position its mixture of them, add: ``x + W (A B^T) V``.

    A are m = n = C / r features, B is a softmax over positions and V one over the descriptors. The softmaxes are of
    given maps, not of products, so that the cost is linear in positions and no attention kernel applies.

    Source: Chen et al., "A^2-Nets: Double Attention Networks", NeurIPS 2018, sections 3.1 to 3.3.

    Args:
        channels: C.
        reduction: r.
    """

    def __init__(self, channels: int, *, reduction: int = 4) -> None:
        super().__init__()
        inner = hidden_units(channels, reduction)
        self.features = nn.Conv2d(channels, inner, 1, bias=False)
        self.gather = nn.Conv2d(channels, inner, 1, bias=False)
        self.distribute = nn.Conv2d(channels, inner, 1, bias=False)
        self.expand = nn.Conv2d(inner, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        features = self.features(x).flatten(2)  # (N, m, H * W)
        gathering = self.gather(x).flatten(2).softmax(2).to(x.dtype)
        distribution = self.distribute(x).flatten(2).softmax(1).to(x.dtype)
        descriptors = features @ gathering.transpose(1, 2)  # (N, m, n)
        return x + self.expand((descriptors @ distribution).unflatten(2, x.shape[2:])).to(x.dtype)


class GC(nn.Module):
    """Global context: ``x + W2 relu(LN(W1 sum_j softmax_j(k . x_j) x_j))``.

    Source: Cao, Xu, Lin, Wei, Hu, "GCNet: Non-local Networks Meet Squeeze-Excitation Networks and Beyond",
    ICCV Workshops 2019, eq. 5.

    Args:
        channels: C.
        reduction: r, hidden units are C / r.
    """

    def __init__(self, channels: int, *, reduction: int = 16) -> None:
        super().__init__()
        hidden = hidden_units(channels, reduction)
        self.key = nn.Conv2d(channels, 1, 1, bias=False)
        self.transform = nn.Sequential(
            nn.Linear(channels, hidden), nn.LayerNorm(hidden), nn.ReLU(), nn.Linear(hidden, channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        weights = self.key(x).flatten(2).softmax(2).to(x.dtype)  # (N, 1, H * W)
        context = (x.flatten(2) @ weights.transpose(1, 2)).squeeze(2)
        return x + self.transform(context)[:, :, None, None].to(x.dtype)


class Triplet(nn.Module):
    """Triplet attention: the mean of three gates, each from the maximum and the mean over one of C, H and W.

    Source: Misra, Nalamada, Arasanipalai, Hou, "Rotate to Attend: Convolutional Triplet Attention Module", WACV 2021,
    section 3.2. Its rotations only choose the axis that is pooled; nothing is rotated here.

    Args:
        channels: C; no weight depends on it.
        kernel_size: side of the three convolutions.
    """

    def __init__(self, channels: int, *, kernel_size: int = 7) -> None:
        super().__init__()
        demand_positive(channels=channels)
        demand_odd(kernel_size)
        self.over_channels, self.over_rows, self.over_columns = (
            nn.Sequential(nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2, bias=False), nn.BatchNorm2d(1))
            for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        def pooled(axis: int) -> Tensor:
            return torch.stack((x.amax(axis), x.mean(axis)), 1)

        gates = torch.sigmoid(self.over_channels(pooled(1)))  # (N, 1, H, W)
        gates = gates + torch.sigmoid(self.over_rows(pooled(2))).transpose(1, 2)  # (N, 1, C, W) to (N, C, 1, W)
        gates = gates + torch.sigmoid(self.over_columns(pooled(3))).permute(0, 2, 3, 1)  # (N, 1, C, H) to (N, C, H, 1)
        return gated(x, gates / 3)


class Coordinate(nn.Module):
    """Coordinate attention: a gate per row and one per column, from means along the other side.

    Source: Hou, Zhou, Feng, "Coordinate Attention for Efficient Mobile Network Design", CVPR 2021, eq. 4 to 9. The
    non-linearity (hard swish) and the least width are those of the authors' code.

    Args:
        channels: C.
        reduction: r, hidden channels are C / r.
        least: the least number of hidden channels.
    """

    def __init__(self, channels: int, *, reduction: int = 32, least: int = 8) -> None:
        super().__init__()
        hidden = hidden_units(channels, reduction, least)
        self.shared = nn.Sequential(nn.Conv1d(channels, hidden, 1, bias=False), nn.BatchNorm1d(hidden), nn.Hardswish())
        self.rows = nn.Conv1d(hidden, channels, 1)
        self.columns = nn.Conv1d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        both = self.shared(torch.cat((x.mean(3), x.mean(2)), 2))  # (N, C / r, H + W)
        rows, columns = both.split(x.shape[2:], 2)
        x = gated(x, torch.sigmoid(self.rows(rows)).unsqueeze(3))
        return gated(x, torch.sigmoid(self.columns(columns)).unsqueeze(2))


class SimAM(nn.Module):
    """SimAM: ``x * sigmoid(1 / e)`` without parameters, ``1 / e = (x - mean)^2 / (4 (variance + lam)) + 1/2``.

    The variance divides by H * W - 1, as the authors' code does.

    Source: Yang, Zhang, Li, Xie, "SimAM: A Simple, Parameter-Free Attention Module for Convolutional Neural Networks",
    ICML 2021, eq. 5 and 6.

    Args:
        channels: C; nothing depends on it.
        lam: lambda of the paper.
    """

    def __init__(self, channels: int, *, lam: float = 1e-4) -> None:
        super().__init__()
        demand_positive(channels=channels)
        if lam <= 0:
            raise ValueError(f"lam must be above 0, got {lam}")
        self.lam = lam

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(wide_dtype(x))
        squares = (wide - wide.mean((2, 3), keepdim=True)).square()
        variance = squares.sum((2, 3), keepdim=True) / max(x.shape[2] * x.shape[3] - 1, 1)
        return gated(x, torch.sigmoid(squares / (4 * (variance + self.lam)) + 0.5))


class PAM(nn.Module):
    """Position attention: ``x + gamma * V softmax(Q^T K)``, unscaled, over all positions.

    Memory grows with (H W)^2 only where PyTorch's attention has no fused kernel.

    Source: Fu et al., "Dual Attention Network for Scene Segmentation", CVPR 2019, eq. 1 and 2; r as in their code.

    Args:
        channels: C.
        reduction: r, queries and keys have C / r channels.
        gamma_init: the paper starts at 0, where the module is the identity and nothing but gamma has a gradient.
    """

    def __init__(self, channels: int, *, reduction: int = 8, gamma_init: float = 0.1) -> None:
        super().__init__()
        inner = hidden_units(channels, reduction)
        self.query = nn.Conv2d(channels, inner, 1)
        self.key = nn.Conv2d(channels, inner, 1, bias=False)
        self.value = nn.Conv2d(channels, channels, 1)
        self.gamma = nn.Parameter(torch.full((1,), float(gamma_init)))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (tokens(one(x)) for one in (self.query, self.key, self.value))
        mixed = F.scaled_dot_product_attention(query, key, value, scale=1.0)  # (N, 1, H * W, C)
        mixed = mixed.squeeze(1).transpose(1, 2).unflatten(2, x.shape[2:])
        return x + gated(mixed.to(x.dtype), self.gamma)


class CAM(nn.Module):
    """Channel attention by affinity: ``x + gamma * softmax(X X^T) X`` with X = x as (C, H * W).

    The softmax is of the affinity itself, as equation 3 has it; the authors' code takes maximum minus affinity, which
    favours unlike channels, and which the paper does not have. Its products are never in half precision.

    Source: Fu et al., "Dual Attention Network for Scene Segmentation", CVPR 2019, eq. 3 and 4.

    Args:
        channels: C; no weight depends on it.
        gamma_init: the paper (beta there) starts at 0, where the module is the identity.
    """

    def __init__(self, channels: int, *, gamma_init: float = 0.1) -> None:
        super().__init__()
        demand_positive(channels=channels)
        self.gamma = nn.Parameter(torch.full((1,), float(gamma_init)))

    def forward(self, x: Tensor) -> Tensor:
        with float32_products(x):
            flat = x.flatten(2).to(wide_dtype(x))
            mixed = (flat @ flat.transpose(1, 2)).softmax(2) @ flat
        return x + gated(mixed.unflatten(2, x.shape[2:]).to(x.dtype), self.gamma)
