"""Builds the DALI graph: decode, resize, crop, flip and colour, by numbers that the sampler has drawn.

Pixels are within 2 levels of Pillow's (mean 0.16), with two exceptions in less than 0.1 % of the values: at the very
edge of an image DALI repeats the last pixel where Pillow renormalises its filter (up to 15 levels, outermost row or
column), and bicubic overshoot at hard edges is clipped after both passes, not between them (up to 14 levels).
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
from nvidia.dali import fn, types
from nvidia.dali.pipeline import Pipeline
from PIL import Image

from ..core.pixels import Pixels
from .augment import NO_COLOR_CHANGE
from .sampler import Request, Sampler

_FILTERS = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}
_AXES = [0, 1]
Source = Callable[[], list[list[np.ndarray]]]


class Graph:
    """Operators of DALI for the files of a batch, and their inputs.

    Args:
        sampler: geometry and augmentation.
        threads: CPU threads of DALI.
        device_id: number of the GPU that decodes; None: the CPU does.
    """

    def __init__(self, sampler: Sampler, threads: int, device_id: int | None) -> None:
        self.sampler, self._threads, self._device_id = sampler, threads, device_id
        self._blank = _blank()
        color = sampler.augment is not None and sampler.augment.has_color
        self._factors = (2 if sampler.pixels.color == "gray" else 4) if color else 0  # gray has no hue, no saturation

    def pipeline(self, source: Source) -> Any:
        """Build a pipeline that outputs (S, S, C) uint8 pixels; DALI calls `source` for each batch, ahead of delivery."""
        pipeline = Pipeline(
            batch_size=self.sampler.batch_size,
            num_threads=self._threads,
            device_id=self._device_id,
            prefetch_queue_depth=2,
            seed=0,
        )
        with pipeline:
            pipeline.set_outputs(self._images(source))
        pipeline.build()
        return pipeline

    def single(self) -> Any:
        """Build a pipeline that decodes one whole file per run, fed as "file"."""
        pipeline = Pipeline(batch_size=1, num_threads=1, device_id=self._device_id, prefetch_queue_depth=1)
        with pipeline:
            encoded = fn.external_source(name="file", dtype=types.UINT8)
            pipeline.set_outputs(self._decoder(encoded, self.sampler.pixels.exif == "apply"))
        pipeline.build()
        return pipeline

    def arguments(self, request: Request, encoded: dict[int, bytes]) -> list[list[np.ndarray]]:
        """Return the inputs of the graph for one batch, each a list of one array per sample.

        Positions that DALI shall not decode (padding, rows for Pillow) get the blank image, black in every setting.
        """
        size = len(request.rows)
        own = np.zeros(size, bool)
        own[list(encoded)] = True
        files = [np.frombuffer(encoded[k], np.uint8) if k in encoded else self._blank for k in range(size)]
        side = self.sampler.pixels.size
        wanted, whole = (request.resize, (side, side, 0, 0)) if request.crop is None else (request.crop, (0, 0, 1, 1))
        place = np.where(own[:, None], np.asarray(wanted), whole).astype(np.int32)
        columns = [files, list(place[:, :2]), list(place[:, 2:])]
        if request.crop is not None:
            columns.append(list(request.flip.astype(np.int32)))
        if request.color is not None:
            factors = np.where(own[:, None], request.color, NO_COLOR_CHANGE)[:, : self._factors]
            columns += [list(column) for column in factors.T]
        return columns

    def _images(self, source: Source) -> Any:
        pixels, training = self.sampler.pixels, self.sampler.training
        kinds: list[Any] = (
            [types.UINT8, types.INT32, types.INT32] + [types.INT32] * training + [types.FLOAT] * self._factors
        )
        inputs = fn.external_source(source=source, num_outputs=len(kinds), batch=True, dtype=kinds)
        encoded = inputs[0]
        turn = pixels.exif == "apply"
        if training:
            images = self._decoder_slice(encoded, inputs[1], inputs[2], turn)
            images = _resize(_gray(images, pixels), [pixels.size, pixels.size], pixels)
            images = fn.flip(images, horizontal=inputs[3])
        else:
            images = self._decoder(encoded, turn)
            images = _resize(_gray(images, pixels), fn.cast(inputs[1], dtype=types.FLOAT), pixels)
            window = [pixels.size, pixels.size]
            images = fn.slice(images, inputs[2], window, axes=_AXES, normalized_anchor=False, normalized_shape=False)
        if self._factors:
            images = _twist(images, inputs[4:])
        return images

    def _decoder(self, encoded: Any, turn: bool) -> Any:
        return fn.decoders.image(encoded, output_type=types.RGB, adjust_orientation=turn, **self._decoder_options())

    def _decoder_slice(self, encoded: Any, anchor: Any, shape: Any, turn: bool) -> Any:
        return fn.decoders.image_slice(
            encoded,
            anchor,
            shape,
            axes=_AXES,
            normalized_anchor=False,
            normalized_shape=False,
            output_type=types.RGB,
            adjust_orientation=turn,
            **self._decoder_options(),
        )

    def _decoder_options(self) -> dict[str, Any]:
        if self._device_id is None:
            return {"device": "cpu"}
        # fancy upsampling makes nvJPEG's chroma equal libjpeg's; the largest image sizes its buffers once
        manifest = self.sampler.manifest
        return {
            "device": "mixed",
            "jpeg_fancy_upsampling": True,
            "preallocate_width_hint": int(manifest.width.max()),
            "preallocate_height_hint": int(manifest.height.max()),
        }


def _blank() -> np.ndarray:
    """Return the file of a black image of one pixel, (n,) uint8."""
    file = io.BytesIO()
    Image.new("RGB", (1, 1)).save(file, "PNG")
    return np.frombuffer(file.getvalue(), np.uint8)


def _resize(images: Any, size: Any, pixels: Pixels) -> Any:
    return fn.resize(images, size=size, interp_type=_FILTERS[pixels.interpolation], antialias=True)


def _gray(images: Any, pixels: Pixels) -> Any:
    # decoding to gray directly would take the JPEG's luma plane, which differs from converted RGB where colours clip
    if pixels.color != "gray":
        return images
    return fn.color_space_conversion(images, image_type=types.RGB, output_type=types.GRAY)


def _twist(images: Any, factors: Any) -> Any:
    if len(factors) == 2:
        return fn.brightness_contrast(images, brightness=factors[0], contrast=factors[1])
    return fn.color_twist(images, brightness=factors[0], contrast=factors[1], saturation=factors[2], hue=factors[3])
