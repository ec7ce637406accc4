"""Loaders on NVIDIA DALI: the sampler draws every crop, DALI only reads, decodes, resizes and flips.

DALI cannot skip a bad image: one undecodable file makes the whole pipeline invalid (NVIDIA/DALI issue 3913). So files
are checked before they come here, and a file that slips through is found, quarantined, and the pipeline rebuilt at the
next undelivered batch, which needs no saved state because the sampler is a pure function.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from nvidia.dali import fn, types
from nvidia.dali.pipeline import Pipeline

from ..core.batch import Batch
from ..core.pixels import Pixels
from .loader import Backend, OnBad, make_batch
from .quarantine import examine
from .sampler import Request, Sampler
from .torch_loader import decode_batch, fill

_FILTERS = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}
_AXES = [0, 1]


class DaliLoader:
    """See `loader.Loader`. `dali-cpu` decodes on `workers` threads; `dali-gpu` on the GPU, and delivers there."""

    def __init__(
        self, sampler: Sampler, backend: Backend, workers: int, bad: dict[int, str], on_bad: OnBad | None, *, device: str, once: bool
    ) -> None:
        self.sampler, self.bad, self._on_bad, self._once = sampler, bad, on_bad, once
        self._gpu = backend == "dali-gpu"
        self._device = device
        self._threads = max(1, workers)
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

    def _batch(self, epoch: int, index: int) -> Batch:
        """One batch; rebuilds the pipeline when it stands elsewhere, and after each bad file."""
        place = (epoch if self.sampler.training else 0, index)
        for _ in range(2 * self.sampler.batch_size + 2):  # each round but the last finds at least one bad row
            if self._pipeline is None or not self._ahead or (self._ahead[0].epoch, self._ahead[0].index) != place:
                self._build(place)
            try:
                images = self._pipeline.run()[0]
            except RuntimeError as error:
                self._pipeline = None
                self._find_bad(list(self._ahead), str(error), epoch)
                continue
            return self._deliver(self._ahead.popleft(), images, epoch)
        raise RuntimeError(f"DALI failed again and again at epoch {epoch}, batch {index}")

    # the pipeline
    def _build(self, place: tuple[int, int]) -> None:
        self._ahead.clear()
        self._next = place
        pipeline = Pipeline(
            batch_size=self.sampler.batch_size,
            num_threads=self._threads,
            device_id=_gpu_index(self._device) if self._gpu else None,
            prefetch_queue_depth=2,
            seed=0,
        )
        with pipeline:
            pipeline.set_outputs(self._graph())
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
        request = self.sampler.request(epoch, index, set(self.bad))
        self._ahead.append(request)
        return self._arguments(request)

    def _arguments(self, request: Request) -> list[list[np.ndarray]]:
        stand_in = self._stand_in(request)
        position = np.where(self._decodable(request), np.arange(len(request.rows)), stand_in[1])
        sources = np.where(self._decodable(request), request.sources, stand_in[0])
        manifest = self.sampler.manifest
        names = [np.frombuffer(str(manifest.path(int(row))).encode("utf-8", "surrogateescape"), np.uint8) for row in sources]
        columns: list[list[np.ndarray]] = [names]
        place = self._place(request, sources, position)
        columns += [list(place[:, :2]), list(place[:, 2:])]
        if request.crop is not None:
            columns.append(list(request.flip[position].astype(np.int32)))
        if request.color is not None:
            columns += [list(column) for column in request.color[position].T]
        return columns

    def _place(self, request: Request, sources: np.ndarray, position: np.ndarray) -> np.ndarray:
        """(B, 4) int32: the crop (training), or resized size and crop offset (evaluation), of what DALI decodes."""
        if request.crop is not None:
            crop = request.crop[position]
            foreign = sources != request.sources[position]
            if foreign.any():  # a stand-in from outside the batch: any crop inside it will do
                crop = crop.copy()
                crop[foreign] = 0, 0, 1, 1
            return crop.astype(np.int32)
        assert request.resize is not None
        place = request.resize[position]
        foreign = sources != request.sources[position]
        if foreign.any():
            size = self.sampler.pixels.size
            place = place.copy()
            place[foreign] = size, size, 0, 0
        return place.astype(np.int32)

    def _decodable(self, request: Request) -> np.ndarray:
        rows = request.sources
        by_pillow = np.fromiter((int(row) in self._pillow for row in rows), bool, len(rows)) if self._pillow else False
        return (rows >= 0) & ~self._flagged[rows] & ~np.asarray(by_pillow)

    def _stand_in(self, request: Request) -> tuple[int, int]:
        """A row that DALI can read, and a position, for positions whose pixels Pillow will make."""
        good = np.flatnonzero(self._decodable(request))
        if len(good):
            return int(request.sources[good[0]]), int(good[0])
        for row in self.sampler.rows:
            if not self._flagged[row] and int(row) not in self._pillow and int(row) not in self.bad:
                return int(row), 0
        raise ValueError("DALI can decode none of these images: use the torch loader")

    def _graph(self) -> Any:
        pixels, training = self.sampler.pixels, self.sampler.training
        color = self.sampler.augment is not None and self.sampler.augment.has_color
        kinds = [types.UINT8, types.INT32, types.INT32] + [types.INT32] * training + [types.FLOAT] * (4 if color else 0)
        inputs = fn.external_source(source=self._source, num_outputs=len(kinds), batch=True, dtype=kinds)
        encoded = fn.io.file.read(inputs[0])
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
        if color:
            images = _twist(images, inputs[4:8], pixels)
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
    def _deliver(self, request: Request, images: Any, epoch: int) -> Batch:
        pixels: Any = _on_gpu(images) if self._gpu else images.as_array()
        by_pillow = (request.sources >= 0) & ~self._decodable(request) & (request.rows >= 0)
        if by_pillow.any():
            request = self._patch(request, pixels, by_pillow, epoch)
        return make_batch(self.sampler.manifest, request, pixels)

    def _patch(self, request: Request, pixels: Any, positions: np.ndarray, epoch: int) -> Request:
        """Put Pillow's pixels at `positions`, in place; a file that Pillow refuses too becomes padding."""
        made, _, failed = decode_batch(self.sampler, replace(request, rows=np.where(positions, request.rows, -1)))
        for k in np.flatnonzero(positions):
            pixels[k] = _like(made[k], pixels)
        wrong = np.fromiter((int(row) in failed for row in request.rows), bool, len(request.rows))
        for row, reason in failed.items():
            self._report(row, reason, epoch)
        delivered = request.refilled(wrong)
        fill(pixels, delivered)
        return delivered

    # bad files
    def _report(self, row: int, reason: str, epoch: int) -> None:
        if row not in self.bad:
            self.bad[row] = reason
            if self._on_bad:
                self._on_bad(row, reason, epoch)

    def _find_bad(self, requests: list[Request], message: str, epoch: int) -> None:
        """Which rows of the batches in flight made DALI fail: bad ones go to quarantine, odd ones to Pillow.

        Raises:
            RuntimeError: no row is to blame, so the failure is not about a file.
        """
        rows = np.unique(np.concatenate([r.sources[self._decodable(r)] for r in requests]) if requests else np.zeros(0, np.int64))
        found = False
        for row in (int(r) for r in rows):
            path = self.sampler.manifest.path(row)
            verdict = examine(path, self.sampler.pixels.max_megapixels)
            if not verdict.ok:
                self._report(row, verdict.reason, epoch)
                found = True
            elif not _dali_reads(str(path), self.sampler.pixels.exif == "apply", self._expected(row)):
                self._pillow.add(row)
                found = True
        if not found:
            raise RuntimeError(f"DALI failed, and every file of the batch is readable: {message}")

    def _expected(self, row: int) -> tuple[int, int]:
        return int(self.sampler.height[row]), int(self.sampler.width[row])


def _resize(images: Any, size: Any, pixels: Pixels) -> Any:
    return fn.resize(images, size=size, interp_type=_FILTERS[pixels.interpolation], antialias=True)


def _gray(images: Any, pixels: Pixels) -> Any:
    # decoding to gray directly would take the JPEG's luma plane, which differs from converted RGB where colours clip
    return fn.color_space_conversion(images, image_type=types.RGB, output_type=types.GRAY) if pixels.color == "gray" else images


def _twist(images: Any, factors: Any, pixels: Pixels) -> Any:
    if pixels.color == "gray":
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


def _dali_reads(path: str, turn: bool, expected: tuple[int, int]) -> bool:
    """Whether DALI alone decodes one file to the expected (height, width)."""
    pipeline = Pipeline(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1)
    with pipeline:
        name = np.frombuffer(path.encode("utf-8", "surrogateescape"), np.uint8)
        encoded = fn.io.file.read(fn.external_source(source=lambda: [name], dtype=types.UINT8))
        pipeline.set_outputs(fn.decoders.image(encoded, output_type=types.RGB, adjust_orientation=turn))
    try:
        pipeline.build()
        return tuple(pipeline.run()[0].at(0).shape[:2]) == expected
    except RuntimeError:
        return False
