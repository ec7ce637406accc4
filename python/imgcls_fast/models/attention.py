"""Fifteen attention modules for the maps of convolutional networks: (N, C, H, W) floats in, the same shape out.

Each takes the number of channels and named parameters with the paper's defaults, any H and W from 1, and keeps dtype
and memory format of its input, under autocast too: statistics and gates may be computed in float32, the map is
multiplied in its own dtype. In training mode, modules with a batch norm on a pooled vector (BAM, SRM, SK) refuse a
batch of one image, and those with one on a map (CBAM, triplet) a batch of one image of one position, as every batch
norm does.
Biases that cannot change the output (before a batch norm, or the same for all entries of a softmax) are left out.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.errors import ConfigError
from ..ops.cbam import cbam, cbam_refusal
from ..ops.library import autocast_dtype

# Hidden layers are never thinner. Behind positive maps a ReLU unit is dead for all images in half of the draws,
# so that with 64 / 16 = 4 units one gate in 16 could never learn. Coordinate attention has the same least width.
LEAST_HIDDEN = 8

# A group norm over one number gives nothing; the papers' own networks have no fewer than 256 channels / 64.
LEAST_GROUP = 4


def _positive(**sizes: int) -> None:
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def _odd(kernel_size: int) -> None:
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd, so that the map keeps its size, got {kernel_size}")


def _hidden(channels: int, reduction: int, least: int = LEAST_HIDDEN) -> int:
    _positive(reduction=reduction, least=least)
    return max(channels // reduction, least)


def _gated(x: Tensor, gate: Tensor) -> Tensor:
    """`x` (N, C, H, W) times a factor for each channel (N, C) or any that broadcasts, in the dtype of `x`."""
    return x * (gate[:, :, None, None] if gate.dim() == 2 else gate).to(x.dtype)


def _wide(x: Tensor) -> torch.dtype:
    """The dtype for sums over a map of squares and products, which overflow float16: at least float32."""
    return torch.promote_types(x.dtype, torch.float32)


def _tokens(maps: Tensor) -> Tensor:
    """(N, C, H, W) to (N, 1, H * W, C): positions as a sequence, one head."""
    return maps.flatten(2).transpose(1, 2).unsqueeze(1)


def _float32_products(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Inside, autocast does not lower the precision of matrix products."""
    return contextlib.nullcontext() if autocast_dtype(x) is None else torch.autocast(x.device.type, enabled=False)


class SE(nn.Module):
    """Squeeze-and-excitation: ``x * sigmoid(W2 relu(W1 mean(x)))``, without biases.

    Source: Hu, Shen, Sun, "Squeeze-and-Excitation Networks", CVPR 2018, eq. 2 to 4.

    Args:
        channels: C.
        reduction: r, hidden units are C / r.
    """

    def __init__(self, channels: int, *, reduction: int = 16) -> None:
        super().__init__()
        hidden = _hidden(channels, reduction)
        self.squeeze = nn.Linear(channels, hidden, bias=False)
        self.excite = nn.Linear(hidden, channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return _gated(x, torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3)))))))


class CBAM(nn.Module):
    """Convolutional block attention: a gate for each channel, then one for each position; `ops.cbam` has the formula.

    The norm is that of the authors' code; the paper writes none. The maxima share their gradient among equal positions.

    Source: Woo, Park, Lee, Kweon, "CBAM: Convolutional Block Attention Module", ECCV 2018, eq. 1 to 3.

    Args:
        channels: C.
        reduction: r; `w1` is (R, C) and `w2` (C, R) with R = C / r.
        kernel_size: side of the one convolution over the two pooled maps.
    """

    def __init__(self, channels: int, *, reduction: int = 16, kernel_size: int = 7) -> None:
        super().__init__()
        _odd(kernel_size)
        hidden = _hidden(channels, reduction)
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
        reduction: r, of the hidden layers of both halves.
        dilation: d, of the two 3x3 convolutions.
    """

    def __init__(self, channels: int, *, reduction: int = 16, dilation: int = 4) -> None:
        super().__init__()
        _positive(dilation=dilation)
        hidden = _hidden(channels, reduction)
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
        return x + _gated(x, torch.sigmoid(logits))


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
        inner = _hidden(channels, reduction)
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


class SRM(nn.Module):
    """Style recalibration: ``x * sigmoid(norm(w . [mean(x), std(x)]))``, two weights and a batch norm for each channel.

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
        return _gated(x, torch.sigmoid(self.norm((style * self.weight).sum(2))))


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
        hidden = _hidden(channels, reduction)
        self.key = nn.Conv2d(channels, 1, 1, bias=False)
        self.transform = nn.Sequential(
            nn.Linear(channels, hidden), nn.LayerNorm(hidden), nn.ReLU(), nn.Linear(hidden, channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        weights = self.key(x).flatten(2).softmax(2).to(x.dtype)  # (N, 1, H * W)
        context = (x.flatten(2) @ weights.transpose(1, 2)).squeeze(2)
        return x + self.transform(context)[:, :, None, None].to(x.dtype)


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
        _positive(branches=branches, groups=groups)
        hidden = _hidden(channels, reduction, least)
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
        gated = [_gated(one, shares[:, index]) for index, one in enumerate(maps)]
        return sum(gated[1:], gated[0]).to(x.dtype)


class LCT(nn.Module):
    """Linear context transform: ``x * sigmoid(w * group_norm(mean(x)) + b)``.

    w starts at 1 and b at 0, as in any group norm: with w = 0 all channels would begin with one factor, which a norm
    behind the place takes out again.

    Source: Ruan, Wen, Zheng, Zheng, "Linear Context Transform Block", AAAI 2020.

    Args:
        channels: C.
        groups: of channels that are normalised together; fewer where they do not divide C into groups of four or more
            (the least that the paper's ResNet-50 has), because a group of one carries nothing.
        eps: added to the variance.
    """

    def __init__(self, channels: int, *, groups: int = 64, eps: float = 1e-5) -> None:
        super().__init__()
        _positive(groups=groups)
        fitting = math.gcd(channels, min(groups, max(channels // LEAST_GROUP, 1)))
        self.norm = nn.GroupNorm(fitting, channels, eps)

    def forward(self, x: Tensor) -> Tensor:
        return _gated(x, torch.sigmoid(self.norm(x.mean((2, 3)))))


class GCT(nn.Module):
    """Gated channel transformation: ``x * (1 + tanh(gamma * s' + beta))``.

    ``s = alpha * sqrt(sum(x^2) + eps)`` for each channel, and ``s' = sqrt(C) s / sqrt(sum(s^2) + eps)``.

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
        norms = torch.linalg.vector_norm(x, dim=(2, 3), dtype=_wide(x))
        s = self.alpha * (norms.square() + self.eps).sqrt()
        s = s * math.sqrt(s.shape[1]) / (s.square().sum(1, keepdim=True) + self.eps).sqrt()
        return _gated(x, 1 + torch.tanh(self.gamma * s + self.beta))


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
        return _gated(x, torch.sigmoid(self.conv(x.mean((2, 3)).unsqueeze(1)).squeeze(1)))


class Triplet(nn.Module):
    """Triplet attention: the mean of three gates, each from the maximum and the mean over one of C, H and W.

    Source: Misra, Nalamada, Arasanipalai, Hou, "Rotate to Attend: Convolutional Triplet Attention Module", WACV 2021,
    section 3.2. Its rotations only say along which axis is pooled; nothing is rotated here.

    Args:
        channels: C; no weight depends on it.
        kernel_size: of the three convolutions.
    """

    def __init__(self, channels: int, *, kernel_size: int = 7) -> None:
        super().__init__()
        _positive(channels=channels)
        _odd(kernel_size)
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
        return _gated(x, gates / 3)


class Coordinate(nn.Module):
    """Coordinate attention: a gate for each row and one for each column, from means along the other side.

    Source: Hou, Zhou, Feng, "Coordinate Attention for Efficient Mobile Network Design", CVPR 2021, eq. 4 to 9. The
    non-linearity (hard swish) and the least width are those of the authors' code.

    Args:
        channels: C.
        reduction: r, hidden channels are C / r.
        least: the least number of hidden channels.
    """

    def __init__(self, channels: int, *, reduction: int = 32, least: int = 8) -> None:
        super().__init__()
        hidden = _hidden(channels, reduction, least)
        self.shared = nn.Sequential(nn.Conv1d(channels, hidden, 1, bias=False), nn.BatchNorm1d(hidden), nn.Hardswish())
        self.rows = nn.Conv1d(hidden, channels, 1)
        self.columns = nn.Conv1d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        both = self.shared(torch.cat((x.mean(3), x.mean(2)), 2))  # (N, C / r, H + W)
        rows, columns = both.split(x.shape[2:], 2)
        x = _gated(x, torch.sigmoid(self.rows(rows)).unsqueeze(3))
        return _gated(x, torch.sigmoid(self.columns(columns)).unsqueeze(2))


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
        _positive(channels=channels)
        if lam <= 0:
            raise ValueError(f"lam must be above 0, got {lam}")
        self.lam = lam

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(_wide(x))
        squares = (wide - wide.mean((2, 3), keepdim=True)).square()
        variance = squares.sum((2, 3), keepdim=True) / max(x.shape[2] * x.shape[3] - 1, 1)
        return _gated(x, torch.sigmoid(squares / (4 * (variance + self.lam)) + 0.5))


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
        inner = _hidden(channels, reduction)
        self.query = nn.Conv2d(channels, inner, 1)
        self.key = nn.Conv2d(channels, inner, 1, bias=False)
        self.value = nn.Conv2d(channels, channels, 1)
        self.gamma = nn.Parameter(torch.full((1,), float(gamma_init)))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (_tokens(one(x)) for one in (self.query, self.key, self.value))
        mixed = F.scaled_dot_product_attention(query, key, value, scale=1.0)  # (N, 1, H * W, C)
        mixed = mixed.squeeze(1).transpose(1, 2).unflatten(2, x.shape[2:])
        return x + _gated(mixed.to(x.dtype), self.gamma)


class CAM(nn.Module):
    """Channel attention by affinity: ``x + gamma * softmax(X X^T) X`` with X = x as (C, H * W).

    The softmax is of the affinity itself, as equation 3 has it; the authors' code takes maximum minus affinity, which
    favours unlike channels, and which the paper does not say. Its products are never in half precision.

    Source: Fu et al., "Dual Attention Network for Scene Segmentation", CVPR 2019, eq. 3 and 4.

    Args:
        channels: C; no weight depends on it.
        gamma_init: the paper (beta there) starts at 0, where the module is the identity.
    """

    def __init__(self, channels: int, *, gamma_init: float = 0.1) -> None:
        super().__init__()
        _positive(channels=channels)
        self.gamma = nn.Parameter(torch.full((1,), float(gamma_init)))

    def forward(self, x: Tensor) -> Tensor:
        with _float32_products(x):
            flat = x.flatten(2).to(_wide(x))
            mixed = (flat @ flat.transpose(1, 2)).softmax(2) @ flat
        return x + _gated(mixed.unflatten(2, x.shape[2:]).to(x.dtype), self.gamma)


MODULES: dict[str, type[nn.Module]] = {
    "se": SE, "cbam": CBAM, "bam": BAM, "double": DoubleAttention, "srm": SRM, "gc": GC, "sk": SK, "lct": LCT, "gct":
    GCT, "eca": ECA, "triplet": Triplet, "coord": Coordinate, "simam": SimAM, "pam": PAM, "cam": CAM,
}  # fmt: skip
