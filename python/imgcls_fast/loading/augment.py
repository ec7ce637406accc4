"""Draws random changes of training images as numbers, which every backend applies in the same way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .draws import DRAW

LAYOUT = 1  # another number when the same draws give other pixels


@dataclass(frozen=True)
class Augment:
    """Strengths of the random changes, resolved.

    Args:
        scale: area of the crop as fractions of the image.
        ratio: width / height of the crop.
        flip: probability of a horizontal flip.
        brightness, contrast, saturation: factors are drawn from 1 +- this.
        hue: drawn from +- this, in turns (0.5 is half the colour circle).
    """

    scale: tuple[float, float]
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Augment:
        """Read JSON values, in which tuples are lists."""
        plain: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
        }
        return cls(**plain)

    @property
    def has_color(self) -> bool:
        """Whether any colour strength is above 0."""
        return bool(self.brightness or self.contrast or self.saturation or self.hue)


def random_resized_crops(
    u: np.ndarray, width: np.ndarray, height: np.ndarray, scale: tuple[float, float], ratio: tuple[float, float]
) -> np.ndarray:
    """Draw the crops of a whole batch as torchvision's RandomResizedCrop does.

    Args:
        u: (n, COLUMNS) float64 uniform numbers, laid out by `draws.DRAW`.
        width, height: (n,) int64 pixels.
        scale: area as fractions of the image.
        ratio: width / height.

    Returns:
        (n, 4) int64 top, left, height, width, inside the image.

    Source: Szegedy et al., "Going deeper with convolutions", CVPR 2015, section 6 (ten attempts, then the largest
    centred crop with a legal ratio).
    """
    w, h = width[:, None].astype(np.float64), height[:, None].astype(np.float64)
    area = w * h * (scale[0] + u[:, DRAW.area] * (scale[1] - scale[0]))
    aspect = np.exp(np.log(ratio[0]) + u[:, DRAW.ratio] * (np.log(ratio[1]) - np.log(ratio[0])))
    try_w = np.rint(np.sqrt(area * aspect)).astype(np.int64)
    try_h = np.rint(np.sqrt(area / aspect)).astype(np.int64)
    fits = (try_w > 0) & (try_w <= width[:, None]) & (try_h > 0) & (try_h <= height[:, None])
    first = fits.argmax(1)
    pick = np.arange(len(u))
    crop_w, crop_h = try_w[pick, first], try_h[pick, first]
    top = np.floor(u[:, DRAW.top] * (height - crop_h + 1)).astype(np.int64)
    left = np.floor(u[:, DRAW.left] * (width - crop_w + 1)).astype(np.int64)
    none = ~fits.any(1)
    if none.any():
        last_h, last_w = _largest_legal(width[none], height[none], ratio)
        crop_h[none], crop_w[none] = last_h, last_w
        top[none], left[none] = (height[none] - last_h) // 2, (width[none] - last_w) // 2
    return np.stack([top, left, crop_h, crop_w], 1)


def _largest_legal(width: np.ndarray, height: np.ndarray, ratio: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    aspect = width / height
    crop_h = np.where(aspect < ratio[0], np.rint(width / ratio[0]), height)
    crop_w = np.where(aspect > ratio[1], np.rint(height * ratio[1]), width)
    return np.clip(crop_h, 1, height).astype(np.int64), np.clip(crop_w, 1, width).astype(np.int64)


NO_COLOR_CHANGE = np.array([1, 1, 1, 0], np.float32)  # brightness, contrast, saturation, hue


def color_factors(u: np.ndarray, augment: Augment) -> np.ndarray | None:
    """Return (n, 4) float32 brightness, contrast, saturation factors and hue in degrees; None without any colour change."""
    if not augment.has_color:
        return None
    spread = 2 * u[:, DRAW.color] - 1
    strength = np.array([augment.brightness, augment.contrast, augment.saturation, augment.hue * 360])
    return (NO_COLOR_CHANGE + spread * strength).astype(np.float32)


_TO_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.321], [0.211, -0.523, 0.311]])
_FROM_YIQ = np.linalg.inv(_TO_YIQ)


def color_transform(factors: np.ndarray) -> tuple[np.ndarray, float]:
    """Return the affine map of one image: (3, 3) matrix and offset, on RGB in 0..255.

    Hue turns and saturation scales the chroma plane of YIQ; then contrast acts around mid-gray (128) and brightness
    scales. One linear map, so that every backend can apply it in one pass.
    """
    brightness, contrast, saturation, hue = (float(f) for f in factors)
    angle = np.deg2rad(hue)
    turn = np.array([[1, 0, 0], [0, np.cos(angle), np.sin(angle)], [0, -np.sin(angle), np.cos(angle)]])
    chroma = turn @ np.diag([1, saturation, saturation])
    matrix = brightness * contrast * (_FROM_YIQ @ chroma @ _TO_YIQ)
    return matrix, brightness * (128.0 - contrast * 128.0)


def apply_color(pixels: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """Change the colours of one image: (H, W, C) uint8 in and out, C 1, 3 or 4 (alpha stays); `factors` (4,)."""
    matrix, offset = color_transform(factors)
    if pixels.shape[2] == 1:
        scale = float(factors[0] * factors[1])
        return np.clip(np.rint(pixels * np.float32(scale) + np.float32(offset)), 0, 255).astype(np.uint8)
    rgb = pixels[:, :, :3].astype(np.float32) @ matrix.T.astype(np.float32) + np.float32(offset)
    out = np.clip(np.rint(rgb), 0, 255).astype(np.uint8)
    return out if pixels.shape[2] == 3 else np.concatenate([out, pixels[:, :, 3:]], 2)
