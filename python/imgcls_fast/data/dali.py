"""Loaders on NVIDIA DALI: the sampler draws every crop, DALI only reads, decodes, resizes and flips.

DALI cannot skip a bad image: one undecodable file makes the whole pipeline invalid (NVIDIA/DALI issue 3913). So files
are checked before they come here, and a file that slips through is found, quarantined, and the pipeline rebuilt at the
next undelivered batch, which needs no saved state because the sampler is a pure function.

Pixels are within 2 levels of Pillow's (mean 0.16), with two exceptions in less than 0.1 % of the values: at the very
edge of an image DALI repeats the last pixel where Pillow renormalises its filter (up to 15 levels, outermost row or
column), and bicubic overshoot at hard edges is clipped after both passes, not between them (up to 14 levels).
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from nvidia.dali import fn, types
from nvidia.dali.pipeline import Pipeline
from PIL import Image

from ..core.batch import Batch
from ..core.pixels import Pixels
from . import reach
from .augment import NO_COLOR_CHANGE
from .loader import OnBad, make_batch
from .quarantine import examine
from .sampler import Request, Sampler
from .torch_loader import decode_batch, fill

_FILTERS = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}
_AXES = [0, 1]
_JPEG_START, _JPEG_END, _BMP_START = 0xFFD8, 0xFFD9, 0x424D


class DaliLoader:
    """See `loader.Loader`. `dali-cpu` decodes on `workers` threads; `dali-gpu` on the GPU, and delivers there."""

    def __init__(
        self,
        sampler: Sampler,
        backend: str,
        workers: int,
        bad: dict[int, str],
        on_bad: OnBad | None,
        *,
        device: str,
        once: bool,
    ) -> None:
        self.sampler, self.bad, self._on_bad, self._once = sampler, bad, on_bad, once
        self._gpu = backend == "dali-gpu"
        self._device_id = _gpu_index(device) if self._gpu else None
        self._blank = _Blank()
        self._threads = max(1, workers)
        color = sampler.augment is not None and sampler.augment.has_color
        self._factors = (2 if sampler.pixels.color == "gray" else 4) if color else 0  # gray has no hue, no saturation
        self._pillow: set[int] = set()  # rows that DALI refuses and Pillow reads
        self._flagged = sampler.needs_pillow(np.arange(len(sampler.manifest)))
        self._ahead: deque[Request] = deque()  # asked of DALI, not yet delivered
        self._next = (0, 0)
        self._pipeline: Any = None

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        for index in range(start, self.sampler.steps):
            yield self._batch(epoch, index)

    def close(self) -> None:
        self._pipeline = None
        self._ahead.clear()
        self._blank.close()

    def _batch(self, epoch: int, index: int) -> Batch:
        """One batch; rebuilds the pipeline when it stands elsewhere, and after each bad file."""
        place = (epoch if self.sampler.training else 0, index)
        for _ in range(2 * self.sampler.batch_size + 2):  # each round but the last finds at least one bad row
            if self._pipeline is None or not self._ahead or (self._ahead[0].epoch, self._ahead[0].index) != place:
                self._build(place)
            try:
                outputs = self._pipeline.run()
            except RuntimeError as error:
                self._pipeline = None
                self._find_bad(list(self._ahead), str(error), epoch)
                continue
            return self._deliver(self._ahead.popleft(), outputs, epoch)
        raise RuntimeError(f"DALI failed again and again at epoch {epoch}, batch {index}")

    # the pipeline
    def _build(self, place: tuple[int, int]) -> None:
        self._ahead.clear()
        self._next = place
        pipeline = Pipeline(
            batch_size=self.sampler.batch_size,
            num_threads=self._threads,
            device_id=self._device_id,
            prefetch_queue_depth=2,
            seed=0,
        )
        with pipeline:
            pipeline.set_outputs(*self._graph())
        pipeline.build()
        self._pipeline = pipeline

    def _source(self) -> list[list[np.ndarray]]:
        """Called by DALI for each batch, ahead of delivery."""
        epoch, index = self._next
        if index >= self.sampler.steps:
            if self._once:
                raise StopIteration
            epoch, index = (epoch + 1 if self.sampler.training else 0), 0
        self._next = (epoch, index + 1)
        request = self.sampler.request(epoch, index, self.bad.keys())
        self._ahead.append(request)
        return self._arguments(request)

    def _arguments(self, request: Request) -> list[list[np.ndarray]]:
        """What the graph's inputs get: a list of one array a sample each.

        Positions that DALI shall not decode (padding, rows for Pillow) get the blank image, black in every setting.
        """
        own = self._decodable(request)
        root, paths = self.sampler.manifest.root, self.sampler.manifest.paths
        names = [
            np.frombuffer(os.fsencode(os.path.join(root, paths[row])), np.uint8) if reads else self._blank.name
            for row, reads in zip(request.rows.tolist(), own.tolist(), strict=True)
        ]
        side = self.sampler.pixels.size
        wanted, whole = (request.resize, (side, side, 0, 0)) if request.crop is None else (request.crop, (0, 0, 1, 1))
        place = np.where(own[:, None], np.asarray(wanted), whole).astype(np.int32)
        columns = [names, list(place[:, :2]), list(place[:, 2:])]
        if request.crop is not None:
            columns.append(list(request.flip.astype(np.int32)))
        if request.color is not None:
            factors = np.where(own[:, None], request.color, NO_COLOR_CHANGE)[:, : self._factors]
            columns += [list(column) for column in factors.T]
        return columns

    def _decodable(self, request: Request) -> np.ndarray:
        """(B,) bool: positions that DALI decodes."""
        own = (request.rows >= 0) & ~self._flagged[request.rows]
        if self._pillow:
            own &= np.fromiter((row not in self._pillow for row in request.rows.tolist()), bool, len(own))
        return own

    def _graph(self) -> tuple[Any, Any, Any]:
        """Pixels (S, S, C) uint8, the shape (3,) int64 of the whole image, and the file's first and last two bytes."""
        pixels, training = self.sampler.pixels, self.sampler.training
        kinds = [types.UINT8, types.INT32, types.INT32] + [types.INT32] * training + [types.FLOAT] * self._factors
        inputs = fn.external_source(source=self._source, num_outputs=len(kinds), batch=True, dtype=kinds)
        encoded = _read(inputs[0])
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
        return images, fn.peek_image_shape(encoded, adjust_orientation=turn), fn.cat(encoded[:2], encoded[-2:])

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
        if not self._gpu:
            return {"device": "cpu"}
        # fancy upsampling makes nvJPEG's chroma equal libjpeg's; the largest image sizes its buffers once
        manifest = self.sampler.manifest
        return {
            "device": "mixed",
            "jpeg_fancy_upsampling": True,
            "preallocate_width_hint": int(manifest.width.max()),
            "preallocate_height_hint": int(manifest.height.max()),
        }

    # delivery
    def _deliver(self, request: Request, outputs: Any, epoch: int) -> Batch:
        pixels: Any = _on_gpu(outputs[0]) if self._gpu else outputs[0].as_array()
        own = self._decodable(request)
        doubtful = own & self._doubtful(request.rows, outputs[1].as_array(), outputs[2].as_array())
        self._pillow.update(request.rows[doubtful].tolist())
        by_pillow = (request.rows >= 0) & (doubtful | ~own)
        if by_pillow.any():
            request = self._patch(request, pixels, by_pillow, epoch)
        return make_batch(self.sampler.manifest, request, fill(pixels, request))

    def _doubtful(self, rows: np.ndarray, shapes: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """(B,) bool: files that DALI accepted and that may have been cut or exchanged since the scan.

        An image of another size would pass, cropped by the old one's numbers. DALI stops reading a JPEG behind the
        crop, so a cut one passes or not, depending on the crop; and it reads a cut BMP beyond its end.
        """
        resized = (shapes[:, :2] != np.stack(self._size(rows), 1)).any(1)
        first, last = ends[:, :2].copy().view(">u2")[:, 0], ends[:, 2:].copy().view(">u2")[:, 0]
        return resized | ((first == _JPEG_START) & (last != _JPEG_END)) | (first == _BMP_START)

    def _patch(self, request: Request, pixels: Any, positions: np.ndarray, epoch: int) -> Request:
        """Put Pillow's pixels at `positions`, in place; a file that Pillow refuses too becomes padding."""
        wanted = replace(request, rows=np.where(positions, request.rows, -1))
        made, _, failed = decode_batch(self.sampler, wanted, self._threads)
        for k in np.flatnonzero(positions):
            pixels[k] = _like(made[k], pixels)
        for row, reason in failed.items():
            self._report(row, reason, epoch)
        return request.refilled(np.fromiter((row in failed for row in request.rows.tolist()), bool, len(request.rows)))

    # bad files
    def _report(self, row: int, reason: str, epoch: int) -> None:
        if row not in self.bad:
            self.bad[row] = reason
            if self._on_bad:
                self._on_bad(row, reason, epoch)

    def _find_bad(self, requests: list[Request], message: str, epoch: int) -> None:
        """Which rows of the batches in flight made DALI fail: bad ones go to quarantine, else odd ones to Pillow.

        Raises:
            RuntimeError: no row is to blame, so the failure is not about a file.
        """
        in_flight = [request.rows[self._decodable(request)] for request in requests]
        rows = np.unique(np.concatenate(in_flight)) if in_flight else np.zeros(0, np.int64)
        paths = [self.sampler.manifest.path(row) for row in rows.tolist()]
        with ThreadPoolExecutor(self._threads) as pool:
            verdicts = list(pool.map(lambda path: examine(path, self.sampler.pixels.max_megapixels), paths))
        for path, verdict in zip(paths, verdicts, strict=True):
            if verdict.unreachable:
                raise reach.unreachable(path, OSError(verdict.reason))
        bad = {row: verdict.reason for row, verdict in zip(rows.tolist(), verdicts, strict=True) if not verdict.ok}
        for row, reason in bad.items():
            self._report(row, reason, epoch)
        if not bad:
            refused = rows[self._refused(paths, np.stack(self._size(rows), 1))]
            if any(str(path) in message for path in paths):  # it could not be opened: the examination waited for it
                return
            if not len(refused):
                raise RuntimeError(f"DALI failed, and every file of the batch is readable: {message}")
            self._pillow.update(refused.tolist())

    def _size(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(height, width), each (n,) int64 pixels, as the scan found them."""
        return self.sampler.height[rows], self.sampler.width[rows]

    def _refused(self, paths: list[Path], sizes: np.ndarray) -> np.ndarray:
        """(n,) bool: files that DALI, asked one by one, does not decode to the expected (height, width)."""
        refused = np.ones(len(paths), bool)
        pipeline: Any = None
        for k, path in enumerate(paths):
            pipeline = pipeline or self._single()
            pipeline.feed_input("path", [np.frombuffer(os.fsencode(path), np.uint8)])
            try:
                refused[k] = tuple(pipeline.run()[0].shape()[0][:2]) != tuple(sizes[k])
            except RuntimeError:
                pipeline = None  # DALI does not go on after an error
        return refused

    def _single(self) -> Any:
        """A pipeline that decodes one whole file a run."""
        pipeline = Pipeline(batch_size=1, num_threads=1, device_id=self._device_id, prefetch_queue_depth=1)
        with pipeline:
            encoded = _read(fn.external_source(name="path", dtype=types.UINT8))
            pipeline.set_outputs(self._decoder(encoded, self.sampler.pixels.exif == "apply"))
        pipeline.build()
        return pipeline


class _Blank:
    """A black image of one pixel in memory, with a name under which DALI can open it."""

    def __init__(self) -> None:
        self._file = open(os.memfd_create("blank"), "wb", buffering=0)  # noqa: SIM115 - held open: it is the file
        Image.new("RGB", (1, 1)).save(self._file, "PNG")
        self.name = np.frombuffer(f"/proc/{os.getpid()}/fd/{self._file.fileno()}".encode(), np.uint8)

    def close(self) -> None:
        self._file.close()


def _read(name: Any) -> Any:
    # without mmap: a file that is cut while it is mapped would end the process (SIGBUS)
    return fn.io.file.read(name, dont_use_mmap=True)


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


def _gpu_index(device: str) -> int:
    return int(device.partition(":")[2] or 0)


def _on_gpu(images: Any) -> Any:
    import torch

    return torch.from_dlpack(images.as_tensor()).clone()  # DALI reuses the buffer


def _like(made: np.ndarray, pixels: Any) -> Any:
    if isinstance(pixels, np.ndarray):
        return made
    import torch

    return torch.from_numpy(made).to(pixels.device)
