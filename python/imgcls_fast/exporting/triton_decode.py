"""The pixel specification as a DALI pipeline for Triton: an encoded image in, (S, S, C) uint8 out.

The loaders compute where an image is cut outside DALI; a server has only the bytes, so here the graph reads the size from
the header and does the same integer arithmetic as `core.pixels.evaluation_geometry`.

Pillow resizes across, rounds to bytes, and then resizes down. So does this graph, in two passes, each of which produces
nothing but what the crop needs. Against Pillow, over 220 photos at 224 pixels: largest difference 2 levels, mean 0.005, bilinear
and bicubic. In one pass (110 photos): 1 and 0.16 bilinear, 14 and 0.18 bicubic.

What the graph refuses, rather than give other pixels than training saw: files that are no JPEG, PNG, WebP or BMP, and
images of more than `max_megapixels`. The refusal is a slice beyond the end of the file, the one thing in DALI that fails on
a condition; it comes before anything is decoded, and Triton answers the request with an error that names `fn.slice`.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from nvidia.dali import fn, types
from nvidia.dali._utils import dali_trace
from nvidia.dali.pipeline import Pipeline
from PIL import Image

from ..core.pixels import FULL_BITS, Pixels, evaluation_geometry
from ..data.decode import ORIENTATION, decode_pixels
from ..loading.render import evaluation_view

INPUT = "encoded"
# Operators of arithmetic were renamed in DALI 2.0: a pipeline of a 2.x version does not load in a 1.x
OLDEST_DALI = "2.0"

_FILTERS = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}
_STARTS = (0xFFD8, 0x8950, 0x5249, 0x424D)  # first two bytes of JPEG, PNG, RIFF (WebP) and BMP
# How far a filter reaches beyond the image, in pixels of the output: there DALI repeats the last pixel, and Pillow renormalises.
_REACH = {"bilinear": 1, "bicubic": 2}
LARGEST, MEAN = 2, 0.25  # levels: what two decoders of the same pixels may differ by


def decode_pipeline(pixels: Pixels, *, gpu: bool) -> bytes:
    """The serialised pipeline: input `encoded`, a one-dimensional uint8 tensor a sample; output (S, S, C) uint8.

    Batch size, threads and device are set by Triton when it loads the model. A pipeline for a GPU can be made without one.

    Args:
        gpu: decode JPEG on the GPU ("mixed") and resize there.

    Raises:
        ValueError: the specification wants RGBA, which DALI cannot decode with an opaque default, or fewer than 16 bits of
            16-bit gray, which it cannot scale.
    """
    if pixels.color == "rgba":
        raise ValueError("DALI has no decoder that gives RGBA for every file")
    if pixels.bits != FULL_BITS:
        raise ValueError(f"DALI scales 16-bit gray by 16 bits, and the model was trained on {pixels.bits}")
    with _without_traces():
        pipeline = Pipeline(
            batch_size=1,
            num_threads=1,
            device_id=None,
            prefetch_queue_depth=1,
            seed=0,
            output_dtype=[types.UINT8],
            output_ndim=[3],
        )
        with pipeline:
            pipeline.set_outputs(_graph(pixels, gpu))
        return bytes(pipeline.serialize())


@contextmanager
def _without_traces() -> Iterator[None]:
    """DALI writes the paths and source lines of whoever made an operator into the file: they are nobody's business."""
    before = dali_trace.is_tracing_enabled()
    dali_trace.set_tracing(enabled=False)
    try:
        yield
    finally:
        dali_trace.set_tracing(enabled=before)


def _graph(pixels: Pixels, gpu: bool) -> Any:
    turn = pixels.exif == "apply"
    encoded = fn.external_source(name=INPUT, device="cpu", dtype=types.UINT8, ndim=1)
    shape = fn.peek_image_shape(encoded, adjust_orientation=turn)
    encoded = _refuse(encoded, shape, pixels.max_megapixels)
    options = {"device": "mixed", "jpeg_fancy_upsampling": True} if gpu else {"device": "cpu"}
    images = fn.decoders.image(encoded, output_type=types.RGB, adjust_orientation=turn, **options)
    if pixels.color == "gray":  # from RGB, not from the JPEG's luma: see loading/dali_graph.py
        images = fn.color_space_conversion(images, image_type=types.RGB, output_type=types.GRAY)
    return _view(images, _part(shape, 0, 2), pixels)


def _view(images: Any, whole: Any, pixels: Pixels) -> Any:
    """The centre of the resized image; `whole` holds height and width, (2,) int64."""
    short = fn.reductions.min(whole, axes=[0], keep_dims=True)
    resized = pixels.resize_to * whole // short  # torchvision truncates the long side
    half = (resized - pixels.size) // 2
    offset = half + ((resized - pixels.size) & half & 1)  # and rounds a half to the even neighbour
    scale = _real(whole) / _real(resized)
    first, last = _real(offset) * scale, _real(offset + pixels.size) * scale  # of the source, each (2,): y, x
    height = _real(_part(whole, 0))
    zero = height * 0.0
    side = zero + float(pixels.size)
    across = _resize(
        images, fn.cat(height, side), fn.cat(zero, _part(first, 1)), fn.cat(height, _part(last, 1)), pixels
    )
    down = fn.cat(_part(first, 0), zero), fn.cat(_part(last, 0), side)
    return _resize(across, [pixels.size, pixels.size], *down, pixels)


def _resize(images: Any, size: Any, first: Any, last: Any, pixels: Pixels) -> Any:
    return fn.resize(
        images, size=size, roi_start=first, roi_end=last, interp_type=_FILTERS[pixels.interpolation], antialias=True
    )


def _refuse(encoded: Any, shape: Any, max_megapixels: float) -> Any:
    """The same bytes, or an error for a file that must not be decoded."""
    start = fn.cast(_part(encoded, 0, 2, out_of_bounds_policy="pad"), dtype=types.INT32)
    start = _part(start, 0) * 256 + _part(start, 1)
    known = start == _STARTS[0]
    for other in _STARTS[1:]:
        known = known | (start == other)
    good = known & (_part(shape, 0) * _part(shape, 1) <= int(max_megapixels * 1e6))
    length = 2.0 - _real(good)  # relative: 1 is the whole file, 2 is beyond its end
    return fn.slice(encoded, 0.0, length, axes=[0], out_of_bounds_policy="error")


def _part(values: Any, start: int, count: int = 1, **options: Any) -> Any:
    """`count` elements of a one-dimensional tensor, as a one-dimensional tensor (`values[k]` would be a scalar)."""
    return fn.slice(values, start, count, axes=[0], normalized_anchor=False, normalized_shape=False, **options)


def _real(values: Any) -> Any:
    return fn.cast(values, dtype=types.FLOAT)


# ---------------------------------------------------------------- running and checking it here


def run_pipeline(model: bytes, files: Sequence[bytes]) -> list[np.ndarray]:
    """Load a serialised CPU pipeline, as the server does, and give it encoded images one by one.

    Returns:
        one (S, S, C) uint8 array a file.

    Raises:
        RuntimeError: DALI refuses the pipeline or a file; nothing after that file is decoded.
    """
    pipeline = Pipeline.deserialize(model, batch_size=1, num_threads=1)
    found = []
    for file in files:
        pipeline.feed_input(INPUT, [np.frombuffer(file, np.uint8)])
        found.append(np.array(pipeline.run()[0].as_array()[0]))
    return found


def specified_pixels(file: bytes, pixels: Pixels) -> np.ndarray:
    """An encoded image as the pixel specification has it, by Pillow: (S, S, C) uint8.

    Raises:
        Undecodable: the file is no image that this project reads.
    """
    image = decode_pixels(
        file, color=pixels.color, exif=pixels.exif, max_megapixels=pixels.max_megapixels, bits=pixels.bits
    )
    height, width = image.shape[:2]
    place = evaluation_geometry(np.array([width]), np.array([height]), pixels.resize_to, pixels.size)
    return evaluation_view(image, place[0], pixels)


def decode_difference(pixels: Pixels) -> dict[str, float]:
    """Run the CPU pipeline on generated pictures and compare with Pillow.

    Returns:
        `largest` and `mean` difference in levels, without the outermost pixels, where the two filters end differently.
    """
    files = [made_picture(90, 61, "JPEG", orientation=6), made_picture(47, 150, "PNG"), made_picture(220, 220, "BMP")]
    found = run_pipeline(decode_pipeline(pixels, gpu=False), files)
    reach = min(_REACH[pixels.interpolation], (pixels.size - 1) // 2)
    inner = slice(reach, pixels.size - reach)
    differences = [
        np.abs(one.astype(int) - specified_pixels(file, pixels))[inner, inner]
        for one, file in zip(found, files, strict=True)
    ]
    return {
        "largest": float(max(d.max() for d in differences)),
        "mean": float(np.mean([d.mean() for d in differences])),
    }


def made_picture(width: int, height: int, kind: str, orientation: int = 1) -> bytes:
    """A small encoded picture without symmetry: slopes, rings and a little noise."""
    y, x = np.mgrid[0:height, 0:width] / max(width, height)
    rings = 40 * np.sin(40 * np.hypot(x - 0.3, y - 0.2))
    noise = np.random.default_rng(width).normal(0, 4, (height, width, 3))
    slopes = np.stack([200 * x, 120 + 100 * y - 60 * x, 220 - 180 * y], 2)
    image = Image.fromarray((slopes + rings[:, :, None] + noise).clip(0, 255).astype(np.uint8))
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    buffer = io.BytesIO()
    options: dict[str, Any] = {"exif": exif, "quality": 92} if kind == "JPEG" else {}
    image.save(buffer, kind, **options)
    return buffer.getvalue()
