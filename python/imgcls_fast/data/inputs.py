"""Brings images from whatever form a caller has them in to what the decoder takes: a path, bytes, a Pillow image or an array."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as Pillow
from torch import Tensor

from .decode import Undecodable

FORMS = "a path, bytes, an open file, a Pillow image, a NumPy array or a torch tensor"
_BYTES = (bytes, bytearray, memoryview)
_CHANNELS = (1, 3, 4)


def is_one(images: Any) -> bool:
    """Whether it is a single image (or nothing that could be one), and not several of them."""
    if isinstance(images, np.ndarray | Tensor):
        return images.ndim != 4 and getattr(images, "dtype", None) != np.object_
    single = isinstance(images, (str, os.PathLike, Pillow.Image, Mapping, *_BYTES)) or hasattr(images, "read")
    return single or not isinstance(images, Iterable)


def each(images: Any) -> Iterable[Any]:
    """The images one by one: a single one alone, (N, C, H, W) tensors and (N, H, W, C) arrays taken apart."""
    return [images] if is_one(images) else images


def name_of(image: Any) -> str:
    """What stands for an image in an answer: its path, the name of an open file, or its type."""
    if isinstance(image, str | os.PathLike):
        return os.fsdecode(image)
    name = getattr(image, "name", None) if hasattr(image, "read") else None
    return name if isinstance(name, str) and name else f"<{type(image).__name__}>"


def decodable(image: Any) -> Path | bytes | Pillow.Image | np.ndarray:
    """The same image as `decode.decode_pixels` takes it; floating-point pixels mean 0..1.

    Raises:
        Undecodable: it is no image, or an array or tensor of a shape, type or range that pixels do not have.
    """
    if isinstance(image, str | os.PathLike):
        return Path(os.fsdecode(image))
    if isinstance(image, bytes | Pillow.Image):
        return image
    if isinstance(image, _BYTES):
        return bytes(image)
    if isinstance(image, io.BytesIO):
        return image.getvalue()  # wherever it was left after writing
    if hasattr(image, "read"):
        content = image.read()
        if not isinstance(content, bytes):
            raise Undecodable(name_of(image), "the file is open for text; open it with mode 'rb'")
        return content
    if isinstance(image, Tensor):
        return _whole_numbers(_channels_last(image.detach().cpu()))
    if isinstance(image, np.ndarray):
        return _whole_numbers(image)
    what = "None" if image is None else f"an object of type {type(image).__name__}"
    raise Undecodable(name_of(image), f"{what} is no image; expected {FORMS}")


def _channels_last(pixels: Tensor) -> np.ndarray:
    """(C, H, W) as torchvision has it, (H, W), or (H, W, C) where the first can not be meant."""
    if pixels.ndim == 3 and pixels.shape[0] in _CHANNELS:
        pixels = pixels.permute(1, 2, 0)
    elif pixels.ndim != 2 and not (pixels.ndim == 3 and pixels.shape[2] in _CHANNELS):
        raise Undecodable(
            f"tensor {tuple(pixels.shape)}", f"a tensor of pixels must have shape (C, H, W) or (H, W), got {tuple(pixels.shape)}"
        )
    found: np.ndarray = (pixels.float() if pixels.dtype == torch.bfloat16 else pixels).numpy()
    return found


def _whole_numbers(pixels: np.ndarray) -> np.ndarray:
    """0..1 as 0..255; whole numbers are left to the decoder, which knows uint8 and uint16."""
    if pixels.dtype.kind != "f" or not pixels.size:
        return pixels
    least, most = float(pixels.min()), float(pixels.max())
    if not 0 <= least <= most <= 1:  # NaN too
        why = "pixels in 0..255 belong into uint8, and the model normalises by itself"
        raise Undecodable(
            f"array {pixels.dtype} {pixels.shape}", f"floating-point pixels must lie in 0..1, got {least:.4g} to {most:.4g}; {why}"
        )
    return np.rint(pixels.astype(np.float32) * 255).astype(np.uint8)
