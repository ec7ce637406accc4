"""Turns one decoded image into what the model sees: resized, cropped, flipped and coloured, by Pillow."""

from __future__ import annotations

import numpy as np
from PIL import Image

from ..core.pixels import EXTREME_ASPECT, Pixels
from .augment import apply_color
from .sampler import Request

_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def resize_region(image: np.ndarray, size: tuple[int, int], pixels: Pixels) -> np.ndarray:
    """Resize (H, W, C) uint8 to (height, width), antialiased; alpha is resized like a colour channel."""
    channels = image.shape[2]
    picture = Image.fromarray(image[:, :, 0] if channels == 1 else image, _MODES[channels])
    if channels == 4:  # Pillow would premultiply RGBA; the model wants the four planes as they are
        planes = [plane.resize(size[::-1], _FILTERS[pixels.interpolation]) for plane in picture.split()]
        return np.stack([np.asarray(plane) for plane in planes], 2)
    resized = np.asarray(picture.resize(size[::-1], _FILTERS[pixels.interpolation]))
    return resized[:, :, None] if channels == 1 else resized


def evaluation_view(image: np.ndarray, resize: np.ndarray, pixels: Pixels) -> np.ndarray:
    """Resize the short side and take the centre: (H, W, C) uint8 -> (size, size, C) uint8, as torchvision does it.

    An extreme shape (beyond 12:1) is cut to the region around the centre first, because the resized whole would be far
    larger than the crop; edge pixels then differ by the filter's support.
    """
    high, wide, top, left = (int(v) for v in resize)
    size = pixels.size
    height, width = image.shape[:2]
    if max(height, width) > EXTREME_ASPECT * min(height, width):
        y0, y1 = _source_span(top, size, high, height)
        x0, x1 = _source_span(left, size, wide, width)
        return resize_region(np.ascontiguousarray(image[y0:y1, x0:x1]), (size, size), pixels)
    return resize_region(image, (high, wide), pixels)[top : top + size, left : left + size]


def _source_span(offset: int, size: int, resized: int, source: int) -> tuple[int, int]:
    first = int(offset * source / resized)
    return first, max(first + 1, min(source, round((offset + size) * source / resized)))


def render(image: np.ndarray, request: Request, position: int, pixels: Pixels) -> np.ndarray:
    """Crop, resize, flip and colour one decoded image (H, W, C) uint8 as its batch wants it: (size, size, C) uint8."""
    if request.crop is not None:
        top, left, high, wide = (int(v) for v in request.crop[position])
        region = np.ascontiguousarray(image[top : top + high, left : left + wide])
        out = resize_region(region, (pixels.size, pixels.size), pixels)
    else:
        assert request.resize is not None
        out = evaluation_view(image, request.resize[position], pixels)
    if request.flip[position]:
        out = out[:, ::-1]
    if request.color is not None:
        out = apply_color(np.ascontiguousarray(out), request.color[position])
    return out
