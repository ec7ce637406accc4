"""Loaders on NVIDIA DALI: the sampler draws every crop, DALI only decodes, resizes and flips.

DALI cannot skip a bad image: one undecodable file makes the whole pipeline invalid (NVIDIA/DALI issue 3913), and some
end the process. So each file is read here, by threads that are a batch ahead, and what DALI gets are bytes that were
proven well-formed (`proof.py`) and of the size that the scan saw. All else is decoded by Pillow in the same threads,
which also finds out what is bad. What DALI refuses nevertheless goes to Pillow as well: the pipeline is rebuilt at the
next undelivered batch, which needs no saved state because the sampler is a pure function.

Pixels are within 2 levels of Pillow's (mean 0.16), with two exceptions in less than 0.1 % of the values: at the very
edge of an image DALI repeats the last pixel where Pillow renormalises its filter (up to 15 levels, outermost row or
column), and bicubic overshoot at hard edges is clipped after both passes, not between them (up to 14 levels).
"""

from __future__ import annotations

import io
import math
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import numpy as np
from nvidia.dali import fn, types
from nvidia.dali.pipeline import Pipeline
from PIL import Image

from ..core.batch import Batch
from ..core.errors import DataError
from ..core.pixels import Pixels
from ..data import reach
from ..data.decode import Undecodable, read_file
from ..data.proof import JPEG, PNG, PNG_START, prove
from .augment import NO_COLOR_CHANGE
from .loader import OnBad, make_batch
from .sampler import Request, Sampler
from .torch_loader import decode_row, fill

_FILTERS = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}
_AXES = [0, 1]


@dataclass
class _Work:
    """One batch on its way: first its files are read (and some decoded) by threads, then DALI decodes the rest."""

    request: Request
    jobs: dict[int, Future[bytes | np.ndarray | str]]  # position -> for DALI, pixels by Pillow, or why it is bad
    made: dict[int, np.ndarray] = field(default_factory=dict)  # position -> pixels by Pillow
    failed: dict[int, str] = field(default_factory=dict)  # position -> why it is bad
    error: DataError | None = None  # a file that cannot be reached
    given_up: float = math.inf  # when that was found

    def encoded(self) -> dict[int, bytes]:
        """Position -> what DALI decodes; waits for the threads and sorts what they made, until a file is given up."""
        found: dict[int, bytes] = {}
        for position, job in self.jobs.items():
            try:
                answer = job.result()
            except DataError as error:
                self.error, self.given_up = error, time.monotonic()
                self.cancel()
                break
            if isinstance(answer, bytes):
                found[position] = answer
            elif isinstance(answer, str):
                self.failed[position] = answer
            else:
                self.made[position] = answer
        self.jobs = {}
        return found

    def cancel(self) -> None:
        for job in self.jobs.values():
            job.cancel()


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
        self._blank = _blank()
        self._threads = max(1, workers)
        self._pool: ThreadPoolExecutor | None = None  # begun with the first batch, and ended by `close`
        color = sampler.augment is not None and sampler.augment.has_color
        self._factors = (2 if sampler.pixels.color == "gray" else 4) if color else 0  # gray has no hue, no saturation
        self._pillow: set[int] = set()  # rows that DALI refuses; a new loader finds them again, at the cost of one rebuild
        self._flagged = sampler.needs_pillow(np.arange(len(sampler.manifest)))
        self._reading: deque[_Work] = deque()  # at the threads
        self._ahead: deque[_Work] = deque()  # at DALI, not yet delivered
        self._next = (0, 0)  # what the threads get next
        self._pipeline: Any = None
        self._patience = reach.Patience()

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        for index in range(start, self.sampler.steps):
            yield self._batch(epoch, index)

    def hurry(self) -> None:
        self._patience.call_off()

    def close(self) -> None:
        self.hurry()  # else the threads go on waiting for files
        self._stop()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    def _stop(self) -> None:
        """Forget the pipeline and everything that is on its way."""
        self._pipeline = None
        for work in self._reading:
            work.cancel()
        self._reading.clear()
        self._ahead.clear()

    def _batch(self, epoch: int, index: int) -> Batch:
        """One batch; rebuilds the pipeline when it stands elsewhere, and after each failure of DALI's."""
        place = (epoch if self.sampler.training else 0, index)
        asked, again = time.monotonic(), False
        for _ in range(self.sampler.batch_size + 3):  # each round but the last finds at least one row for Pillow
            if self._pipeline is None or not self._ahead or self._place_of(self._ahead[0]) != place:
                self._build(place)
            try:
                outputs = self._pipeline.run()
            except RuntimeError as error:
                in_flight = [work.request for work in self._ahead]
                self._stop()
                self._find_refused(in_flight, str(error))
                continue
            work = self._ahead.popleft()
            if work.error is None:
                if again:
                    self._patience.over()
                return self._deliver(work, outputs, epoch)
            self._stop()
            if again or work.given_up >= asked:
                raise work.error
            again = True  # it was read ahead, perhaps long ago, behind the end of the epoch before
        raise RuntimeError(f"DALI failed again and again at epoch {epoch}, batch {index}")

    @staticmethod
    def _place_of(work: _Work) -> tuple[int, int]:
        return work.request.epoch, work.request.index

    # reading, in threads
    def _read_on(self) -> None:
        """Hand the next batch to the threads."""
        epoch, index = self._next
        if index >= self.sampler.steps:
            if self._once:
                return
            epoch, index = (epoch + 1 if self.sampler.training else 0), 0
        self._next = (epoch, index + 1)
        request = self.sampler.request(epoch, index, self.bad.keys())
        self._pool = self._pool or ThreadPoolExecutor(self._threads, "images")
        positions = np.flatnonzero(request.rows >= 0).tolist()
        self._reading.append(_Work(request, {k: self._pool.submit(self._read, request, k) for k in positions}))

    def _read(self, request: Request, position: int) -> bytes | np.ndarray | str:
        """One file: its bytes when DALI may have them, else its pixels by Pillow, or why it is bad."""
        row = int(request.rows[position])
        try:
            content = self._content(row)
            if self._for_dali(row, content):
                return content
            return decode_row(self.sampler, request, position, content)
        except Undecodable as fault:
            return fault.reason

    def _content(self, row: int) -> bytes:
        path, limit = self.sampler.manifest.path(row), self.sampler.pixels.max_megapixels
        return read_file(path, limit, patience=self._patience)

    def _for_dali(self, row: int, content: bytes) -> bool:
        """Whether DALI decodes these bytes safely, and as Pillow would."""
        if self._flagged[row] or row in self._pillow:
            return False
        manifest = self.sampler.manifest
        if content.startswith(PNG_START) and sha256(content).digest()[:16] == manifest.digest[row].tobytes():
            return True  # the scan has proven these bytes; to inflate them again costs as much as to decode them
        found = prove(content)
        # a file exchanged for one of another size would be cropped by the old one's numbers
        same = (found.width, found.height) == (manifest.width[row], manifest.height[row])
        same &= found.orientation == manifest.orientation[row]
        return found.kind in (JPEG, PNG) and found.sound and found.whole and same

    # the pipeline
    def _build(self, place: tuple[int, int]) -> None:
        self._stop()
        self._next = place
        pipeline = Pipeline(
            batch_size=self.sampler.batch_size,
            num_threads=self._threads,
            device_id=self._device_id,
            prefetch_queue_depth=2,
            seed=0,
        )
        with pipeline:
            pipeline.set_outputs(self._graph())
        pipeline.build()
        self._pipeline = pipeline
        self._read_on()

    def _source(self) -> list[list[np.ndarray]]:
        """Called by DALI for each batch, ahead of delivery."""
        if not self._reading:
            raise StopIteration
        work = self._reading.popleft()
        self._read_on()  # the next one is read while this one is decoded
        encoded = work.encoded()
        self._ahead.append(work)
        return self._arguments(work.request, encoded)

    def _arguments(self, request: Request, encoded: dict[int, bytes]) -> list[list[np.ndarray]]:
        """What the graph's inputs get: a list of one array a sample each.

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

    def _graph(self) -> Any:
        """Pixels (S, S, C) uint8."""
        pixels, training = self.sampler.pixels, self.sampler.training
        kinds: list[Any] = (
            [types.UINT8, types.INT32, types.INT32] + [types.INT32] * training + [types.FLOAT] * self._factors
        )
        inputs = fn.external_source(source=self._source, num_outputs=len(kinds), batch=True, dtype=kinds)
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
    def _deliver(self, work: _Work, outputs: Any, epoch: int) -> Batch:
        pixels: Any = _on_gpu(outputs[0]) if self._gpu else outputs[0].as_array()
        for position, made in work.made.items():
            pixels[position] = _like(made, pixels)
        rows = work.request.rows
        for position, reason in work.failed.items():
            self._report(int(rows[position]), reason, epoch)
        # a row that was found bad meanwhile stays bad, also when its file was repaired before this batch read it
        bad = np.fromiter((row in self.bad for row in rows.tolist()), bool, len(rows))
        request = work.request.refilled(bad)
        return make_batch(self.sampler.manifest, request, fill(pixels, request))

    def _report(self, row: int, reason: str, epoch: int) -> None:
        if row not in self.bad:
            self.bad[row] = reason
            if self._on_bad:
                self._on_bad(row, reason, epoch)

    # what DALI refuses
    def _find_refused(self, requests: list[Request], message: str) -> None:
        """Which rows of the batches in flight made DALI fail: from now on they are Pillow's.

        Raises:
            DataError: D015 when a file cannot be reached.
            RuntimeError: no row is to blame, so the failure is not about a file.
        """
        rows = np.unique(np.concatenate([request.rows for request in requests] or [np.zeros(0, np.int64)]))
        before, pipeline = len(self._pillow), None
        for row in rows[rows >= 0].tolist():
            try:
                content = self._content(row)
            except Undecodable:
                continue  # found again when its batch is read again
            if not self._for_dali(row, content):
                continue
            pipeline = pipeline or self._single()
            pipeline.feed_input("file", [np.frombuffer(content, np.uint8)])
            try:
                pipeline.run()
            except RuntimeError:
                pipeline = None  # DALI does not go on after an error
                self._pillow.add(row)
        if len(self._pillow) == before:
            raise RuntimeError(f"DALI failed, and every file of the batch is readable: {message}")

    def _single(self) -> Any:
        """A pipeline that decodes one whole file a run."""
        pipeline = Pipeline(batch_size=1, num_threads=1, device_id=self._device_id, prefetch_queue_depth=1)
        with pipeline:
            encoded = fn.external_source(name="file", dtype=types.UINT8)
            pipeline.set_outputs(self._decoder(encoded, self.sampler.pixels.exif == "apply"))
        pipeline.build()
        return pipeline


def _blank() -> np.ndarray:
    """The file of a black image of one pixel, (n,) uint8."""
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
