"""Fifteen attention modules for the maps of convolutional networks: (N, C, H, W) floats in, the same shape out.

Each takes the number of channels and named parameters with the paper's defaults, any H and W from 1, and keeps dtype
and memory format of its input, under autocast too: statistics and gates may be computed in float32, the map is
multiplied in its own dtype. In training mode, modules with a batch norm on a pooled vector (BAM, SRM, SK) refuse a
batch of one image, and those with one on a map (CBAM, triplet) a batch of one image of one position, as every batch
norm does.
Biases that cannot change the output (before a batch norm, or the same for all entries of a softmax) are left out.
"""

from __future__ import annotations

from torch import nn

from .channel_attention import ECA, GCT, LCT, SE, SK, SRM
from .map_attention import BAM, CAM, CBAM, GC, PAM, Coordinate, DoubleAttention, SimAM, Triplet

MODULES: dict[str, type[nn.Module]] = {
    "se": SE,
    "cbam": CBAM,
    "bam": BAM,
    "double": DoubleAttention,
    "srm": SRM,
    "gc": GC,
    "sk": SK,
    "lct": LCT,
    "gct": GCT,
    "eca": ECA,
    "triplet": Triplet,
    "coord": Coordinate,
    "simam": SimAM,
    "pam": PAM,
    "cam": CAM,
}
