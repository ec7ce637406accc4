"""How a file becomes model input: one specification, obeyed by every loader, by serving and by export."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

CHANNELS = {"gray": 1, "rgb": 3, "rgba": 4}
FULL_BITS = 16  # of a 16-bit image that uses its whole range
EXTREME_ASPECT = 12.0  # beyond this a resized image would be far larger than its crop


@dataclass(frozen=True)
class Pixels:
    """The pixel specification of a model, stored in its bundle.

    Evaluation: EXIF rotation, short side resized to `resize_to` (antialiased), centre crop of `size`. Normalisation
    with mean and std (per channel, 0..1) happens inside the model.
    """

    size: int
    crop_pct: float
    interpolation: Literal["bilinear", "bicubic"]
    color: Literal["gray", "rgb", "rgba"]
    exif: Literal["apply", "ignore"]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    max_megapixels: float = 50.0
    bits: int = FULL_BITS  # that 16-bit gray images use: 2^bits - 1 becomes 255, and what is above it as well

    @property
    def channels(self) -> int:
        """C: 1, 3 or 4."""
        return CHANNELS[self.color]

    @property
    def resize_to(self) -> int:
        """Short side in pixels before the centre crop; timm's rule: floor(size / crop_pct)."""
        return max(self.size, math.floor(self.size / self.crop_pct))

    def to_dict(self) -> dict[str, Any]:
        """Plain values; without `bits` where they are usual, so that what was made before there were any still compares equal."""
        values = asdict(self)
        return values if self.bits != FULL_BITS else {name: value for name, value in values.items() if name != "bits"}

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> Pixels:
        return cls(**{**value, "mean": tuple(value["mean"]), "std": tuple(value["std"])})


def evaluation_geometry(width: np.ndarray, height: np.ndarray, resize_to: int, size: int) -> np.ndarray:
    """Resized size and crop offset of each image, as torchvision's Resize and CenterCrop compute them.

    Args:
        width, height: (n,) int64 pixels, after EXIF rotation.
        resize_to: short side after the resize.
        size: side of the crop, at most `resize_to`.

    Returns:
        (n, 4) int64: resized height, resized width, top, left. The long side is truncated and the offset rounded half
        to even, which is what torchvision does and what DALI's own options do not.
    """
    short = np.minimum(width, height)
    long_side = (resize_to * np.maximum(width, height) / short).astype(np.int64)  # int() truncates, as torchvision
    high = np.where(height <= width, resize_to, long_side)
    wide = np.where(height <= width, long_side, resize_to)
    top = np.rint((high - size) / 2).astype(np.int64)
    left = np.rint((wide - size) / 2).astype(np.int64)
    return np.stack([high, wide, top, left], 1)
